"""Scripts that others wrote, with one line more: guarded, and otherwise what they were.

The scripts themselves are not ours to ship. `IIMM_OTHERS=FOLDER pytest tests/test_others.py` runs
those in the folder, see examples/others/README.md. What always runs are stand-ins of ours: they
have the data, the names and the shape that the line relies on, and nothing else of the scripts.
"""

import ast
import difflib
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file
from shared_fixtures import COLOURS, make_dataset

from iimm_callbacks import sample
from iimm_callbacks.records import keys
from iimm_callbacks.records.run_file import read_run

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "others"

# Reads `image_path` and `caption`, hands the Trainer pixels and tokens, and no processor.
LIKE_RUN_CLIP = """
import sys
import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

def collate(rows):
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    return batch | {"return_loss": True}

def main():
    output, image_column, caption_column = sys.argv[1], "image_path", "caption"
    dataset = load_dataset("json", data_files={"train": "train.json", "validation": "val.json"})
    tokenizer, model = AutoTokenizer.from_pretrained("model"), AutoModel.from_pretrained("model")
    def pixels(path):
        return np.asarray(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255
    def prepare(rows):
        texts = tokenizer(rows[caption_column], padding="max_length", truncation=True)
        return dict(texts) | {"pixel_values": [pixels(path) for path in rows[image_column]]}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output, max_steps=6, learning_rate=1e-3, save_strategy="no",
                               per_device_train_batch_size=8, remove_unused_columns=False,
                               report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=dataset["train"].with_transform(prepare),
        data_collator=collate,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()

main()
"""

# A `datasets` table with an image and two captions, a model of sentence-transformers.
LIKE_FLICKR8K = """
import sys
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

model = SentenceTransformer("model", device="cpu")
eval_dataset = load_dataset("parquet", data_files="pairs.parquet", split="train")
trainer = SentenceTransformerTrainer(
    model=model,
    args=Arguments(sys.argv[1], max_steps=6, learning_rate=1e-3, save_strategy="no", use_cpu=True,
                   per_device_train_batch_size=8, report_to="none", disable_tqdm=True),
    train_dataset=eval_dataset,
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
trainer.save_model()
trainer.save_state()
"""
STAND_INS = {
    "run_clip.py": LIKE_RUN_CLIP,
    "training_clip_flickr8k_mlflow.py": LIKE_FLICKR8K,
}

# Around the scripts, which stay as they are: a torchvision that was built for another torch loads,
# but cannot read a picture; and newer transformers than the script's have no telemetry.
SITECUSTOMIZE = """
import torchvision_ops
import numpy as np
import torch
import torchvision.io
import transformers.utils
from PIL import Image

if not hasattr(transformers.utils, "send_example_telemetry"):
    transformers.utils.send_example_telemetry = lambda *arguments: None

def read_image(path, mode=None):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1).copy())

try:
    torchvision.io.image._assert_has_image_ops()
except RuntimeError:
    torchvision.io.read_image = read_image
"""


@pytest.fixture(scope="module")
def add_guard():
    return runpy.run_path(str(FOLDER / "add_guard.py"))


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_clip, processor):
    """(rows) -> a working folder with a tiny CLIP and as many captioned pictures, in both forms."""

    def build(n_train, n_test):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        for name in ("model", "openai/clip-vit-base-patch32"):  # the latter as on the Hub
            tiny_clip().save_pretrained(name)
            processor.save_pretrained(name)
        Path("pictures").mkdir()
        Path("jxie/flickr8k").mkdir(parents=True)
        for split, file, n in (("train", "train", n_train), ("validation", "val", n_test)):
            rows = []
            for i, row in enumerate(make_dataset("colour", n, seed=n)):
                path = f"pictures/{split}_{i}.png"
                row["image"].save(path)
                caption = f"{list(COLOURS)[row['label']]} thing {i}"
                rows.append({"image_path": path, "caption": caption, "image": row["image"]})
            as_json = [{k: row[k] for k in ("image_path", "caption")} for row in rows]
            Path(f"{file}.json").write_text("\n".join(map(json.dumps, as_json)))
            table = {
                "image": [row["image"] for row in rows],
                "caption_0": [row["caption"] for row in rows],
            }
            features = Features({"image": Image(), "caption_0": Value("string")})
            table = Dataset.from_dict(table, features=features)
            table.to_parquet(f"jxie/flickr8k/{split}.parquet")
        positive = table.rename_column("caption_0", "positive")
        negative = positive["positive"][1:] + positive["positive"][:1]
        positive.add_column("negative", negative).to_parquet("pairs.parquet")

    return build


def weights(folder):
    found = Path(folder).rglob("model.safetensors")
    (path,) = (path for path in found if "checkpoint" not in str(path))
    return load_file(path)


