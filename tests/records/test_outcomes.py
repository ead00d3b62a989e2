"""The record of one run: its signs, and that JSON is one or is refused by the field's name."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iimm_callbacks import Outcome, append_outcome, read_outcomes, sample
from iimm_callbacks.records.audit import doubts
from iimm_callbacks.records.ledger import Ledger
from iimm_callbacks.records.lines import to_line
from iimm_callbacks.records.outcomes import parse_outcome, parse_record
from iimm_callbacks.records.store import check_store

pytestmark = pytest.mark.once

RUN = Outcome(
    model="tiny/clip",
    model_fingerprint="1f",
    method="full",
    task="digits",
    task_fingerprint="2e",
    iimm=0.4,
    inter=0.2,
    intra=0.6,
    standard_error=None,
    n_images=512,
    n_classes=10,
    zero_shot_accuracy=0.3,
    final_accuracy=0.9,
    off_target_before={"emoji": 0.5, "clipart": 0.6, "flags": 0.4},
    off_target_after={"emoji": 0.3, "clipart": 0.7, "flags": 0.39},
    trajectory=[
        {"share": 0.5, "gain": 0.4, "forgetting": 0.02, "worst": 0.1, "worst_se": 0.01},
        {"share": 1.0, "gain": 0.4, "drops": {"emoji": 0.2, "clipart": -0.1, "flags": 0.01}},
    ],
    recipe={"learning_rate": 1e-5, "note": "größer", "betas": [0.9, 0.99], "warmup": None},
    versions={"torch": "2.13"},
    n_train=800,
    linear_probe_accuracy=0.7,
    linear_probe_standard_error=0.02,
    linear_probe_n_train=512,
    images={"final_accuracy": "512 test images"},
)
PUBLISHED = replace(
    RUN, iimm=None, inter=None, intra=None, n_images=None, n_classes=None, source="a paper",
    n_train=None, linear_probe_accuracy=None, linear_probe_standard_error=None,
    linear_probe_n_train=None, images={},
)  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fractions, texts = st.floats(0, 1), st.text(max_size=8)


@st.composite
def outcomes(draw):
    """Any valid record, extremes included."""
    tasks = draw(st.lists(texts, unique=True, max_size=3))
    signed, count = st.none() | st.floats(-1, 1), st.none() | st.integers(0, 2**63 - 1)
    look = st.fixed_dictionaries(
        {"share": fractions, "gain": st.floats(-1, 1)},
        optional={
            "forgetting": st.floats(-1, 1),
            "gain_se": st.floats(0, 9),
            "iimm": st.floats(-1, 1),
            "drops": st.dictionaries(texts, st.floats(-1, 1), max_size=2),
            "training_loss": st.floats(-9, 9),
        },
    )
    value = st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | texts | st.lists(texts)
    return replace(
        RUN,
        model=draw(texts),
        ended=draw(texts),
        source=draw(texts),
        iimm=draw(signed),
        n_images=draw(count),
        zero_shot_accuracy=draw(fractions),
        final_accuracy=draw(fractions),
        off_target_before={task: draw(fractions) for task in tasks},
        off_target_after={task: draw(fractions) for task in tasks},
        trajectory=draw(st.lists(look, max_size=2)),
        complete=draw(st.booleans()),
        recipe=draw(st.dictionaries(texts, value, max_size=3)),
        n_train=draw(count),
        linear_probe_accuracy=draw(st.none() | fractions),
        linear_probe_standard_error=draw(st.none() | st.floats(0, 9)),
        linear_probe_n_train=draw(count),
        images=draw(st.dictionaries(texts, texts, max_size=2)),
    )


def through_json(value):
    return json.loads(json.dumps(value))


def row_with(**changes):
    return asdict(RUN) | changes


def parsed_or_refused(value):
    """The refusal, or None once the record has proved sound."""
    try:
        outcome = parse_outcome(through_json(value))
    except ValueError as error:
        return str(error)
    worst = [] if outcome.worst is None else [outcome.worst, outcome.forgetting]
    assert all(-1 <= v <= 1 for v in [outcome.gain, *worst, *outcome.drops.values()])
    for look in outcome.trajectory:
        numbers = {**look, **look.get("drops", {})}
        numbers.pop("drops", None)
        assert all(math.isfinite(value) for value in numbers.values())
    assert isinstance(outcome.complete, bool)
    written = json.dumps(asdict(outcome), allow_nan=False)
    assert parse_outcome(json.loads(written)) == outcome
    return None


def test_gain_and_forgetting_have_their_signs():
    assert RUN.gain == pytest.approx(0.9 - 0.3)
    assert RUN.drops == pytest.approx({"emoji": 0.2, "clipart": -0.1, "flags": 0.01})
    assert RUN.forgetting == pytest.approx((0.2 - 0.1 + 0.01) / 3)
    assert RUN.worst == pytest.approx(0.2)
    alone = replace(RUN, off_target_before={}, off_target_after={})
    assert (alone.forgetting, alone.worst) == (None, None)


@settings(deadline=None)
@given(outcomes())
def test_any_record_comes_back_from_json_as_it_was(outcome):
    assert parse_outcome(through_json(asdict(outcome))) == outcome


def test_what_was_not_measured_is_none():
    assert parse_outcome(through_json(asdict(PUBLISHED))) == PUBLISHED
    assert PUBLISHED.gain == RUN.gain


def test_what_a_record_without_the_newer_fields_lacks_has_its_default():
    row = asdict(RUN)
    newer = ("n_train", "images", *(n for n in row if n.startswith("linear_probe_")))
    for name in ("source", "versions", *newer):
        del row[name]
    before = {name: getattr(PUBLISHED, name) for name in newer}
    assert parse_outcome(row) == replace(RUN, source="", versions={}, **before)


def test_an_unknown_field_of_a_later_version_is_ignored():
    assert parse_outcome(row_with(colour="blue")) == RUN


@settings(deadline=None)
@given(json_values)
def test_any_json_is_an_outcome_or_a_value_error(value):
    assert parsed_or_refused(value)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([f.name for f in fields(Outcome)]), json_values)
def test_any_value_of_a_field_is_sound_or_refused_by_its_name(name, value):
    refusal = parsed_or_refused(row_with(**{name: value}))
    newer = name == "schema_version" and value not in (1, 2)
    assert refusal is None or f"`{name}" in refusal or (newer and "a newer version" in refusal)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["off_target_before", "off_target_after", "recipe", "versions", "trajectory"]),
    st.sampled_from(["emoji", "share", "gain", "worst", "gain_se", "new"]),
    json_values,
)
def test_any_value_inside_a_field_is_sound_or_refused_by_its_name(name, key, value):
    row = through_json(asdict(RUN))
    inside = row[name][0] if name == "trajectory" else row[name]
    inside[key] = value
    refusal = parsed_or_refused(row)
    assert refusal is None or f"`{name}" in refusal


@pytest.mark.parametrize("name", [f.name for f in fields(Outcome)][:13])
def test_a_missing_field_is_named(name):
    row = asdict(RUN)
    del row[name]
    with pytest.raises(ValueError, match=f"^`{name}` is missing$"):
        parse_outcome(row)


NESTED = []
for _ in range(50):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": 5}, r"`model` must be a string, got 5"),
        ({"source": None}, r"`source` must be a string, got None"),
        ({"task": "\udcff"}, r"`task` must be a string in UTF-8, got '\\udcff'"),
        ({"ended": ["x"]}, r"`ended` must be a string, got list"),
        ({"iimm": "high"}, r"`iimm` must be a number in \[-1, 1\], got 'high'"),
        ({"iimm": True}, r"`iimm` must be a number in \[-1, 1\], got True"),
        ({"inter": math.nan}, r"`inter` must be a number in \[-1, 1\], got nan"),
        ({"intra": 1.5}, r"`intra` must be a number in \[-1, 1\], got 1.5"),
        ({"intra": -(10**400)}, r"`intra` must be .* got a huge number"),
        ({"standard_error": math.inf}, r"`standard_error` must be a finite number from 0, got inf"),
        ({"standard_error": -0.1}, r"`standard_error` must be .* got -0.1"),
        ({"n_images": 512.0}, r"`n_images` must be a whole number from 0, got 512.0"),
        ({"n_images": -1}, r"`n_images` must be a whole number from 0, got -1"),
        ({"n_images": 2**63}, r"`n_images` must be a whole number from 0, got 9223372036854775808"),
        ({"n_classes": True}, r"`n_classes` must be a whole number from 0, got True"),
        ({"final_accuracy": 90.0}, r"`final_accuracy` must be a fraction in \[0, 1\], got 90.0"),
        ({"final_accuracy": None}, r"`final_accuracy` must be a fraction in \[0, 1\], got None"),
        ({"zero_shot_accuracy": -0.1}, r"`zero_shot_accuracy` must be .* got -0.1"),
        ({"off_target_after": {}}, "`off_target_after` hold different tasks"),
        ({"off_target_before": [0.5]}, r"`off_target_before` must be an object, got list"),
        ({"off_target_before": {"emoji": "x"}}, r"`off_target_before\['emoji'\]` must be a frac"),
        ({"trajectory": {}}, r"`trajectory` must be a list, got dict"),
        ({"trajectory": [7]}, r"`trajectory\[0\]` must be an object, got 7"),
        ({"trajectory": [{"gain": 0.1}]}, r"`trajectory\[0\]` lacks `share`"),
        ({"trajectory": [{"share": 0.1}]}, r"`trajectory\[0\]` lacks `gain`"),
        ({"trajectory": [{"share": 2, "gain": 0}]}, r"`trajectory\[0\]\['share'\]` must be a frac"),
        (
            {"trajectory": [{"share": 0.1, "gain": 0, "gain_se": -1}]},
            r"`trajectory\[0\]\['gain_se'\]` must be a finite number from 0, got -1",
        ),
        ({"complete": 1}, r"`complete` must be true or false, got 1"),
        ({"recipe": "fast"}, r"`recipe` must be an object, got 'fast'"),
        ({"recipe": {"rate": math.inf}}, r"`recipe\['rate'\]` must be a JSON value, numbers fin"),
        ({"recipe": {1: "x"}}, r"`recipe, a key` must be a string, got 1"),
        ({"recipe": {"deep": NESTED}}, r"`recipe\['deep'\]` is nested deeper than 16"),
        ({"versions": {"torch": 2}}, r"`versions\['torch'\]` must be a string, got 2"),
        (
            {"trajectory": [{"share": 0.1, "gain": 0, "drops": {"emoji": 2}}]},
            r"`trajectory\[0\]\['drops'\]\['emoji'\]` must be a number in \[-1, 1\], got 2",
        ),
        (
            {"trajectory": [{"share": 0.1, "gain": 0, "iimm": 2}]},
            r"`trajectory\[0\]\['iimm'\]` must be a number in \[-1, 1\], got 2",
        ),
        ({"n_train": 0.5}, r"`n_train` must be a whole number from 0, got 0.5"),
        ({"linear_probe_accuracy": 71.0}, r"`linear_probe_accuracy` must be a fraction .* got 71"),
        ({"linear_probe_standard_error": -1}, r"`linear_probe_standard_error` must be .* got -1"),
        ({"linear_probe_n_train": "all"}, r"`linear_probe_n_train` must be .* got 'all'"),
        ({"images": {"final_accuracy": 300}}, r"`images\['final_accuracy'\]` must be a string"),
    ],
)
def test_a_bad_field_is_refused_with_name_and_value(changes, says):
    with pytest.raises(ValueError, match=says):
        parse_outcome(row_with(**changes))


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2]])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(ValueError, match=f"expected a JSON object, got {type(value).__name__}"):
        parse_outcome(value)


def test_a_newer_schema_asks_for_an_upgrade():
    says = (
        r"^was written by a newer version of iimm_callbacks \(schema 3; this one reads 2\); "
        "upgrade to read it$"
    )
    with pytest.raises(ValueError, match=says):
        parse_outcome({"schema_version": 3, "all": "else may differ"})


def test_a_record_of_schema_1_is_read_and_written_as_it_is():
    """So its hash, by which objects and nameless runs are called, stays what it was."""
    row = row_with(schema_version=1)
    former = parse_outcome(row)
    assert (former.schema_version, former.linear_probe_form) == (1, "probabilities")
    assert json.loads(to_line(former)) == row
    assert RUN.linear_probe_form == "logits"
    assert replace(RUN, linear_probe_accuracy=None).linear_probe_form is None
    assert replace(RUN, source="a paper").linear_probe_form is None
    word = {"retired": "1", "why": "x", "provenance": {"when": "now"}, "schema_version": 1}
    assert json.loads(to_line(parse_record(word))) == word
    (told,) = doubts([former, RUN])
    assert told.startswith("1 of 2 runs have the linear probe in its former form")


def test_of_the_files_that_ship_only_the_second_model_has_the_former_probe():
    study = Path(__file__).parents[2] / "examples" / "study"
    for path, form in (
        (sample.OUTCOMES, "logits"),
        (study / "second_seed.jsonl", "logits"),
        (study / "second_model.jsonl", "probabilities"),
    ):
        assert {o.linear_probe_form for o in read_outcomes(path)} == {form}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"loss": 0.1}, "^not an outcome record: no `schema_version`$"),
        (row_with(schema_version=0), "^not an outcome record: `schema_version` is 0$"),
        (row_with(schema_version="1"), "^not an outcome record: `schema_version` is '1'$"),
        (row_with(schema_version=True), "^not an outcome record: `schema_version` is True$"),
        (row_with(schema_version=2.0), r"^not an outcome record: `schema_version` is 2\.0$"),
    ],
)
def test_another_kind_of_record_is_told_from_a_newer_one(row, says):
    with pytest.raises(ValueError, match=says):
        parse_outcome(row)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nosuch://team", "must be a file, a folder or an address that fsspec knows"),
        (Path("memory://team"), "an address must be given as text"),
        (Path("s3://bucket/runs.jsonl"), "an address must be given as text"),
    ],
)
def test_an_address_never_becomes_a_folder(path, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (read_outcomes, check_store, Ledger, lambda p: append_outcome(p, RUN)):
        with pytest.raises(ValueError, match=told):
            use(path)
    assert not list(tmp_path.iterdir())
