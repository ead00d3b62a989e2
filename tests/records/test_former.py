"""Former names of arguments: each works for one release, and the warning names the new one."""

import pytest

from iimm_callbacks import IIMMCallback, IIMMMonitor, Limits
from iimm_callbacks.records.ledger import Past
from iimm_callbacks.records.verdict import Verdict
from iimm_callbacks.trainer.callback import FORMER


@pytest.mark.parametrize(
    ("given", "advice", "found"),
    [
        ({"limit_on": "worst"}, "Limits(0.05, limit_on=...)", lambda g: g.limits.limit_on),
        ({"confidence": 0.9}, "Limits(0.05, confidence=...)", lambda g: g.limits.confidence),
        ({"on_exceed": "rescue"}, "use `action='rescue'`", lambda g: g.rescues),
        ({"store": "a.jsonl"}, "name the file as `outcomes`", lambda g: g.past.store),
        ({"run_file": "run.json"}, "`iimm_<task>.json`", lambda g: g.run_file),
        ({"method": "mine"}, "recognized from the model", lambda g: g.passed_on["method"]),
    ],
)
def test_a_former_option_of_the_callback_works_and_names_the_new_one(
    colour_task, shape_task, given, advice, found
):
    (name,) = given
    assert name in FORMER
    with pytest.warns(FutureWarning, match=f"`{name}` of `IIMMCallback` will be removed") as told:
        guard = IIMMCallback(colour_task, [shape_task], **given)
    assert advice in str(told[0].message)
    assert found(guard) in (given[name], True)
    assert told[0].filename == __file__


def test_a_former_option_of_the_monitor_works_and_names_the_new_one(colour_task, shape_task):
    with pytest.warns(FutureWarning, match="give the `Limits` as `max_forgetting`"):
        monitor = IIMMMonitor(colour_task, [shape_task], limits=Limits(0.2, "worst"))
    assert monitor.limits == Limits(0.2, "worst")
    with pytest.warns(FutureWarning, match="`progress` of `IIMMMonitor`"):
        assert IIMMMonitor(colour_task, [shape_task], progress=False).verbose is False


@pytest.mark.parametrize("kind", [IIMMCallback, IIMMMonitor])
def test_a_name_that_never_was_is_an_error(kind, colour_task):
    with pytest.raises(TypeError, match=f"{kind.__name__}.* unexpected keyword argument 'limit'"):
        kind(colour_task, [], limit=0.05)


def test_a_number_and_limits_say_the_same(colour_task, shape_task):
    number, limits = (IIMMCallback(colour_task, shape_task, x) for x in (0.1, Limits(0.1)))
    assert number.limits == limits.limits == Limits(0.1)
    assert [task.name for task in number.off_target] == ["shapes"]  # a single task is a list of one
    worst = IIMMCallback(colour_task, shape_task, Limits(0.1, "worst", 0.9))
    assert worst.limits == Limits(0.1, "worst", 0.9)


def test_outcomes_are_the_store_or_a_list_and_no_store(tmp_path):
    assert Past.of("default") == Past(None, "default")
    assert Past.of(tmp_path / "team.jsonl") == Past(None, tmp_path / "team.jsonl")
    assert Past.of([]) == Past([], None)
    assert Past.of(None) == Past([], None)
    assert Past.of([], store="a.jsonl") == Past([], "a.jsonl")
    assert Past.of("default", store=None) == Past(None, None)
    with pytest.raises(TypeError, match="must hold Outcome records"):
        Past.of([Verdict("continue", None, "")])
    with pytest.raises(TypeError, match="must hold Outcome records, got int"):
        Past.of(5)
    with pytest.raises(ValueError, match="`outcomes` must name a store, got ''; None"):
        Past.of("")
