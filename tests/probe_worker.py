"""What `test_probe_ranks.py` runs on several ranks: all of it in one process that forks."""

import copy
import logging
import os
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import torch
from forked import on_ranks
from shared_fixtures import make_dataset
from tiny import FAMILIES
from torch import distributed
from torch.distributed.algorithms.join import Join

from iimm_callbacks import IIMMMonitor, Task
from iimm_callbacks.models.wrappers import model_fingerprint
from iimm_callbacks.probing import ranks
from iimm_callbacks.probing.learnable import TrainingSet
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.trainer.host import best_step

WORLDS = (1, 2, 3, 7)
COLOURS, SHAPES = make_dataset("colour", 40, seed=1), make_dataset("shape", 30, seed=2)
PICTURES = [row["image"] for row in COLOURS]


def colour_task(n=24, data=COLOURS, **more):
    return Task("colours", data, templates="a {} thing", probe_size=n, **more)


def shape_task(n=15, **more):
    return Task("shapes", SHAPES, templates="a photo of the {}", probe_size=n, **more)


def told(look):
    """A look without its wall time."""
    return look.measurement, {name: list(bits) for name, bits in look.correct.items()}


def raised(function):
    """What it raises, as text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Encode:
    """`encode=` functions of the tiny CLIP that fail where and as they are told to."""

    def __init__(self, fails=lambda images: None):
        self.model, self.processor = FAMILIES["CLIP"]()
        self.fails = fails

    def images(self, model, images):
        if error := self.fails(images):
            raise error
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return vec(self.model.get_image_features(pixel_values=pixels))

    def texts(self, model, prompts):
        tokens = self.processor(text=prompts, return_tensors="pt", padding=True)
        return vec(self.model.get_text_features(**tokens))

    def probe(self, **settings):
        pair = (self.images, self.texts)
        return Probe(colour_task(), [shape_task()], encode=pair, progress=False, **settings)


def vec(output):
    return output if torch.is_tensor(output) else output.pooler_output


def equal():
    model, processor = FAMILIES["CLIP"]()
    captions = Task("captions", [(p, f"thing {i}") for i, p in enumerate(PICTURES[:9])])
    found = {}
    for n, batch_size in ((2, 1), (3, 64), (17, 4), (24, 5)):
        tasks = colour_task(n), [shape_task(max(n // 2, 2))]
        probe = Probe(*tasks, processor=processor, batch_size=batch_size, progress=False)
        found[n, batch_size] = told(probe.look(model, 0)), probe.fingerprints
    for limit in (0, 2**31):
        settings = {"batch_size": 2, "cache_limit": limit, "progress": False}
        probe = Probe(captions, processor=processor, **settings)
        found["captions", limit] = told(probe.look(model, 0)), probe.fingerprints
    return found


def mean_recall(predictions, references):
    """Right images of each class, averaged over the classes."""
    right = predictions == references
    return sum(right[references == c].mean() for c in set(references)) / len(set(references))


def metrics():
    """Tasks by metrics: scores, and what a metric that differs between ranks comes to."""
    model, processor = FAMILIES["CLIP"]()
    rank = ranks.world()[0]
    captions = Task("captions", [(p, f"thing {i}") for i, p in enumerate(PICTURES[:9])],
                    metric="recall@4")  # fmt: skip
    told_apart = []

    def of_rank(predictions, references):
        told_apart.append(rank)
        return mean_recall(predictions, references) / (1 + rank)

    def probe(*off_target, metric=mean_recall):
        return Probe(colour_task(metric=metric), off_target, processor=processor, batch_size=4,
                     progress=False)  # fmt: skip

    look = probe(shape_task(metric=of_rank), captions).look(model, 0)
    asked = set(told_apart)
    failing = [False]

    def fails(predictions, references):
        return 1 / 0 if failing[0] and rank == 0 else mean_recall(predictions, references)

    later = probe(shape_task(metric=fails))
    later.look(model, 0)
    failing[0] = True
    error = raised(lambda: later.look(model, 1))
    failing[0] = False
    after = later.look(model, 2)
    scores = {n: (s.value, s.images.tolist()) for n, s in look.scores.items()}
    return told(look), scores, asked, error, after.accuracy("shapes")


def one_has_another_metric():
    model, processor = FAMILIES["CLIP"]()
    task = colour_task(metric=None if ranks.world()[0] == 1 else mean_recall)
    return raised(lambda: Probe(task, processor=processor, progress=False).prepare(model))


def one_reduction():
    model, processor = FAMILIES["CLIP"]()
    probe = Probe(colour_task(), [shape_task()], processor=processor, batch_size=4, progress=False)
    probe.prepare(model)
    calls = []
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "all_gather"):
        original = getattr(distributed, name)
        setattr(
            distributed, name, lambda *a, o=original, n=name, **k: (calls.append(n), o(*a, **k))[1]
        )
    probe.look(model, 1)
    return calls


def bad_images():
    model, processor = FAMILIES["CLIP"]()
    names = COLOURS.features["label"].names
    pairs = [(row["image"], row["label"]) for row in COLOURS]
    for i in (1, 7, 20):
        pairs[i] = (b"\x89PNG no picture", pairs[i][1])
    task = colour_task(data=pairs, n=40, class_names=names)
    probe = Probe(task, [shape_task()], processor=processor, batch_size=4, progress=False)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("iimm_callbacks")
    logger.addHandler(handler)
    look = probe.look(model, 0)
    logger.removeHandler(handler)
    return told(look), probe.fingerprints, messages


def no_images():
    model, processor = FAMILIES["CLIP"]()
    names = COLOURS.features["label"].names
    task = colour_task(data=[(b"no", i % 4) for i in range(40)], class_names=names)
    return raised(lambda: Probe(task, processor=processor, progress=False).look(model, 0))


def group_anew(folder):
    """A look in the group, alone once it is gone, and in another one, at which rank 1 is new."""
    encode = Encode()
    probe = encode.probe(batch_size=4)
    looks = [told(probe.look(encode.model, 0))]
    rank, world = ranks.world()
    distributed.destroy_process_group()
    looks.append(told(probe.look(encode.model, 1)))
    on_store = folder / f"anew-{world}"
    if rank == 1:  # a process that has been in no look
        probe = encode.probe(batch_size=4)
        ranks._entered.clear()
        ranks._counted_for = None
    distributed.init_process_group(
        "gloo", init_method=f"file://{on_store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    if rank != 1:
        probe._share = None
    looks.append(told(probe.look(encode.model, 0)))
    return looks


def one_fails():
    broken = [False]

    def fails(images):
        return OSError("disk on fire") if broken[0] and ranks.world()[0] == 1 else None

    encode = Encode(fails)
    probe = encode.probe(batch_size=4)
    before = told(probe.look(encode.model, 0))
    broken[0] = True
    error = raised(lambda: probe.look(encode.model, 1))
    broken[0] = False
    return before, error, told(probe.look(encode.model, 2))


def one_diverges():
    def fails(images):
        from iimm_callbacks.measures.embeddings import NotFiniteError

        return NotFiniteError("norm nan") if ranks.world()[0] == 1 else None

    encode = Encode(fails)
    return raised(lambda: encode.probe(batch_size=4).look(encode.model, 5))


def one_has_little_memory():
    def fails(images):
        if ranks.world()[0] == 1 and len(images) > 2:
            return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return None

    encode = Encode(fails)
    return told(encode.probe(batch_size=8).look(encode.model, 0))


def one_has_another_task():
    model, processor = FAMILIES["CLIP"]()
    n = 24 if ranks.world()[0] != 1 else 23
    return raised(lambda: Probe(colour_task(n), processor=processor, progress=False).prepare(model))


def shard(model, kind):
    if kind == "plain":
        return model
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        layer = type(model.vision_model.encoder.layers[0])
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({layer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    from torch.distributed.fsdp import fully_shard

    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            fully_shard(layer)
    return fully_shard(model)


def loss_of(model, inputs, labels):
    return torch.nn.functional.cross_entropy(model(**inputs).logits_per_image, labels)


def breaks_on_rank_1(module, breaks):
    """Its forward pass raises there at the call that is told, counted from 0; None: never."""
    forward, calls = module.forward, [0]

    def run(*args, **kwargs):
        calls[0] += 1
        if calls[0] - 1 == breaks[0] and ranks.world()[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(*args, **kwargs)

    module.forward = run
    return calls


def sharded_run(kind, tower=None):
    """A guarded run of a SigLIP: same batches on all ranks, so that all kinds train alike.

    `tower`: whose first layer is out of memory on rank 1 amid the look at step 2.
    """
    torch.manual_seed(0)
    bare, processor = FAMILIES["SigLIP"]()
    fingerprint = model_fingerprint(bare)
    model = copy.deepcopy(bare)
    breaks = [None]
    layer = getattr(model, tower or "vision_model").encoder.layers[0]
    calls = breaks_on_rank_1(layer.mlp, breaks)
    model = shard(model, kind)
    task = colour_task()
    monitor = IIMMMonitor(
        task, [shape_task()], processor=processor, outcomes=None, verbose=False,
        batch_size=5, every=2, max_overhead=None,
    )  # fmt: skip
    failures = []
    of_failure = monitor._warned.of_failure
    monitor._warned.of_failure = lambda step, error: (
        failures.append(error), of_failure(step, error)
    )  # fmt: skip
    model.train()
    monitor.begin(model, recipe={"steps": 4})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    inputs = processor(text=task.prompts([]), images=PICTURES[:8], return_tensors="pt",
                       padding="max_length")  # fmt: skip
    labels = torch.tensor([row["label"] for row in COLOURS.select(range(8))])
    losses = []
    for step in range(1, 5):
        loss = loss_of(model, inputs, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if monitor.is_due(step, 4):
            if tower and step == 2:
                calls[0], breaks[0] = 0, 2  # the first is that of the single item
            monitor.check(model, step, 4)
            breaks[0] = None
    outcome = monitor.end(model)
    timeless = [
        {k: v for k, v in row.items() if k not in ("time", "eval_iimm_runtime")}
        for row in monitor.history
    ]
    return {
        "losses": losses,
        "history": timeless,
        "fingerprint": (fingerprint, outcome.model_fingerprint),
        "method": outcome.method,
        "share": outcome.recipe["trainable_share"],
        "failures": monitor.failures,
        "failure": str(failures[0]) if failures else "",
        "run": outcome.run,
        "training": model.training,
        "model": outcome.model,
    }


def sharded_bad_image(kind):
    """One image that can no longer be read when it is read again, under FSDP."""
    bare, processor = FAMILIES["SigLIP"]()
    model = shard(bare, kind)
    pairs = [(row["image"], row["label"]) for row in COLOURS]
    names = COLOURS.features["label"].names
    task = colour_task(data=pairs, n=20, class_names=names)
    probe = Probe(task, processor=processor, batch_size=3, cache_limit=0, progress=False)
    probe.look(model, 0)
    position = task.subset()[4]  # of the second batch, rank 1's
    good, pairs[position] = pairs[position], (b"gone", pairs[position][1])
    error = raised(lambda: probe.look(model, 1))
    pairs[position] = good
    return error, told(probe.look(model, 2))[0]


def best_apart():
    """The step of the best checkpoint: one and the same, and another one on each rank."""
    states = [
        SimpleNamespace(best_model_checkpoint=f"out/checkpoint-{step}", is_world_process_zero=True)
        for step in (4, 2 + ranks.world()[0])
    ]
    return [best_step(state) for state in states]


def joined():
    """A loop in which rank 0 has a batch more; torch's `Join` trains on without rank 1."""
    torch.manual_seed(0)
    model, processor = FAMILIES["SigLIP"]()
    net = torch.nn.parallel.DistributedDataParallel(model)
    task, (rank, _) = colour_task(), ranks.world()
    monitor = IIMMMonitor(
        task, [shape_task()], processor=processor, outcomes=None, verbose=False, every=2,
        max_overhead=None,
    )  # fmt: skip
    monitor.begin(net, recipe={"steps": 9})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    inputs = processor(text=task.prompts([]), images=PICTURES[:8], return_tensors="pt",
                       padding="max_length")  # fmt: skip
    labels = torch.tensor([row["label"] for row in COLOURS.select(range(8))])
    os.environ[ranks.TIMEOUT] = "1"  # the process group's own limit is longer
    with Join([net]):
        for step in range(1, 5 - rank):
            loss_of(net, inputs, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    del os.environ[ranks.TIMEOUT]
    outcome = monitor.end()
    steps = [(row["step"], row["eval_iimm"]) for row in monitor.history]
    alone = Probe(task, processor=processor, progress=False).look(model, 9).measurement.iimm
    return steps, outcome.ended, alone


def linear_probe():
    """The linear probe on a training set, without one, and where one rank cannot read it."""
    model, processor = FAMILIES["CLIP"]()
    train = COLOURS.select(range(20))
    task = colour_task(20, COLOURS.select(range(20, 40)))

    class Broken(list):
        def __getitem__(self, position):
            if ranks.world()[0] == ranks.world()[1] - 1:
                raise OSError("disk on fire")
            return super().__getitem__(position)

    broken = Broken([(row["image"], row["label"]) for row in train])
    broken.targets, broken.classes = list(train["label"]), list(task.class_names)
    found = []
    for data in (train, None, broken):
        probe = Probe(task, processor=processor, batch_size=4, progress=False)
        probe.train = None if data is None else TrainingSet(data)
        found.append(probe.look(model, 0, linear_probe=True).learnable)
    part = Probe(task, [shape_task()], processor=processor, batch_size=2, progress=False)
    return found, told(part.look(model, 1, part=0.25))


ANY = {
    "linear_probe": linear_probe,
    "equal": equal,
    "bad_images": bad_images,
    "no_images": no_images,
    "metrics": metrics,
}
SEVERAL = {
    "one_reduction": one_reduction,
    "one_fails": one_fails,
    "one_diverges": one_diverges,
    "one_has_little_memory": one_has_little_memory,
    "one_has_another_task": one_has_another_task,
    "one_has_another_metric": one_has_another_metric,
    "group_anew": group_anew,
}
TWO = {
    f"{kind}_{name}": (lambda f=function, k=kind: f(k))
    for kind in ("plain", "fsdp1", "fsdp2")
    for name, function in (("run", sharded_run), ("bad_image", sharded_bad_image))
}
TWO |= {
    f"{kind}_{tower}_breaks": partial(sharded_run, kind, tower)
    for kind in ("fsdp1", "fsdp2")
    for tower in ("vision_model", "text_model")
}
TWO |= {"joined": joined, "best_apart": best_apart}
SCENARIOS = {1: ANY, 2: ANY | SEVERAL | TWO, 3: ANY | SEVERAL, 7: ANY}


def main(folder):
    """Each scenario leaves what its ranks came back with in `<scenario>-<world>-<rank>.pt`."""
    logging.getLogger("iimm_callbacks").setLevel(logging.WARNING)

    def run(world, rank):
        for name, scenario in SCENARIOS[world].items():
            found = scenario(folder) if scenario is group_anew else scenario()
            torch.save(found, folder / f"{name}-{world}-{rank}.pt")

    for world in WORLDS:
        on_ranks(world, partial(run, world))
