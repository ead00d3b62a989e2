"""The callback in real Trainer runs of a tiny CLIP."""

import json

import pytest
import torch

from iimm_callbacks import IIMMCallback


@pytest.fixture
def guard(colour_task, shape_task):
    def build(**settings):
        settings = {"max_overhead": None, "verbose": False} | settings
        return IIMMCallback(colour_task, settings.pop("off_target", [shape_task]), **settings)

    return build


def rows(trainer):
    return [r for r in trainer.state.log_history if "eval_iimm" in r]


def test_looks_at_the_default_shares_of_the_steps(make_trainer, guard):
    trainer = make_trainer([guard()], max_steps=20)
    trainer.train()
    assert [r["step"] for r in rows(trainer)] == [0, 1, 2, 4, 6, 10, 14, 20]


def test_smoke(make_trainer, guard, capsys):
    g = guard(verbose=True)
    trainer = make_trainer([g], max_steps=20)
    trainer.train()
    print(json.dumps(rows(trainer)[-1], indent=1))
    with capsys.disabled():
        print(capsys.readouterr().out)
