"""A run's record in a file: written whole or not at all, and checked when it is read back."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import keys
from .checks import (
    DIFFERENCE,
    ERROR,
    FRACTION,
    Check,
    anything,
    count,
    dict_of,
    finite,
    flag,
    list_of,
    object_of,
    one_of,
    or_none,
    text,
)
from .verdict import LEVELS, LIMIT_ON

RUNNING = "running"  # what a run's `ended` is meanwhile
_LONGEST = 53  # of a task's name in that of a file
_HASHED = re.compile(r"-[0-9a-f]{16}\Z")


def file_name(task: str) -> str:
    """Name of the run file of a task: ``iimm_<task>.json``, whatever the task's name.

    No path, and at most 80 of the characters ``A-Z a-z 0-9 . _ -``. Where that changes the name, a
    hash of all of it follows, so that two tasks do not share a file.

    Args:
        task: Name of the task.

    Example:
        >>> file_name("digits")
        'iimm_digits.json'
        >>> file_name("../digits")
        'iimm_.._digits-c9e8680d916886e7.json'
    """
    kept = re.sub(r"[^A-Za-z0-9._-]", "_", task)[:_LONGEST]
    # A name that looks like one with a hash has one too: it might be another task's.
    if kept != task or _HASHED.search(task):
        kept += f"-{hashlib.sha256(task.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    return f"iimm_{kept}.json"


def save_run(record: dict[str, Any], path: str | Path) -> None:
    """Write a run's record as JSON; a crash leaves the old file or the new one.

    Args:
        record: `IIMMCallback.record`.
        path: Of the JSON file; its folder must exist. It is written beside it first, then renamed.

    Raises:
        OSError: The file cannot be written; what was there still is.
        TypeError: The record holds what JSON cannot.
        ValueError: It holds NaN or infinity.
    """
    write_whole(Path(path), json.dumps(record, indent=1, allow_nan=False).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; a crash leaves the old one or the new one.

    Raises:
        OSError: It cannot be written; what was there still is.
    """
    unfinished = path.parent / f"{path.name}.{secrets.token_hex(4)}.unfinished"
    file = unfinished.open("xb")  # no one else's file, and through no link
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def process(record: dict[str, Any]) -> dict[str, Any]:
    """What tells later whether a run that is running now still does; empty once it has ended."""
    if record.get("ended") != RUNNING:
        return {}
    import psutil  # only where a run begins or is read

    me = psutil.Process()
    now = time.time()
    return {"process": {"host": socket.gethostname(), "pid": me.pid,
                        "started": me.create_time(), "heartbeat": now}}  # fmt: skip


def _is_gone(record: dict[str, Any]) -> bool:
    """Whether the process of a running run is known to be gone; of another machine's it is not."""
    found = record.get("process")
    if record["ended"] != RUNNING or found is None or found["host"] != socket.gethostname():
        return False
    import psutil

    try:
        return bool(abs(psutil.Process(found["pid"]).create_time() - found["started"]) > 1)
    except psutil.Error:
        return True


def sweep(path: str | Path) -> None:
    """Remove what `save_run` had begun beside a run file when its process was killed.

    Args:
        path: As `save_run`; of a file that no other process is writing.

    Raises:
        OSError: It cannot be removed.
    """
    path = Path(path)
    for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.unfinished"):
        unfinished.unlink(missing_ok=True)


def read_run(path: str | Path) -> dict[str, Any]:
    """The record in a file of `save_run`: all that `reports` shows is there and of its kind.

    Args:
        path: Of the JSON file.

    Returns:
        The record, equal to the one that was saved; but a run that was killed, whose process on
        this machine is gone, is ``"interrupted"`` and no longer ``"running"``.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no such record; the message names the field, what was expected and what
            came.
    """
    try:
        record = check_run(json.loads(Path(path).read_text(encoding="utf-8")))
        return record | {"ended": "interrupted"} if _is_gone(record) else record
    except RecursionError:
        raise ValueError(f"{path} is no run file: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(
            f"{path} is no run file: {error}; `save_run` writes one of `IIMMCallback.record`"
        ) from error


