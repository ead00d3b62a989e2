"""A run's record -> a web page with pictures that needs nothing beside it; several runs -> one."""

from .compare import compare_runs
from .drawing import require_matplotlib
from .page import PAGE, write_report

__all__ = ["PAGE", "compare_runs", "require_matplotlib", "write_report"]
