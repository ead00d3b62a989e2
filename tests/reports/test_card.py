"""The model card: numbers for people, a `model-index` for machines, there when it is uploaded."""

import gc
import inspect
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from huggingface_hub import DatasetCard, EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_outcomes import RUN, json_values
from test_report import HOSTILE, make_record
from test_untrusted import change_at
from transformers import Trainer

from iimm_callbacks import IIMMCallback, IIMMMonitor, PromptClassifier
from iimm_callbacks.records.run_file import check_run
from iimm_callbacks.reports.card import HEADING, update_card, update_outcomes_card
from iimm_callbacks.trainer.outlets import amend_cards

TEMPLATES = {"digits": ["the number {}"], "letters": ["the letter {}", "a big {}"]}


def look(step, accuracy, letters, **more):
    return {
        "step": step, "share": step / 10, "level": "warn", "reason": "r",
        "eval_iimm": 0.4, "eval_iimm_inter": 0.3, "eval_iimm_intra": 0.5,
        "eval_iimm_accuracy": accuracy, "eval_iimm_letters_accuracy": letters,
        "eval_iimm_gain_observed": accuracy - 0.5,
        "eval_iimm_forgetting_observed": 0.7 - letters,
        "eval_iimm_forgetting_worst": 0.7 - letters,
        "standard_errors": {"gain": 0.02, "forgetting": 0.01, "worst": 0.01} if step else {},
    } | more  # fmt: skip


def record(**more):
    """Digits from 50 to 80 %, letters from 70 to 64 %."""
    predicted = {"point": 0.2, "low": 0.1, "high": 0.3}
    return {
        "task": "digits", "off_target": ["letters"], "method": "full", "model": "org/base",
        "model_fingerprint": "0f1e", "fingerprints": {"digits": "aa11", "letters": "bb22"},
        "templates": TEMPLATES, "n_images": 300, "n_classes": 10, "ended": "finished",
        "limits": {"max_forgetting": 0.05, "limit_on": "mean", "confidence": 0.8},
        "forecast": {"base_rate": False, "gain": predicted},
        "looks": [look(0, 0.5, 0.7), look(10, 0.8, 0.64)],
    } | more  # fmt: skip


def index(card):
    """(data set, metric's name) -> value, from what machines read."""
    return {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}


def table(text):
    """The section's table as Markdown readers see it: rows of cells."""
    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(text)
    rows, cells = [], []
    for token in tokens:
        if token.type == "inline" and token.level >= 3 and token.map:
            cells.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            rows.append(cells)
            cells = []
        elif token.type == "tr_open":
            cells = []
    return rows


def test_each_task_has_an_entry_with_its_score_after_and_before(tmp_path):
    update_card(tmp_path, record())
    card = ModelCard.load(tmp_path / "README.md")
    score = "zero-shot accuracy, {} fine-tuning on digits"
    assert index(card) == {
        ("digits", score.format("after")): 0.8,
        ("digits", score.format("before")): 0.5,
        ("letters", score.format("after")): 0.64,
        ("letters", score.format("before")): 0.7,
    }
    (model,) = card.data.to_dict()["model-index"]
    assert model["name"] == tmp_path.name
    digits, letters = model["results"]  # one entry a task, although neither is a data set's name
    assert digits["task"]["type"] == "zero-shot-image-classification"
    assert [m["type"] for m in digits["metrics"]] == ["accuracy", "accuracy"]
    assert letters["dataset"]["args"] == {
        "fingerprint": "bb22", "prompts": TEMPLATES["letters"], "n_prompts": 2,
    }  # fmt: skip


def test_the_section_tells_the_numbers_prompts_and_fingerprints_in_points():
    text = update_card(ModelCard("---\n{}\n---\n# Mine\n"), record()).text
    assert f"## {HEADING}" in text
    _, digits, letters = table(text)
    assert digits == ["digits (learnt)", "zero-shot accuracy", "50.0 %", "80.0 %", "+30.0", "aa11"]
    assert letters[2:] == ["70.0 %", "64.0 %", "-6.0", "bb22"]
    assert "Gain: +30.0 ± 2.0 points (standard error); forecast before training +20.0 [+10" in text
    assert "Mean forgetting: +6.0 ± 1.0 points" in text
    assert '- letters: "the letter {}"; "a big {}"' in text
    assert "org/base, fingerprint 0f1e" in text