def check_run(data: Any) -> dict[str, Any]:
    """A copy of a run's record: all that `reports` shows is there and of its kind.

    Args:
        data: `IIMMCallback.record`, from wherever.

    Raises:
        ValueError: It is none; the message names the field, what was expected and what came.
    """
    record: dict[str, Any] = _RECORD(data, "")
    if not record["looks"]:
        raise ValueError("`looks` must hold a look, got none")
    accuracies = dict.fromkeys(map(keys.accuracy_key, record["off_target"]), FRACTION)
    for position, look in enumerate(record["looks"]):
        needed = list(accuracies)  # because something else is there
        if accuracies or _FORGETTING in look:
            needed += [_FORGETTING, keys.WORST]
        for forecast in _FORECASTS:
            needed += forecast if any(key in look for key in forecast) else ()
        for key in needed:
            if key not in look:
                raise ValueError(f"`looks[{position}]` lacks {key!r}")
        look |= object_of(accuracies)(look, f"looks[{position}]")
    return record


_FORGETTING = keys.observed_key("forgetting")
_FORECASTS = [keys.forecast_keys(name) for name in ("gain", "forgetting")]
ROW: dict[str, Check] = {  # what there is of every look
    "step": count, "share": FRACTION, "level": one_of(*LEVELS), "reason": text,
    keys.PREFIX: DIFFERENCE, keys.INTER: DIFFERENCE, keys.INTRA: DIFFERENCE,
    keys.ACCURACY: FRACTION, keys.observed_key("gain"): DIFFERENCE,
}  # fmt: skip
_LOOK = object_of(
    ROW,
    {
        keys.STANDARD_ERROR: ERROR, keys.EXCEED: FRACTION,
        _FORGETTING: DIFFERENCE, keys.WORST: DIFFERENCE,
        **{key: finite for forecast in _FORECASTS for key in forecast},
    },
    anything,
)  # fmt: skip
_PREDICTION = object_of({"point": finite, "low": finite, "high": finite}, rest=anything)
_FORECAST = object_of(
    {
        "basis": text, "notes": list_of(text), "base_rate": flag,
        "evidence": dict_of(object_of(
            {
                "predictors": dict_of(finite), "n_tasks": count, "coverage": FRACTION,
                "error": ERROR, "error_of_mean": or_none(ERROR),
                "error_of_zero_shot": or_none(ERROR),
            },
            rest=anything,
        )),
    },
    {"gain": _PREDICTION, "forgetting": _PREDICTION, "worst": _PREDICTION,
     "off_target": dict_of(_PREDICTION)},
    anything,
)  # fmt: skip
_LIMITS: dict[str, Check] = {"max_forgetting": or_none(FRACTION), "limit_on": one_of(*LIMIT_ON)}
_MIX = object_of(
    {
        "alpha": FRACTION, "accuracy": FRACTION, "gain": DIFFERENCE, "gain_se": ERROR,
        "forgetting": DIFFERENCE, "forgetting_se": ERROR, "worst": DIFFERENCE, "worst_se": ERROR,
        "worst_task": text, "inside": flag,
    },
    rest=anything,
)  # fmt: skip
_RESCUE = object_of(
    {
        "mixes": list_of(_MIX), "alpha": FRACTION, "reason": text, "held_out": _MIX,
        "limits": object_of(_LIMITS, rest=anything),
        "n_tensors": count, "applied": flag, "notes": list_of(text), "runtime": ERROR,
    },
    rest=anything,
)  # fmt: skip


def check_rescue(value: Any, name: str) -> dict[str, Any]:
    """`Rescue.to_json` as a run file has it; a check as those of `checks`.

    Raises:
        ValueError: It is not that; the message names the field.
    """
    rescue: dict[str, Any] = _RESCUE(value, name)
    if rescue["alpha"] not in [mix["alpha"] for mix in rescue["mixes"]]:
        raise ValueError(f"`{name}` must hold the mix chosen, got none of α = {rescue['alpha']}")
    return rescue


_RECORD = object_of(
    {
        "task": text, "method": text, "off_target": list_of(text), "ended": text,
        "n_images": count, "n_classes": count, "failures": count, "looks_dropped": count,
        "recipe": object_of({"trainable_share": FRACTION}, rest=anything),
        "limits": object_of(_LIMITS | {"confidence": FRACTION}, rest=anything),
        "forecast": _FORECAST, "looks": list_of(_LOOK),
    },
    {  # of a rescued run, and what an old version did not write
        "rescue": check_rescue, "templates": dict_of(list_of(text)), "metrics": dict_of(text),
        "fingerprints": dict_of(text), "model_fingerprint": or_none(text),
        "process": object_of({"host": text, "pid": count, "started": finite}, rest=anything),
        "linear_probe": or_none(object_of(
            {"note": text}, dict.fromkeys(("accuracy", "standard_error"), or_none(FRACTION)),
            anything,
        )),
    },
    anything,
)  # fmt: skip
