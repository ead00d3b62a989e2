"""Add the guard's one line to a copy of a training script that others wrote.

    python examples/others/add_guard.py PATH/TO/run_clip.py guarded_run_clip.py

Finds where the script makes its Trainer and puts one line behind it, at the same indentation;
every other byte stays as it is. README.md beside this file has sources and lines of the scripts
that it knows. For another script give your own: `--line 'from iimm_callbacks import ...'`.
"""

import argparse
import ast
import hashlib
import sys
from pathlib import Path

# Each in the script's own names, so that its data and columns are those that it trains on.
LINES = {
    "run_clip.py": (
        "from iimm_callbacks import IIMMCallback, Task; trainer.add_callback(IIMMCallback(Task("
        '"captions", dataset["validation"], image_column=image_column, label_column=caption_column'
        ")))"
    ),
    "training_clip_flickr8k_mlflow.py": (
        "from iimm_callbacks import IIMMCallback, Task; trainer.add_callback(IIMMCallback(Task("
        '"captions", eval_dataset, label_column="positive")))'
    ),
}
# Of the texts that were run, see README.md. Other versions get the same line and a notice.
SHA256 = {
    "run_clip.py": "fea1676e5b97f4c9603bac2713b791ba75c6aa3fb89c08effe244c8b54f11de1",
    "training_clip_flickr8k_mlflow.py": (
        "424d50375aaacb958de9b6f99ef420ec427413d7ae9abb3db3a2bf6096603230"
    ),
}


def add_line(text, line):
    """The script with `line` behind the statement that makes `trainer`.

    Raises:
        ValueError: There is no such statement, or more than one, or the guard is there already.
    """
    if "iimm_callbacks" in text:
        raise ValueError("the script has the guard already")
    found = [node for node in ast.walk(ast.parse(text)) if _makes_trainer(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected one statement like `trainer = Trainer(...)`, got {len(found)}; add the line "
            "by hand, before `trainer.train()`"
        )
    (node,) = found
    lines = text.split("\n")
    lines.insert(node.end_lineno, " " * node.col_offset + line)
    return "\n".join(lines)


def _makes_trainer(node):
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
        return False
    made = node.value.func
    name = getattr(made, "id", getattr(made, "attr", ""))
    return [getattr(t, "id", "") for t in node.targets] == ["trainer"] and name.endswith("Trainer")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="your copy")
    parser.add_argument("output", type=Path, help="where to write it with the line")
    parser.add_argument("--line", default="", help="for a script that is not in README.md")
    arguments = parser.parse_args(argv)
    name, content = arguments.script.name, arguments.script.read_bytes()
    if not arguments.line and name not in LINES:
        parser.error(f"no line known for {name!r}, only for {', '.join(LINES)}; give `--line`")
    if name in SHA256 and hashlib.sha256(content).hexdigest() != SHA256[name]:
        print(
            f"{name} is another version than the one that was run, see README.md", file=sys.stderr
        )
    try:
        guarded = add_line(content.decode(), arguments.line or LINES[name])
    except ValueError as error:
        parser.error(str(error))
    arguments.output.write_bytes(guarded.encode())


if __name__ == "__main__":
    main()
