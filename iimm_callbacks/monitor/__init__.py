"""Begin, step, end: a guarded run of any training loop."""

from .monitor import IIMMMonitor

__all__ = ["IIMMMonitor"]
