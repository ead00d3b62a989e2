"""What is kept of frozen parts equals what is computed again, and is dropped when it must be."""

import copy

import pytest
import torch
from torch import nn

from iimm_callbacks import PromptClassifier
from iimm_callbacks.models.encoders import FrozenPart
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.models.wrappers import find_dual_encoder
from iimm_callbacks.probing.probe import Probe


@pytest.fixture
def make_probe(colour_task, shape_task, processor):
    def build():
        return Probe(colour_task, [shape_task], processor=processor, progress=False)

    return build


@pytest.fixture
def prepared(tiny_clip, colour_task, processor):
    """method -> a model that is prepared for it, the same every time."""
    options = {
        "clip_adapter": {"processor": processor},
        "linear_probe": {"processor": processor, "task": colour_task},
    }

    def build(method):
        if method == "locked texts":
            model = prepare(tiny_clip(), "full")
            for part in (model.text_model, model.text_projection):
                part.requires_grad_(False)
            return model
        return prepare(tiny_clip(), method, **options.get(method, {}))

    return build


class Counter:
    """Counts the texts and images that go through the towers of a model."""

    def __init__(self, model):
        self.seen = {"texts": 0, "images": 0}
        core = find_dual_encoder(model)
        core.text_model.register_forward_hook(self.count("texts"), with_kwargs=True)
        core.vision_model.register_forward_hook(self.count("images"), with_kwargs=True)

    def count(self, what):
        def hook(module, args, kwargs, output):
            self.seen[what] += len(output[0])

        return hook

    def pop(self):
        seen, self.seen = self.seen, dict.fromkeys(self.seen, 0)
        return seen


def step(model, seed=0):
    """An optimizer step on noise: moves whatever trains."""
    torch.manual_seed(seed)
    tuned = [p for p in model.parameters() if p.requires_grad]
    for p in tuned:
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(tuned, lr=1e-2).step()
    for p in tuned:
        p.grad = None


def same(one, other):
    assert one.measurement == other.measurement
    for name in one.correct:
        assert (one.correct[name] == other.correct[name]).all()


# One witness a look, and what a whole look takes: 32 + 24 images, 4 + 3 prompts.
WHOLE = {"images": 1 + 56, "texts": 1 + 7}


@pytest.mark.parametrize(
    ("method", "second"),
    [
        ("full", {"images": 56, "texts": 7}),  # no witness: everything trains
        ("bitfit", {"images": 56, "texts": 7}),  # nor where the same trains as before
        ("lora", {"images": 56, "texts": 7}),
        ("locked texts", {"images": 56, "texts": 1}),
        ("clip_adapter", {"images": 1, "texts": 1}),
        ("linear_probe", {"images": 1, "texts": 1}),
    ],
)
def test_only_what_trains_is_computed_again_and_the_numbers_are_those_of_the_plain_way(
    prepared, make_probe, method, second
):
    model, probe = prepared(method), make_probe()
    counter = Counter(model)
    same(probe.look(model, 0), make_probe().look(model, 0))
    counter.pop()
    for seed in range(3):
        step(model, seed)
        look = probe.look(model, seed + 1)
        assert counter.pop() == second
        same(look, make_probe().look(model, seed + 1))  # nothing kept
        counter.pop()


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_under_autocast_what_trains_is_not_taken_for_frozen(prepared, make_probe, dtype):
    model, probe = prepared("full"), make_probe()
    probe.look(model, 0, dtype)
    step(model)
    same(probe.look(model, 1, dtype), make_probe().look(model, 1, dtype))


def test_thawing_in_mid_run_is_noticed(prepared, make_probe):
    model, probe = prepared("clip_adapter"), make_probe()
    counter = Counter(model)
    before = probe.look(model, 0)
    model.dual_encoder.visual_projection.requires_grad_(True)
    step(model)
    counter.pop()
    after = probe.look(model, 1)
    assert counter.pop() == WHOLE
    same(after, make_probe().look(model, 1))
    assert after.measurement != before.measurement


def thawed_for_a_while(model):
    weight = model.dual_encoder.visual_projection.weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    weight.requires_grad_(False)


def loaded(model):
    state = model.state_dict()
    key = "dual_encoder.visual_projection.weight"
    model.load_state_dict(state | {key: state[key] + torch.randn_like(state[key])})


def written_through_data(model):
    weight = model.dual_encoder.visual_projection.weight
    weight.data.add_(torch.randn_like(weight))


def replaced(model):
    torch.manual_seed(5)
    model.dual_encoder.visual_projection = nn.Linear(32, 24, bias=False).requires_grad_(False)


@pytest.mark.parametrize("change", [thawed_for_a_while, loaded, written_through_data, replaced])
def test_a_frozen_weight_that_changed_is_noticed(prepared, make_probe, change):
    model, probe = prepared("clip_adapter"), make_probe()
    before = probe.look(model, 0)
    change(model)
    after = probe.look(model, 1)
    same(after, make_probe().look(model, 1))
    assert after.measurement != before.measurement


def test_running_statistics_that_move_are_noticed():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    items, part = torch.randn(8, 3), FrozenPart()

    def look():
        model.eval()
        part.update(model, lambda: model(items[:1]))
        return part.get("items", lambda: model(items))

    first = look()
    assert look() is first
    model.train()(items)
    assert not torch.equal(look(), first)


def test_a_token_that_the_witness_has_not_is_noticed_too():
    model = nn.EmbeddingBag(9, 3).requires_grad_(False)
    tokens, part = torch.tensor([[1, 2], [3, 4]]), FrozenPart()

    def look():
        part.update(model, lambda: model(tokens[:1]))
        return part.get("tokens", lambda: model(tokens))

    first = look()
    with torch.no_grad():
        model.weight[4] += 1
    assert part.is_frozen
    assert not torch.equal(look(), first)


def test_functions_of_the_users_own_are_never_taken_for_frozen(tiny_clip, processor, colour_task):
    model = tiny_clip()
    calls = []

    @torch.no_grad()
    def images(given, batch):
        calls.append(len(batch))
        pixels = processor.image_processor(images=batch, return_tensors="pt")
        output = given.get_image_features(**pixels)
        return output if isinstance(output, torch.Tensor) else output.pooler_output

    def texts(given, prompts):
        return torch.eye(4, 24)

    probe = Probe(colour_task, encode=(images, texts), progress=False)
    for seed in range(2):
        probe.look(model, seed)
    assert calls == [32, 32]


@pytest.mark.parametrize(
    ("method", "texts"), [("full", 4), ("lora", 4), ("locked texts", 1), ("clip_adapter", 1)]
)
def test_training_embeds_the_prompts_of_a_frozen_text_tower_once(
    prepared, colour_task, processor, method, texts
):
    classifier = PromptClassifier(prepared(method), colour_task, processor)
    pixels = processor.image_processor(images=colour_task.images(range(4)), return_tensors="pt")
    inputs = {"labels": torch.tensor(colour_task.labels(range(4))), **pixels}
    classifier.train()(**inputs)["loss"].backward()
    counter = Counter(classifier)
    for seed in range(2):
        step(classifier, seed)
        output = classifier(**inputs)
        assert counter.pop()["texts"] == texts
        output["loss"].backward()
        again = copy.deepcopy(classifier)(**inputs)
        assert torch.equal(output["logits"], again["logits"])
        counter.pop()
