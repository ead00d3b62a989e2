"""The published fine-tunes of CLIP: whole, in range, and with the means known of them."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from iimm_callbacks.records.outcomes import parse_outcome
from iimm_callbacks.sample import load_base_rates

pytestmark = pytest.mark.once

B32 = "openai/clip-vit-base-patch32"
B16 = "openai/clip-vit-base-patch16"
L14 = "openai/clip-vit-large-patch14"
EIGHT = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]


@pytest.fixture(scope="module")
def base_rates():
    return load_base_rates()


def of(outcomes, model, method):
    return [o for o in outcomes if (o.model, o.method) == (model, method)]


def r_squared(x, y):
    return np.corrcoef(x, y)[0, 1] ** 2


@pytest.mark.parametrize(
    ("model", "method", "tasks"),
    [(B32, "full", 20), (B16, "full", 20), (L14, "full", 20), (B16, "lora", 8), (B16, "l_lora", 8)],
)
def test_eight_tasks_were_tested_crosswise_and_the_others_alone(base_rates, model, method, tasks):
    runs = of(base_rates, model, method)
    assert [o.task for o in runs[:8]] == EIGHT
    assert len({o.task for o in runs}) == len(runs) == tasks
    for run in runs[:8]:
        assert list(run.off_target_before) == [task for task in EIGHT if task != run.task]
    assert all(o.forgetting is None for o in runs[8:])
    assert len(base_rates) == 20 + 20 + 20 + 8 + 8


def test_a_cell_is_where_it_was_published(base_rates):
    svhn = of(base_rates, B32, "full")[EIGHT.index("svhn")]
    assert (svhn.zero_shot_accuracy, svhn.final_accuracy) == (0.316, 0.973)
    assert (svhn.off_target_before["mnist"], svhn.off_target_after["mnist"]) == (0.483, 0.818)
    pcam = of(base_rates, L14, "full")[9]
    assert (pcam.task, pcam.zero_shot_accuracy, pcam.final_accuracy) == ("pcam", 0.5121, 0.9113)


def test_b16_takes_its_missing_zero_shot_row_from_the_table_of_20_tasks(base_rates):
    for method in ("full", "lora", "l_lora"):
        sun, cars = of(base_rates, B16, method)[:2]
        assert (sun.zero_shot_accuracy, cars.zero_shot_accuracy) == (0.6554, 0.6468)
        assert sun.off_target_before["stanford-cars"] == 0.6468


# Means in points as ../shared/SCIENCE.md, section 3, has them: gain, off-target change, worst cell.
@pytest.mark.parametrize(
    ("model", "method", "gain", "change", "worst"),
    [
        (B32, "full", 42.1, -11.8, -41.8),
        (B16, "full", 37.0, -7.3, -41.1),
        (L14, "full", 29.7, -8.7, -39.3),
        (B16, "lora", 29.6, 0.8, -25.5),
    ],
)
def test_known_means_are_reproduced(base_rates, model, method, gain, change, worst):
    runs = of(base_rates, model, method)[:8]
    assert 100 * np.mean([o.gain for o in runs]) == pytest.approx(gain, abs=0.051)
    assert -100 * np.mean([o.forgetting for o in runs]) == pytest.approx(change, abs=0.051)
    assert -100 * max(o.worst for o in runs) == pytest.approx(worst, abs=0.051)


@pytest.mark.parametrize(
    ("model", "raw", "over_error"), [(B32, 0.87, 0.41), (B16, 0.88, 0.35), (L14, 0.92, 0.28)]
)
def test_zero_shot_error_explains_raw_gain_but_not_gain_over_it(base_rates, model, raw, over_error):
    runs = of(base_rates, model, "full")
    error = np.array([1 - o.zero_shot_accuracy for o in runs])
    gain = np.array([o.gain for o in runs])
    assert r_squared(error, gain) == pytest.approx(raw, abs=0.005)
    assert r_squared(error, gain / error) == pytest.approx(over_error, abs=0.005)


def test_every_base_rate_says_that_it_is_published_and_claims_no_measurement(base_rates):
    for run in base_rates:
        assert run.source == "FusionBench (tanganke/fusion_bench)"
        assert run.model_fingerprint == f"published:{run.model}"
        assert (run.iimm, run.inter, run.intra, run.standard_error) == (None,) * 4
        assert (run.n_images, run.n_classes, run.task_fingerprint) == (None, None, "")
        assert parse_outcome(json.loads(json.dumps(asdict(run)))) == run


def test_recipes_are_those_stated(base_rates):
    full, lora = of(base_rates, B16, "full"), of(base_rates, B16, "lora")
    assert (full[0].recipe["steps"], full[0].recipe["batch_size"]) == (4000, 32)
    assert (lora[0].recipe["steps"], lora[0].recipe["rank"]) == (2000, 16)
    assert {o.recipe["learning_rate"] for o in full[:8] + lora} == {1e-5}
    assert "learning_rate" not in full[8].recipe  # nothing is stated for the twelve further tasks


def test_nine_tasks_have_a_published_linear_probe(base_rates):
    probed = [o for o in base_rates if o.linear_probe_accuracy is not None]
    counts = Counter((o.model, o.method) for o in probed)
    full = {(model, "full"): 9 for model in (B32, B16, L14)}
    assert counts == full | {(B16, "lora"): 4, (B16, "l_lora"): 4}  # 4 of the 8 crosswise tasks
    assert len({o.task for o in probed}) == 9
    svhn = of(base_rates, B32, "full")[EIGHT.index("svhn")]
    assert svhn.linear_probe_accuracy == 0.6508
    unknown = {(o.linear_probe_standard_error, o.linear_probe_n_train, o.n_train) for o in probed}
    assert unknown == {(None, None, None)}  # nothing of these is published


def test_fine_tuning_halves_the_error_of_the_published_linear_probes(base_rates):
    """../shared/SCIENCE.md, section 6: a ratio of 0.5-0.6 for real CLIP, svhn the outlier, 0.08."""
    full = [o for o in base_rates if o.method == "full" and o.linear_probe_accuracy is not None]
    ratio = {
        (o.model, o.task): (1 - o.final_accuracy) / (1 - o.linear_probe_accuracy) for o in full
    }
    assert 0.5 < np.median(list(ratio.values())) < 0.6
    assert ratio[B32, "svhn"] == pytest.approx(0.0773, abs=1e-3)
    direct = np.mean([abs(o.final_accuracy - o.linear_probe_accuracy) for o in full])
    assert 100 * direct == pytest.approx(6.2, abs=0.051)