def test_borrowed_forecasts_stand_there_and_other_metrics_have_their_name():
    shown = record(
        forecast={"base_rate": True, "gain": {"point": 0.2, "low": 0, "high": 1}},
        metrics={"letters": "recall@5"},
    )
    card = update_card(ModelCard("---\n{}\n---\n"), shown)
    assert "forecast before training +20.0 [+0.0, +100.0]" in card.text
    assert ("letters", "recall@5, after fine-tuning on digits") in index(card)
    assert {r.metric_type for r in card.data.eval_results} == {"accuracy", "recall_5"}


def test_writing_again_replaces_what_is_ours_and_touches_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task:\n"
        "      type: image-classification\n    dataset:\n      name: Food\n      type: food101\n"
        "    metrics:\n    - type: accuracy\n      value: 0.9\n---\n\n# Mine\n\nWords.\n",
        encoding="utf-8",
    )
    update_card(path, record(looks=[look(0, 0.5, 0.7), look(3, 0.6, 0.7)]))
    first = path.read_text(encoding="utf-8")
    path.write_text(f"{first}\nWords below.\n", encoding="utf-8")
    update_card(path, record())
    update_card(path, record())
    card = ModelCard.load(path)
    assert card.text.count(HEADING) == 1
    assert card.text.startswith("\n# Mine\n\nWords.\n")
    assert card.text.endswith("end -->\n\nWords below.\n")
    assert "60.0 %" not in card.text
    assert (card.data.license, card.data.model_name) == ("mit", "mine")
    found = index(card)
    assert len(found) == 5
    assert found["Food", None] == 0.9
    assert found["digits", "zero-shot accuracy, after fine-tuning on digits"] == 0.8


def test_the_runs_on_two_tasks_each_have_a_section(tmp_path):
    update_card(tmp_path, record())
    other = record(task="letters", off_target=[], looks=[look(0, 0.7, 0.7), look(10, 0.9, 0.9)])
    card = update_card(tmp_path, other)
    assert card.text.count(HEADING) == 2
    assert len(index(card)) == 6
    assert update_card(tmp_path, other).text == card.text


def test_a_score_of_another_kind_on_a_data_set_of_the_same_name_stays():
    theirs = EvalResult("zero-shot-image-classification", "digits", "Digits", "accuracy", 0.1)
    card = ModelCard("---\n{}\n---\n")
    card.data.model_name, card.data.eval_results = "mine", [theirs]
    update_card(card, record())
    again = ModelCard(str(update_card(card, record())))
    assert sorted(index(again).values()) == [0.1, 0.5, 0.64, 0.7, 0.8]


HOSTILE_MARKDOWN = "a|b <script>x</script> ![i](http://x) `c` [l](j) **d** --> :bomb: @me"


@pytest.mark.parametrize("name", [HOSTILE, HOSTILE_MARKDOWN, "a\nb: c\n---\nx"])
def test_names_and_prompts_are_shown_as_they_are_written(tmp_path, name):
    row = look(10, 0.8, 0.64) | {f"eval_iimm_{name}_accuracy": 0.6}
    hostile = record(
        task=name, off_target=[name + "2"], model=name, method=name, ended=name,
        fingerprints={name: "aa11"}, templates={name: [f"{name} {{}}"]},
        looks=[row | {f"eval_iimm_{name}2_accuracy": 0.6}],
    )  # fmt: skip
    update_card(tmp_path, hostile)
    card = update_card(tmp_path, hostile)
    assert card.text.count(HEADING) == 1
    assert all(len(row) == 6 for row in table(card.text))
    assert len(table(card.text)) == 3
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    for tag in ("<script", "<img", "<a ", "<strong", "<code"):
        assert tag not in html
    assert "\x1b" not in Path(tmp_path / "README.md").read_text(encoding="utf-8")
    again = ModelCard.load(tmp_path / "README.md")
    assert len(again.data.eval_results) == 4
    assert set(again.data.to_dict()) == {"model-index"}


