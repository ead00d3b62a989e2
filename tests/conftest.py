"""Which tests run, where and in which order; what they share is in `shared_fixtures.py`."""

import os
import tempfile

import pytest

# Before numpy and torch are imported. Two workers with two threads each wait for one another: the
# suite takes half the time with one, and tiny models gain nothing from more.
os.environ.update(
    {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    if "PYTEST_XDIST_WORKER" in os.environ
    else {}
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # not the user's

collect_ignore = ["tiny_open_clip.py"]  # has no doctest, and open_clip is not everywhere


def pytest_addoption(parser):
    parser.addoption("--record-matrix", action="store_true", help="see test_matrix.py")
    parser.addoption("--whole", action="store_true", help="also run whole programs, minutes")


def pytest_configure(config):
    """Importing torch and transformers takes six seconds: xdist's own process does without."""
    runs_here = config.getoption("dist", "no") == "no" or config.option.collectonly
    if runs_here or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(config, items):
    """What is marked `whole` is left out, but where it is asked for; there it comes first."""
    whole = [item for item in items if item.get_closest_marker("whole")]
    rest = [item for item in items if not item.get_closest_marker("whole")]
    if not config.getoption("--whole"):
        config.hook.pytest_deselected(items=whole)
        whole = []
    whole.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    items[:] = whole + rest


# They start first, so that no worker waits for another in the end.
LONGEST = ("tests/test_notebook.py", "tests/test_study.py", "tests/test_examples.py")
# What a fixture of these takes long to make, one worker makes once.
IN_ONE_PLACE = (
    "test_apart.py", "test_demo.py", "test_kill.py", "test_package.py", "test_paper.py",
    "test_probe_ranks.py", "test_public_api.py", "test_ranks.py", "test_rescue.py",
    "test_sample.py", "test_sharded.py",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Any worker takes any test, but all of these files one worker; they come first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return path if path.endswith(IN_ONE_PLACE) else nodeid

    return Scheduling(config, log)