def check_pair(guarded, plain):
    """Rows of the guard before and after training; weights are those of the plain run."""
    run = read_run(next(Path(guarded).rglob("iimm_captions.json")))
    first, last = run["looks"][0], run["looks"][-1]
    assert (first["step"], first["share"], last["share"]) == (0, 0, 1)
    assert run["ended"] == "finished"
    assert first[keys.PREFIX] != last[keys.PREFIX]
    assert run["off_target"] == [task.name for task in sample.canaries("", probe_size=2)]
    ours, theirs = weights(guarded), weights(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return run


def logged(state_file):
    log = json.loads(Path(state_file).read_text())["log_history"]
    return [row["step"] for row in log if keys.PREFIX in row]


@pytest.mark.whole
@pytest.mark.parametrize("name", STAND_INS)
def test_one_line_guards_a_script_of_this_shape(name, add_guard, place, monkeypatch, capsys):
    if "sentence_transformers" in STAND_INS[name]:
        pytest.importorskip("sentence_transformers")
    place(32, 24)
    Path("plain.py").write_text(STAND_INS[name])
    line = add_guard["LINES"][name]
    Path("guarded.py").write_text(add_guard["add_line"](STAND_INS[name], line))
    for script in ("plain", "guarded"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", script])
        torch.manual_seed(0)
        runpy.run_path(f"{script}.py", run_name="__main__")
    run = check_pair("guarded", "plain")
    assert logged("guarded/trainer_state.json") == [0, 1, 2, 3, 5, 6]
    assert logged("plain/trainer_state.json") == []
    assert (run["n_images"], run["n_classes"]) == (24, 24)
    assert "Predicted and observed: captions (full)" in capsys.readouterr().out


@pytest.mark.parametrize("name", STAND_INS)
def test_the_line_is_all_that_is_added(name, add_guard, tmp_path):
    text = STAND_INS[name].replace("\n", "\r\n") if name == "run_clip.py" else STAND_INS[name]
    (tmp_path / name).write_bytes(text.encode())
    add_guard["main"]([str(tmp_path / name), str(tmp_path / "guarded.py")])
    guarded = (tmp_path / "guarded.py").read_bytes().decode()
    ast.parse(guarded)
    assert added(text, guarded) == [add_guard["LINES"][name]]


def added(before, after):
    """The lines that are new; none may be missing or another."""
    changes = [d for d in difflib.ndiff(before.split("\n"), after.split("\n")) if d[0] != " "]
    assert all(d.startswith("+ ") for d in changes), changes
    return [d[2:].strip() for d in changes]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.fit()", "got 0"),
        ("trainer = Trainer()\ntrainer = Trainer()", "got 2"),
        ("import iimm_callbacks\ntrainer = Trainer()", "has the guard already"),
    ],
)
def test_it_leaves_alone_what_it_does_not_understand(add_guard, text, message):
    with pytest.raises(ValueError, match=message):
        add_guard["add_line"](text, "line")


def test_the_readme_shows_lines_and_hashes_as_they_are(add_guard):
    readme = (FOLDER / "README.md").read_text()
    shown = re.findall(r"^\+ *(from iimm_callbacks .*)$", readme, re.MULTILINE)
    assert shown == list(add_guard["LINES"].values())
    assert all(digest in readme for digest in add_guard["SHA256"].values())


@pytest.mark.skipif("IIMM_OTHERS" not in os.environ, reason="needs IIMM_OTHERS, see README.md")
@pytest.mark.parametrize("name", STAND_INS)
def test_the_script_itself_with_its_line(name, add_guard, place, tmp_path, monkeypatch):
    path = Path(os.environ["IIMM_OTHERS"]) / name
    if not path.exists():
        pytest.skip(f"no {name} in IIMM_OTHERS")
    needs = "torchvision" if name == "run_clip.py" else "sentence_transformers"
    if find_spec(needs) is None:
        pytest.skip(f"{name} needs {needs}")
    text = path.read_text()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == add_guard["SHA256"][name]
    place(*((32, 24) if name == "run_clip.py" else (1000, 400)))
    for offline, here in ADAPTED.get(name, {}).items():
        assert text.count(offline) == 1
        text = text.replace(offline, here)
    guarded = add_guard["add_line"](text, add_guard["LINES"][name])
    assert added(text, guarded) == [add_guard["LINES"][name]]
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(SITECUSTOMIZE if find_spec("torchvision") else "")
    running = []
    for kind, script in (("plain", text), ("guarded", guarded)):
        Path(f"{kind}.py").write_text(script)
        running.append(start(name, kind, tmp_path))
    for process in running:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed[-3000:]
    run = check_pair("guarded", "plain")
    assert len(run["looks"]) >= 2
    assert len(re.findall(r"'eval_iimm': ", printed)) == len(run["looks"])  # as the Trainer logs


# What keeps it from running on a machine without a GPU and MLflow.
ADAPTED = {
    "training_clip_flickr8k_mlflow.py": {
        "    fp16=True,": "    fp16=False,",
        '    report_to=["mlflow"],': "    report_to=[],",
        'output_dir = f"models/{train_model_name}"': "import sys; output_dir = sys.argv[1]",
    }
}
COMMAND = {
    "run_clip.py": (
        "--model_name_or_path model --train_file train.json --validation_file val.json "
        "--max_seq_length 32 --do_train --do_eval --remove_unused_columns False --max_steps 6 "
        "--per_device_train_batch_size 8 --learning_rate 1e-3 --report_to none --use_cpu True "
        "--save_strategy no --logging_steps 2 --output_dir"
    )
}


def start(name, kind, folder):
    paths = [folder / "site", ROOT, ROOT / "tests"]
    return subprocess.Popen(
        [sys.executable, f"{kind}.py", *COMMAND.get(name, "").split(), kind],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