def test_a_folder_that_is_not_there_is_made(tmp_path):
    update_card(tmp_path / "runs" / "new-model.v2", record())
    assert ModelCard.load(tmp_path / "runs" / "new-model.v2" / "README.md").data.model_name == (
        "new-model.v2"
    )
    update_card(tmp_path / "card.md", record())
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "card.md"}


CHANGES = [(key,) for key in ("templates", "metrics", "fingerprints", "model", "model_fingerprint")]
CHANGES += [("looks", 1, key) for key in ("standard_errors", "time")]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CHANGES), st.sampled_from([None, 5, "x", [], {}, {"digits": 1}]) | json_values
)
def test_any_record_that_can_be_read_has_a_card(place, value):
    changed = make_record()
    change_at(changed, place, value)
    try:
        changed = check_run(changed)
    except ValueError:
        return
    assert HEADING in str(update_card(ModelCard("---\n{}\n---\n"), changed))


def test_a_record_without_prompts_metrics_and_fingerprints_has_a_card():
    bare = record()
    for key in ("templates", "fingerprints"):
        del bare[key]
    text = update_card(ModelCard("---\n{}\n---\n"), bare).text
    assert "- letters: not saved" in text
    assert table(text)[1] == [*table(text)[1][:5], "none"]


def test_a_card_that_cannot_be_parsed_is_left_as_it_was(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nmodel-index:\n- name: x\n  results: [1]\n---\n# Mine\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="model_index"):
        update_card(tmp_path, record())
    assert path.read_bytes() == before


def test_a_run_that_has_not_begun_has_nothing_to_put_on_a_card(tmp_path, colour_task):
    monitor = IIMMMonitor(colour_task, [], outcomes=None)
    with pytest.raises(ValueError, match="got none"):
        update_card(tmp_path, monitor.record())
    assert list(tmp_path.iterdir()) == []


def test_a_loop_of_ones_own_puts_its_run_beside_the_saved_model(
    tmp_path, tiny_clip, processor, colour_task, shape_task
):
    model = tiny_clip()
    monitor = IIMMMonitor(
        colour_task, [shape_task], outcomes=None, processor=processor, verbose=False
    )
    monitor.begin(model, recipe={"steps": 1})
    monitor.check(model, 1, 1)
    monitor.end(model)
    model.save_pretrained(tmp_path)
    templates = {task.name: task.templates for task in (colour_task, shape_task)}
    card = update_card(tmp_path, monitor.record(), templates=templates)
    row = monitor.row()
    assert sorted(index(card).values()) == sorted(
        2 * [row["eval_iimm_accuracy"], row["eval_iimm_shapes_accuracy"]]
    )
    assert '- shapes: "a {}"' in card.text


def rescued(alpha, applied=True):
    held = {"accuracy": 0.7, "gain": 0.2, "forgetting": 0.01, "worst": 0.02}
    return record(rescue={"alpha": alpha, "applied": applied, "held_out": held})


def test_a_rescued_model_is_not_credited_with_what_the_fine_tuned_one_scored():
    card = update_card(ModelCard("---\n{}\n---\n"), rescued(0.4))
    score = "zero-shot accuracy, {} fine-tuning on digits"
    assert index(card) == {
        ("digits", score.format("after")): 0.7,  # of images that had no part in the choice
        ("digits", score.format("before")): 0.5,
        ("letters", score.format("before")): 0.7,
    }
    assert table(card.text)[2][2:5] == ["70.0 %", "not measured", ""]
    assert "mix** of 0.4 fine-tuned and 0.6 untouched" in card.text
    assert "gain +20.0, mean forgetting +1.0, worst +2.0 points" in card.text


@pytest.mark.parametrize("not_mixed", [rescued(1.0), rescued(0.4, applied=False)])
def test_a_rescue_that_left_the_fine_tuned_model_changes_nothing(not_mixed):
    card = update_card(ModelCard("---\n{}\n---\n"), not_mixed)
    assert str(card) == str(update_card(ModelCard("---\n{}\n---\n"), record()))


# --- what the Trainer writes and uploads ---


@pytest.fixture
def uploads(monkeypatch):
    """Folder -> the cards in it at the moment of each upload; nothing leaves the machine."""
    found = []

    class Api:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, folder_path, path_in_repo="", **_):
            card = Path(folder_path) / "README.md"
            if not path_in_repo:
                found.append(card.read_text(encoding="utf-8") if card.exists() else "")
            return type("Done", (), {"is_done": lambda self: True, "done": lambda self: True})()

    api = Api()
    if hasattr(transformers.trainer, "hf_api"):  # transformers 5
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    else:
        monkeypatch.setattr(transformers.trainer, "create_repo", api.create_repo)
        monkeypatch.setattr(transformers.trainer, "upload_folder", api.upload_folder)
    return found


