"""Who saved a run, when, and by which version of which script."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

_SECONDS = 5.0  # that git may take


def provenance() -> dict[str, str]:
    """What `Outcome.provenance` holds of this process; what is not known is left out.

    Returns:
        ``who``: ``$IIMM_CALLBACKS_AUTHOR``, else the name that one is logged in by; ``when``: now,
        UTC; ``script``: name of its file; ``commit``: that its folder is at in git, with ``+``
        where the script itself has changed since.
    """
    found = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    try:
        found["who"] = os.environ.get("IIMM_CALLBACKS_AUTHOR") or getpass.getuser()
    except (OSError, KeyError, ImportError):  # of a user without a name
        pass
    script = Path(sys.argv[0] or "-")
    if script.is_file():
        found["script"] = script.name
        if commit := _commit(script.absolute()):
            found["commit"] = commit
    return found


def _commit(script: Path) -> str:
    """Empty where the script is under no version control."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(script.parent), *command],
            capture_output=True, text=True, timeout=_SECONDS, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", script.name):
            return ""
        changed = "+" if git("status", "--porcelain", "--", script.name) else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return ""
