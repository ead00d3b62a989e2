"""IIMM as a measurement of `evaluate`: loaded from its folder, used as a class, and its page."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import iimm_callbacks
from iimm_callbacks import iimm, linear_probe
from iimm_callbacks.measures import measurement

pytest.importorskip("evaluate")
import evaluate

from iimm_callbacks.measures.measurement import FOLDER, IIMM
from iimm_callbacks.measures.measurement.iimm import app
from iimm_callbacks.measures.measurement.iimm.tests import test_cases as cases

G = torch.Generator().manual_seed(0)
IMAGES, TEXTS = torch.randn(90, 16, generator=G), torch.randn(5, 16, generator=G)
LABELS = torch.arange(90) % 5
EXPECTED = vars(iimm(IMAGES, TEXTS, LABELS))


@pytest.fixture(params=["loaded", "loaded in memory", "direct", "direct in memory"])
def measure(request, tmp_path):
    memory = {"keep_in_memory": "memory" in request.param, "cache_dir": str(tmp_path)}
    if "loaded" in request.param:
        return evaluate.load(str(FOLDER), **memory)
    return IIMM(**memory)


@pytest.mark.parametrize("case", cases, ids=["classes", "captions"])
def test_the_spaces_own_cases_hold(measure, case):
    inputs = {name: value for name, value in case.items() if name != "result"}
    found = measure.compute(**inputs)
    assert {name: found[name] for name in case["result"]} == pytest.approx(case["result"], abs=1e-6)


def test_it_gives_what_iimm_gives(measure):
    found = measure.compute(image_embeds=IMAGES, labels=LABELS, text_embeds=TEXTS)
    assert found == EXPECTED
    assert {name: type(value) for name, value in found.items()} == {
        "iimm": float, "inter": float, "intra": float, "standard_error": float,
        "n_images": int, "n_classes": int,
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    assert (measure.name, measure.module_type) == ("iimm", "measurement")


def test_with_a_logit_scale_it_gives_the_linear_probe_too(measure):
    probe = linear_probe(IMAGES, TEXTS, LABELS, logit_scale=20.0)
    measure.add_batch(image_embeds=IMAGES, labels=LABELS)
    found = measure.compute(text_embeds=TEXTS, logit_scale=20.0)
    assert found == EXPECTED | {
        "linear_probe_accuracy": probe.accuracy,
        "linear_probe_standard_error": probe.standard_error,
    }


def test_captions_have_no_linear_probe(measure):
    with pytest.raises(ValueError, match="captions have no classes"):
        measure.compute(
            image_embeds=IMAGES[:5], labels=range(5), text_embeds=TEXTS, logit_scale=20.0
        )


def test_batches_and_single_images_add_up(measure):
    for rows in torch.arange(80).split(32):
        measure.add_batch(image_embeds=IMAGES[rows], labels=LABELS[rows])
    for row in range(80, 90):
        measure.add(image_embeds=IMAGES[row].tolist(), labels=int(LABELS[row]))
    assert measure.compute(text_embeds=TEXTS) == EXPECTED
    again = measure.compute(image_embeds=IMAGES, labels=LABELS, text_embeds=TEXTS)
    assert again == EXPECTED  # nothing was left over


@pytest.mark.parametrize("form", ["numpy", "float64", "half", "lists"])
def test_arrays_and_lists_of_any_float_dtype_do(form):
    convert = {
        "numpy": lambda t: t.numpy(),
        "float64": lambda t: t.double().numpy() if t.is_floating_point() else t.numpy(),
        "half": lambda t: t.half().numpy() if t.is_floating_point() else t.numpy(),
        "lists": lambda t: t.tolist(),
    }[form]
    inputs = {"image_embeds": IMAGES, "labels": LABELS, "text_embeds": TEXTS}
    found = IIMM(keep_in_memory=True).compute(**{k: convert(v) for k, v in inputs.items()})
    assert found == pytest.approx(EXPECTED, abs=1e-3 if form == "half" else 1e-7)


def test_it_combines_with_other_measurements():
    both = evaluate.combine({n: IIMM(keep_in_memory=True) for n in ("a", "b")}, force_prefix=True)
    found = both.compute(image_embeds=IMAGES, labels=LABELS, text_embeds=TEXTS)
    assert found == {f"{n}_{key}": value for n in ("a", "b") for key, value in EXPECTED.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_embeds": None}, "`text_embeds` must be given to `compute`"),
        (
            {"text_embeds": [[1.0], [1.0, 0.0]]},
            "`text_embeds` must all be of one width, got widths",
        ),
        ({"text_embeds": [[1.0, 0.0], 1.0]}, "`text_embeds` must be a matrix with one embedding"),
        ({"labels": None}, "`labels` must be given: [n], the class of each image"),
        ({"image_embeds": None}, "`image_embeds` must be given: [n, D]"),
        ({"image_embeds": IMAGES[0]}, "`image_embeds` must be a matrix with one embedding per row"),
        ({"image_embeds": None, "labels": None}, "must be given to `compute`, or before it to"),
        ({"text_embeds": TEXTS[:1]}, "at least 2 classes, got 1"),
        ({"text_embeds": TEXTS[:, :8]}, "the same width, got 16 and 8"),
        ({"labels": LABELS + 5}, "must lie in [0, 5) for 5 class texts, got 9"),
        ({"labels": LABELS[:3]}, "number of image_embeds (90) and labels (3)"),
        ({"image_embeds": [[1.0], [1.0, 0.0]], "labels": [0, 1]}, "got widths [1, 2]"),
        ({"image_embeds": 0 * IMAGES}, "must be finite and non-zero, row 0"),
    ],
)
def test_what_does_not_suit_is_told(change, says):
    inputs = {"image_embeds": IMAGES, "labels": LABELS, "text_embeds": TEXTS} | change
    with pytest.raises(ValueError, match=re.escape(says)):
        IIMM(keep_in_memory=True).compute(**inputs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [0, 1.9, 1]}, "must be integers, one per image, got 1.9 (float) at 1"),
        ({"labels": ["0", "1", "1"]}, "must be integers, one per image, got '0' (str) at 0"),
        ({"labels": [0, None, 1]}, "must be integers, one per image, got None (NoneType) at 1"),
        ({"labels": [0, True, 1]}, "must be integers, one per image, got True (bool) at 1"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "must be integers, one per image, got 0.0 (fl"),
        ({"labels": np.array(["0", "1", "1"])}, "must be integers, one per image, got '0' (str)"),
        ({"labels": "011"}, "`labels` must be a list of integers, one per image, got '011'"),
        ({"labels": 1}, "`labels` must be a list of integers, one per image, got 1"),
        ({"image_embeds": [["1", "0"]] * 3}, "`image_embeds` must be rows of numbers, got <U1"),
        ({"text_embeds": [["1", "0"]] * 3}, "`text_embeds` must be rows of numbers, got <U1"),
        ({"text_embeds": 5}, "`text_embeds` must be a matrix with one embedding per row, got 5"),
    ],
)
def test_what_is_of_another_type_is_told_and_not_converted(measure, change, says):
    inputs = {"image_embeds": IMAGES[:3], "labels": [0, 1, 1], "text_embeds": TEXTS}
    with pytest.raises(TypeError, match=re.escape(says)):
        measure.compute(**inputs | change)
    if "text_embeds" not in change:
        batch = {name: value for name, value in (inputs | change).items() if name != "text_embeds"}
        with pytest.raises(TypeError, match=re.escape(says)):
            measure.add_batch(**batch)
    assert measure.compute(**inputs) == vars(iimm(IMAGES[:3], TEXTS, [0, 1, 1]))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ({"image_embeds": [1.0, 0.0], "labels": 1.9}, "`labels` must be integers"),
        ({"image_embeds": [1.0, 0.0]}, "`labels` must be given"),
        ({"labels": 1}, "`image_embeds` must be given"),
        ({"image_embeds": 1.0, "labels": 1}, "must be a matrix with one embedding per row, got sh"),
    ],
)
def test_single_images_are_held_to_the_same(measure, image, says):
    with pytest.raises((TypeError, ValueError), match=says):
        measure.add(**image)


@pytest.mark.parametrize("text_embeds", [None, [[1.0], [1.0, 0.0]], TEXTS[:1], 0 * TEXTS])
def test_bad_texts_leave_the_batches_for_another_try(measure, text_embeds):
    measure.add_batch(image_embeds=IMAGES, labels=LABELS)
    with pytest.raises(ValueError, match="`text_embeds` must"):
        measure.compute(text_embeds=text_embeds)
    assert measure.compute(text_embeds=TEXTS) == EXPECTED
    with pytest.raises(ValueError, match="`image_embeds` and `labels` must be given to `compute`"):
        measure.compute(text_embeds=TEXTS)


def test_an_empty_batch_adds_nothing(measure):
    measure.add_batch(image_embeds=[], labels=[])
    measure.add_batch(image_embeds=IMAGES, labels=LABELS)
    measure.add_batch(image_embeds=IMAGES[:0], labels=LABELS[:0])
    assert measure.compute(text_embeds=TEXTS) == EXPECTED


@pytest.mark.parametrize("form", [torch.Tensor.bfloat16, torch.Tensor.tolist, list])
def test_rows_and_labels_may_come_in_any_container(form):
    found = IIMM(keep_in_memory=True).compute(
        image_embeds=form(IMAGES), labels=list(LABELS), text_embeds=form(TEXTS)
    )
    assert found == pytest.approx(EXPECTED, abs=2e-2)


# The Space


def test_the_page_measures_a_file(tmp_path):
    arrays = {
        "image_embeds": IMAGES.numpy(),
        "labels": LABELS.numpy(),
        "text_embeds": TEXTS.numpy(),
    }

    def measure(arrays):
        save_file(arrays, tmp_path / "embeds.safetensors")
        return app.measure(str(tmp_path / "embeds.safetensors"))

    assert measure(arrays) == EXPECTED
    two = {name: value[:2].copy() for name, value in arrays.items()}
    assert measure(two)["standard_error"] is None  # JSON has no NaN
    with pytest.raises(ValueError, match="got no image_embeds"):
        measure({"labels": LABELS.numpy()})
    (tmp_path / "else.safetensors").write_bytes(b"PK\x03\x04 no such file")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        app.measure(str(tmp_path / "else.safetensors"))


def test_the_card_opens_as_a_spaces_does_and_its_example_gives_its_numbers():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---", 2)
    for line in ("title: IIMM", "sdk: gradio", "app_file: app.py", "- evaluate", "- measurement"):
        assert line in front.splitlines()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    call = re.search(r"iimm\.compute\(.*\)", code, re.DOTALL)[0]
    found = eval(call, {"iimm": IIMM(keep_in_memory=True)})
    said = re.search(r"`inter` is ([\d.]+), `intra` ([\d.]+), `iimm` ([\d.]+)\.", text).groups()
    assert [round(found[name], 3) for name in ("inter", "intra", "iimm")] == list(map(float, said))
    for key in found:
        assert f"`{key}`" in text


def test_the_space_asks_for_what_it_imports():
    wanted = (FOLDER / "requirements.txt").read_text().split()
    assert [re.split(r"[<>=]", line)[0] for line in wanted] == ["iimm_callbacks", "evaluate"]
    assert hasattr(iimm_callbacks, "iimm")


def test_without_evaluate_it_says_what_to_install(monkeypatch):
    for name in [
        n for n in sys.modules if n.startswith("iimm_callbacks.measures.measurement.iimm")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert importlib.reload(measurement).FOLDER.is_dir()  # it alone does not import evaluate
    with pytest.raises(ImportError, match=r"pip install iimm_callbacks\[evaluate\]"):
        _ = measurement.IIMM
    with pytest.raises(AttributeError, match="no attribute 'Iimm'"):
        _ = measurement.Iimm