@pytest.fixture
def guard(colour_task, shape_task):
    return IIMMCallback(
        colour_task, [shape_task], outcomes=None, verbose=False, max_overhead=None, every=2
    )


def shows(text, guard):
    """Whether a card has the run of this guard as it is now."""
    card = ModelCard(text)
    row = guard.monitor.row()
    after = {k[0]: v for k, v in index(card).items() if ", after " in k[1]}
    expected = {"colours": row["eval_iimm_accuracy"], "shapes": row["eval_iimm_shapes_accuracy"]}
    return card.text.count(HEADING) == 1 and after == expected


def test_what_push_to_hub_uploads_has_the_run(make_trainer, guard, uploads):
    trainer = make_trainer([guard])
    trainer.train()
    assert not (Path(trainer.args.output_dir) / "README.md").exists()  # nobody asked for one
    trainer.push_to_hub()
    trainer.push_to_hub(tags=["mine"])
    assert len(uploads) == 2
    assert all(shows(text, guard) for text in uploads)
    assert "### Training hyperparameters" in uploads[1]
    assert "mine" in ModelCard(uploads[1]).data.tags
    assert '- shapes: "a {}"' in uploads[1]


def test_checkpoints_are_pushed_with_what_is_known_by_then(make_trainer, guard, uploads):
    settings = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps"}
    trainer = make_trainer([guard], save_steps=4, hub_model_id="me/x", **settings)
    trainer.train()
    steps = [4, 8, 10]
    assert [f"measured at step {step})" in text for step, text in zip(steps, uploads, strict=True)]
    assert all(text.count(HEADING) == 1 for text in uploads)
    assert shows((Path(trainer.args.output_dir) / "README.md").read_text(), guard)


