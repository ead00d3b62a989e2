"""The notebook that tells the story: it runs top to bottom, and what it shows is what it prints.

After a change: `python tests/test_notebook.py` runs it and stores its output again. That needs no
Jupyter: cells are plain Python, run one after another in one namespace, and a figure is shown by
`plt.show()`.
"""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from iimm_callbacks import sample

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "story.ipynb"


def execute(notebook):
    """Run the code cells in order and put what they print and show in the place of their outputs.

    Raises:
        Exception: What a cell raises, an `AssertionError` of its claims for one.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    outputs = []

    def show():
        for number in plt.get_fignums():
            figure, picture = plt.figure(number), io.BytesIO()
            figure.savefig(picture, format="png", metadata={"Software": None})
            data = {
                "image/png": base64.b64encode(picture.getvalue()).decode(),
                "text/plain": [f"<Figure with {len(figure.axes)} axes>"],
            }
            outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        plt.close("all")

    plt.show = show
    names = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        outputs = cell["outputs"] = []
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {count}", "exec"), names)
        if printed.getvalue():
            lines = printed.getvalue().splitlines(keepends=True)
            outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
        cell["execution_count"] = count


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def load():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def shown(notebook):
    """Of each code cell its pictures, counted, and its words; numbers differ between machines."""
    found = []
    for cell in code_cells(notebook):
        kinds = [output["output_type"] for output in cell["outputs"]]
        text = "".join("".join(output["text"]) for output in cell["outputs"] if "text" in output)
        words = re.findall(r"[a-z_]{3,}", text)
        found.append((kinds.count("display_data"), sorted(set(words))))
    return found


def measured(notebook):
    """The printed IIMM and zero-shot accuracy of every task, fractions."""
    text = json.dumps(notebook, ensure_ascii=False)
    found = re.findall(r"(\w+) +IIMM (0\.\d+) +zero-shot accuracy +(\d+)%", text)
    assert sorted(name for name, *_ in found) == sorted(sample.task_names())
    return {
        f"{name}, {key}": float(value) / scale
        for name, iimm, accuracy in found
        for key, value, scale in (("IIMM", iimm, 1), ("accuracy", accuracy, 100))
    }


def test_what_is_stored_is_one_run_from_top_to_bottom():
    cells = code_cells(load())
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert kinds == {"display_data", "stream"}  # no errors
    assert all(o.get("name") != "stderr" for cell in cells for o in cell["outputs"])
    assert sum(count for count, _ in shown(load())) >= 6


def test_it_is_small_and_tells_nothing_of_the_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000
    without_pictures = re.sub(r'"image/png": "[^"]*"', "", text)
    for trace in (
        "/home/",
        "/root",
        "/tmp",
        "/work/",
        "site-packages",
        "Warning",
        "it/s]",
        "\\u001b",
    ):
        assert trace not in without_pictures


@pytest.mark.once
@pytest.mark.whole
def test_it_runs_and_shows_what_is_stored(tmp_path):
    written = tmp_path / "story.ipynb"
    process = subprocess.run(
        [sys.executable, __file__, str(written)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    again = json.loads(written.read_text(encoding="utf-8"))
    stored = load()
    assert shown(again) == shown(stored), "run `python tests/test_notebook.py` to store it again"
    # Before training numbers are the same everywhere, but for rounding.
    assert measured(again) == pytest.approx(measured(stored), abs=0.02)


if __name__ == "__main__":
    notebook = load()
    execute(notebook)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8")
