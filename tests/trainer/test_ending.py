"""What the callback was asked to do at a run's end: rescue it, report it."""

import pytest
import torch

from iimm_callbacks import IIMMCallback
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.monitor import measured as monitor
from iimm_callbacks.records.catalog import Listed
from iimm_callbacks.records.run_file import read_run


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        return IIMMCallback(
            colour_task, [shape_task], max_forgetting=0.01, outcomes=None, verbose=False, **settings
        )

    return build


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_over_its_limit_is_rescued_also_when_resumed(
    monkeypatch, make_trainer, tiny_clip, guard, tmp_path, method
):
    monkeypatch.setattr(monitor, "is_exceeded", lambda *_: True)
    settings = {"max_steps": 20, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 10}
    callback = guard(action="rescue")
    trainer = make_trainer([callback], model=prepare(tiny_clip(), method), **settings)
    trainer.train()
    record = read_run(tmp_path / "out" / "iimm_colours.json")
    last = record["looks"][-1]
    assert record["rescue"]["mixes"][-1]["gain"] == pytest.approx(last["eval_iimm_gain_observed"])
    assert record["rescue"]["mixes"][0]["gain"] == 0
    assert callback.outcome.final_accuracy == last["eval_iimm_accuracy"]  # of what was trained
    again = make_trainer([guard(action="rescue")], model=prepare(tiny_clip(), method), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10"))
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluated_after_a_rescue_the_model_is_not_given_the_numbers_of_another(
    monkeypatch, make_trainer, guard
):
    monkeypatch.setattr(monitor, "is_exceeded", lambda *_: True)
    for alpha, shown in ((0.5, False), (1.0, True)):
        monkeypatch.setattr("iimm_callbacks.rescue.sweep.choose", lambda *_, a=alpha: (a, "so"))
        trainer = make_trainer([guard(action="rescue")], max_steps=4, metric_for_best_model="iimm")
        trainer.train()
        assert ("eval_iimm" in trainer.evaluate()) == shown


def test_a_run_within_its_limit_is_left_as_trained(make_trainer, guard, monkeypatch):
    monkeypatch.setattr(monitor, "is_exceeded", lambda *_: False)
    plain, guarded = make_trainer([]), make_trainer([guard(action="rescue")])
    for trainer in (plain, guarded):
        trainer.train()
    for one, other in zip(plain.model.parameters(), guarded.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failing_rescue_warns_and_leaves_the_model_as_trained(
    make_trainer, guard, monkeypatch, caplog
):
    monkeypatch.setattr(monitor, "is_exceeded", lambda *_: True)
    monkeypatch.setattr("iimm_callbacks.rescue.sweep.choose", lambda *_: 1 / 0)
    plain, guarded = make_trainer([]), make_trainer([guard(action="rescue")])
    for trainer in (plain, guarded):
        trainer.train()
    assert caplog.text.count("The model could not be rescued and is as trained") == 1
    for one, other in zip(plain.model.parameters(), guarded.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rescue_needs_a_limit(colour_task):
    with pytest.raises(ValueError, match="a limit to keep to, got no `off_target` task"):
        IIMMCallback(colour_task, [], action="rescue")
    with pytest.raises(TypeError, match="got 'retry'"):
        IIMMCallback(colour_task, action="retry")


def test_the_report_is_written_at_the_end_if_asked_for(make_trainer, guard, tmp_path):
    make_trainer([guard(report=True)], max_steps=4).train()
    page = (tmp_path / "out" / "iimm_colours_report" / "report.html").read_text()
    assert "<title>" in page
    assert "colours" in page
    assert not list(tmp_path.glob("b*/iimm_colours_report"))


def test_a_report_that_fails_costs_a_warning(make_trainer, guard, monkeypatch, caplog):
    monkeypatch.setattr("iimm_callbacks.reports.page.write_report", lambda *_: 1 / 0)
    callback = guard(report=True)
    make_trainer([callback], max_steps=4).train()
    assert callback.outcome.complete
    assert caplog.text.count("the report raised ZeroDivisionError") == 1


@pytest.mark.parametrize("fails", ["select", "read"])
def test_saved_runs_that_cannot_be_read_for_the_report_cost_a_warning(
    make_trainer, guard, monkeypatch, caplog, fails
):
    def changed(*_, **__):
        raise OSError("it has changed while it was read")

    callback = guard(report=True)
    monkeypatch.setattr(Listed, fails, changed)
    make_trainer([callback], max_steps=4).train()
    assert callback.outcome.complete
    assert caplog.text.count("the report raised OSError: it has changed") == 1