def test_a_second_run_and_a_resumed_one_replace_the_section(make_trainer, guard, tmp_path):
    trainer = make_trainer([guard], save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.create_model_card()
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    trainer.create_model_card()
    assert shows((tmp_path / "out" / "README.md").read_text(), guard)


def test_a_callback_that_serves_two_trainers_writes_each_its_own_run(make_trainer, guard, tmp_path):
    first = make_trainer([guard], output_dir=str(tmp_path / "one"))
    first.train()
    first.create_model_card()
    card = (tmp_path / "one" / "README.md").read_text()
    second = make_trainer([guard], output_dir=str(tmp_path / "two"), max_steps=3)
    second.train()
    first.create_model_card()
    assert (tmp_path / "one" / "README.md").read_text() == card


class Derived(IIMMCallback):
    pass


@pytest.mark.parametrize("kind", [IIMMCallback, Derived])
def test_two_guards_of_one_trainer_are_refused_before_training(
    make_trainer, guard, shape_task, kind
):
    other = kind(shape_task, [], outcomes=None, verbose=False, max_forgetting=None)
    with pytest.raises(ValueError, match="one IIMMCallback, got 2: they log under the same keys"):
        make_trainer([guard, other]).train()


def test_without_card_the_trainers_stays_as_it_is(make_trainer, colour_task, tmp_path):
    off = IIMMCallback(
        colour_task, [], outcomes=None, verbose=False, max_forgetting=None, card=False
    )
    model = make_trainer().model.dual_encoder
    trainer = make_trainer([off], model=model)
    trainer.train()
    assert "create_model_card" not in vars(trainer)


def test_a_card_that_cannot_be_amended_warns_and_is_pushed_all_the_same(
    make_trainer, guard, uploads, caplog, monkeypatch
):
    trainer = make_trainer([guard])
    trainer.train()
    monkeypatch.setattr(ModelCard, "save", lambda *_: 1 / 0)
    trainer.push_to_hub()
    assert len(uploads) == 1
    assert "the model card raised ZeroDivisionError" in caplog.text


def test_a_trainer_with_a_card_of_its_own_is_amended_after_it(make_trainer):
    calls = []

    class Own(Trainer):
        def create_model_card(self, name):
            calls.append(name)
            return name

    trainer = make_trainer()
    trainer.__class__ = Own
    amend_cards(trainer, "a", lambda path: calls.append("old"))
    amend_cards(trainer, "a", calls.append)
    assert trainer.create_model_card("x") == "x"
    assert calls == ["x", Path(trainer.args.output_dir) / "README.md"]
    assert list(inspect.signature(trainer.create_model_card).parameters) == ["name"]


def test_other_processes_amend_nothing(make_trainer, monkeypatch):
    trainer = make_trainer()
    amend_cards(trainer, "a", lambda path: pytest.fail("not the first process"))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()


def test_the_card_names_the_base_and_the_trainer_leaves_the_models_config(make_trainer):
    trainer = make_trainer(label_smoothing_factor=0.1)
    assert isinstance(trainer.model, PromptClassifier)
    config = trainer.model.dual_encoder.config
    before = config.to_dict()
    trainer.train()
    assert config.to_dict() == before
    amend_cards(trainer, "a", lambda path: None)
    trainer.model.config._name_or_path = "org/base"
    trainer.create_model_card()
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.base_model == "org/base"


def test_amending_keeps_no_trainer_alive(make_trainer):
    trainer = make_trainer()
    amend_cards(trainer, "a", lambda path: None)
    cards = trainer.create_model_card
    known = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert known() is None
    assert cards is not None


def test_a_prompt_list_too_long_for_metadata_is_whole_in_the_section():
    many = [f"picture {i} of a {{}}" for i in range(80)]
    card = update_card(ModelCard("---\n{}\n---\n"), record(), templates={"digits": many})
    about = card.data.eval_results[0].dataset_args
    assert (len(about["prompts"]), about["n_prompts"]) == (8, 80)
    assert all(template in card.text for template in many)
    assert "- letters: not saved" in card.text


def test_a_data_sets_card_counts_its_runs_and_is_written_again_in_its_place():
    hostile = replace(RUN, model="<b>a</b>|b", method="lora")
    runs = [RUN, replace(RUN, run="2", task="other", complete=False), hostile]
    card = DatasetCard("---\nlicense: mit\ntags:\n- mine\n---\n# Ours\n\nBy hand.\n")
    update_outcomes_card(card, runs[:1], "us/runs", "cc0-1.0")
    update_outcomes_card(card, runs, "us/runs")
    assert card.text.count("## Fine-tuning runs") == 1
    assert "By hand." in card.text
    assert "3 runs of 1 models, 2 complete." in card.text
    assert f"| {RUN.method} | 2 | 2 |" in card.text
    assert r"\<b\>a\</b\>\|b" in card.text
    again = DatasetCard(card.content)
    assert again.data.to_dict()["license"] == "cc0-1.0"
    assert set(again.data.tags) == {"mine", "iimm", "fine-tuning"}


def test_models_without_a_fingerprint_are_counted_by_name():
    card = DatasetCard("---\n{}\n---\n")
    runs = [replace(RUN, model=name, model_fingerprint="") for name in "abca"]
    update_outcomes_card(card, runs, "us/runs")
    assert "4 runs of 3 models, 4 complete." in card.text


def test_a_data_sets_card_stays_short():
    card = DatasetCard("---\n{}\n---\n")
    update_outcomes_card(card, [replace(RUN, method=f"m{i}") for i in range(130)], "us/runs")
    assert "| and 30 more |" in card.text
    assert len(card.text.splitlines()) < 115
