"""How fast the measure, the probe and a guarded run are, each against its lower bound, in one run.

    python examples/benchmark.py               # about three minutes on two cores
    python examples/benchmark.py --size b32    # ViT-B/32 on JPEGs; six minutes on two cores
    python examples/benchmark.py --store       # stores of 1,000, 10,000, 100,000 runs; five minutes
    python examples/benchmark.py --size tasks  # large tasks, see examples/README.md; ten minutes
    python examples/benchmark.py --smoke       # seconds, numbers mean nothing

Everything is a ratio of two things timed in turns in the same process, because machines are noisy;
the best of several rounds counts. Expected: see "Speed" in README.md.
"""

import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from iimm_callbacks import (
    IIMMCallback,
    ImageCollator,
    PromptClassifier,
    Task,
    iimm,
    linear_probe,
    sample,
)
from iimm_callbacks.data.images import as_image
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records.objects import name_of as object_name


@dataclass
class Settings:
    size: str = field(default="sample", metadata={"help": "sample, b32 or tasks"})
    n_jpegs: int = field(default=0, metadata={"help": "b32: default 512; 3,072 on CUDA"})
    n_images: int = field(default=20_000, metadata={"help": "N"})
    width: int = field(default=512, metadata={"help": "D"})
    n_classes: int = field(default=100, metadata={"help": "C"})
    steps: int = field(default=600, metadata={"help": "Of the training run"})
    rounds: int = field(default=5, metadata={"help": "Of each timing"})
    store: bool = field(default=False, metadata={"help": "Stores of saved runs, and nothing else"})
    smoke: bool = field(default=False, metadata={"help": "Small and short"})


def best_of(rounds, *functions):
    """Best wall time of each function, called in turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def pairwise(images, texts, labels):
    """The measure from all pairs, as the formula has it; in blocks, so that it fits in memory."""
    x, t = (torch.nn.functional.normalize(m, dim=1) for m in (images, texts))
    n, c = len(x), len(t)
    intra = sum(float((block @ x.T).double().sum()) for block in x.split(2000)) - n
    cosines = (x @ t.T).double()
    own = cosines.gather(1, labels[:, None]).sum()
    inter = float((cosines.sum() - own) / (n * (c - 1)))
    return (inter + intra / (n * (n - 1))) / 2


def peak_memory(function):
    """Most bytes held by tensors at one time, beyond what was there before (CPU allocator)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    tracemalloc.start()
    function()
    peak += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure_rows(settings):
    torch.manual_seed(0)
    images = torch.randn(settings.n_images, settings.width) + 0.3
    texts = torch.randn(settings.n_classes, settings.width)
    labels = torch.randint(0, settings.n_classes, (settings.n_images,))
    ours, reads, pairs = best_of(
        settings.rounds,
        lambda: iimm(images, texts, labels),
        lambda: (images.sum(), images.sum()),
        lambda: pairwise(images, texts, labels),
    )
    value, reference = iimm(images, texts, labels).iimm, pairwise(images, texts, labels)
    memory = [
        peak_memory(lambda n=n: iimm(images[:n], texts, labels[:n])) / 1e6
        for n in (settings.n_images // 10, settings.n_images)
    ]
    yield "measure, against all pairs", f"{pairs / ours:.0f} times faster", "100"
    yield "measure, against two plain reads", f"{ours / reads:.1f} times their time", "2"
    yield from linear_probe_rows(settings)
    yield "measure, difference from all pairs", f"{abs(value - reference):.0e}", "1e-6"
    yield "extra memory at N/10 and N", f"{memory[0]:.1f} and {memory[1]:.1f} MB", "10 MB"


def linear_probe_rows(settings):
    """Seconds, not a ratio: the aim is one. One core, as beside a training."""
    sizes = [(64, 4, 1)] if settings.smoke else [(512, 10, 0.3), (512, 100, 0.3), (5000, 1000, 3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for n_images, n_classes, aim in sizes:
        images, texts = (
            torch.randn(n_images, settings.width),
            torch.randn(n_classes, settings.width),
        )
        labels = torch.arange(n_images) % n_classes
        (seconds,) = best_of(
            settings.rounds,
            lambda i=images, t=texts, y=labels: linear_probe(i, t, y, logit_scale=100.0),
        )
        name = f"linear probe, N = {n_images}, C = {n_classes}, one core"
        yield name, f"{seconds:.2f} s", f"{aim} s"
    torch.set_num_threads(threads)


def probe_rows(settings):
    model, processor = sample.load_model(), sample.load_processor()
    task = sample.load_task("printed_letters", probe_size=64 if settings.smoke else 256)
    probe = Probe(task, processor=processor, progress=False)
    probe.prepare(model)
    batches = [batch.inputs["pixel_values"] for batch in probe._share.batches]
    tokens = probe._share.tasks[0].prompts

    @torch.no_grad()
    def bare():
        for prompts in tokens:
            model.get_text_features(**prompts)
        for pixels in batches:
            model.get_image_features(pixel_values=pixels)

    frozen = prepare(sample.load_model(), "clip_adapter", processor=processor)
    other = Probe(task, processor=processor, progress=False)
    other.look(frozen, 0)
    ours, loop, kept = best_of(
        4 * settings.rounds, lambda: probe.look(model, 0), bare, lambda: other.look(frozen, 1)
    )
    yield "probe, against a bare forward loop", f"{loop / ours:.2f} of its throughput", "0.95"
    yield "probe of frozen towers, against one of tuned", f"{ours / kept:.0f} times faster", "-"


def run_row(settings):
    name = "printed_letters"
    data, processor = sample.load_dataset(name, "train"), sample.load_processor()

    def train(callbacks):
        classifier = PromptClassifier(sample.load_model(), sample.load_task(name), processor)
        arguments = TrainingArguments(
            output_dir="output/benchmark",
            max_steps=settings.steps,
            per_device_train_batch_size=16,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_steps=10_000,
        )
        trainer = Trainer(
            model=classifier,
            args=arguments,
            train_dataset=data,
            data_collator=ImageCollator(processor),
            processing_class=processor,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    train([])  # warm up
    bare = train([])
    guard = IIMMCallback(
        sample.load_task(name), sample.canaries(name), outcomes=None, verbose=False
    )
    guarded = train([guard])
    budget, last = guard.monitor._pace.budget, guard.monitor.history[-1]["eval_iimm_runtime"]
    looks = budget.before + budget.spent - last
    yield "training run with the guard", f"{guarded / bare:.2f} of the time without", "-"
    yield "of which looks, the last one apart", f"{looks / (guarded - last):.1%} of the run", "5 %"
    yield "of which the last look", f"{last / guarded:.1%} of the run", "-"


def jpeg(i):
    """A camera's picture of 640×480 and some 120 kB: smooth colours and noise."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)).astype(float)
    noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def b32(settings, device):
    """ViT-B/32 with random weights, and its processor with the sample's words."""
    tokenizer = sample.load_processor().tokenizer
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id}
    layers = {"num_hidden_layers": 1} if settings.smoke else {}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text | layers, vision_config={"patch_size": 32} | layers)
    processor = CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer)
    return CLIPModel(config).eval().to(device), processor


class Pictures(torch.utils.data.Dataset):
    """Preprocessed pictures, for a DataLoader."""

    def __init__(self, pairs, processor):
        self.pairs, self.processor = pairs, processor

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        image, label = as_image(self.pairs[i][0]), self.pairs[i][1]
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": label}


def read_all(pairs, processor):
    for start in range(0, len(pairs), 64):
        images = [as_image(image) for image, _ in pairs[start : start + 64]]
        processor.image_processor(images, return_tensors="pt")


def read_by_processes(pairs, processor):
    """Decoding and preprocessing on all cores, and nothing else."""
    cores, context = len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")
    parts = [pairs[core::cores] for core in range(cores)]
    workers = [context.Process(target=read_all, args=(part, processor)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def b32_rows(settings):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    n = settings.n_jpegs or (64 if settings.smoke else 3072 if device == "cuda" else 512)
    model, processor = b32(settings, device)
    pairs = [(jpeg(i), i % 2) for i in range(n)]
    names = ["red", "green"]

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def first_look():
        probe = Probe(
            Task("jpegs", pairs, class_names=names, probe_size=n), processor=processor,
            progress=False,
        )  # fmt: skip
        probe.look(model, 0, linear_probe=True)
        return probe

    ready = first_look()  # warm up
    batches = [batch.inputs.inputs()["pixel_values"] for batch in ready._share.batches]

    @torch.no_grad()
    def forward():
        for pixels in batches:
            model.get_image_features(pixel_values=pixels.to(device))
        wait()

    trainer = Trainer(
        model=PromptClassifier(model, Task("jpegs", pairs, class_names=names), processor),
        args=TrainingArguments(
            "output/benchmark", per_device_eval_batch_size=64, report_to="none",
            dataloader_num_workers=cores, remove_unused_columns=False, disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
        ),
        eval_dataset=Pictures(pairs, processor),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    @torch.no_grad()
    def zero_shot_loop():
        loader = torch.utils.data.DataLoader(
            Pictures(pairs, processor), batch_size=64, num_workers=cores
        )
        right = 0
        prompts = processor.tokenizer(names, return_tensors="pt", padding=True).to(device)
        texts = model.get_text_features(**prompts)
        texts = getattr(texts, "pooler_output", texts)
        for batch in loader:
            images = model.get_image_features(pixel_values=batch["pixel_values"].to(device))
            images = getattr(images, "pooler_output", images)
            logits = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
            right += int((logits.argmax(1).cpu() == batch["labels"]).sum())
        return right

    rounds = 1 if settings.smoke else 2
    reading, passing, first, later, evaluation, loop = best_of(
        rounds,
        lambda: read_by_processes(pairs, processor),
        forward,
        first_look,
        lambda: ready.look(model, 1),
        trainer.evaluate,
        zero_shot_loop,
    )
    kept = sum(batch.inputs.nbytes for batch in ready._share.batches) / n
    slower, where = max(reading, passing), f"{n} JPEGs, {cores} cores, {device}"
    yield f"first look of {where}, against the slower of:", f"{first / slower:.2f}", "1.15"
    yield (
        "  decoding and preprocessing alone, all cores",
        f"{1e3 * reading / n:.1f} ms an image",
        "-",
    )
    yield "  the forward pass alone", f"{1e3 * passing / n:.1f} ms an image", "-"
    yield "  against one after the other", f"{first / (reading + passing):.2f}", "-"
    yield "later look, against the forward pass", f"{later / passing:.2f}", "1.05"
    yield "first look, against trainer.evaluate()", f"{first / evaluation:.2f} of its time", "1"
    yield "first look, against a zero-shot loop", f"{first / loop:.2f} of its time", "1"
    yield from overlap_rows(pairs, processor, reading)
    yield "memory of a kept picture", f"{kept / 1e6:.3f} MB", "0.16"
    yield guard_row(settings, model, processor, pairs, first / n, later / n)


def overlap_rows(pairs, processor, reading):
    """A forward pass that only sleeps, as a CPU does before a GPU, for as long as reading takes."""
    tokenizer = processor.tokenizer
    layers = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1}
    layers |= {"intermediate_size": 64}
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text | layers, vision_config={"patch_size": 224} | layers)
    model = CLIPModel(config).eval()
    each = reading / len(pairs)
    model.vision_model.register_forward_hook(
        lambda module, inputs, output: time.sleep(each * len(output[0]))
    )
    task = Task("jpegs", pairs, class_names=["red", "green"], probe_size=len(pairs))

    def look(overlaps):
        probe = Probe(task, processor=processor, progress=False)
        probe.overlaps = overlaps
        probe.look(model, 0)

    over, after = best_of(2, lambda: look(True), lambda: look(False))
    name = "first look before a device that needs as long, against reading"
    yield f"{name}: at the same time", f"{over / reading:.2f}", "1.15"
    yield f"{name}: one after the other", f"{after / reading:.2f}", "-"


def guard_row(settings, model, processor, pairs, first, later):
    """What the default looks of 1,000 steps would take, from seconds a picture and a step."""
    model.train()
    classifier = PromptClassifier(
        model, Task("jpegs", pairs, class_names=["red", "green"]), processor
    )
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-6)
    batch = ImageCollator(processor)([(as_image(image), label) for image, label in pairs[:32]])
    batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}

    def step():
        classifier(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    (seconds,) = best_of(3, step)
    pictures = 512 + 12 * 256
    share = pictures * (first + 7 * later) / (1000 * seconds)
    return "default looks, against 1,000 steps of 32 images", f"{share:.1%}", "1 % on a GPU"


# What a new process does with a store: it prints seconds, those of CPU time in all processes,
# and its MB.
USE_STORE = """
import os, re, sys, time
from pathlib import Path
from iimm_callbacks import Forecaster, append_outcome
from iimm_callbacks.forecasting.runs import about, measured
from iimm_callbacks.records.store import open_store

def memory():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def cpu():
    return sum(os.times()[:4])

begun, used = time.perf_counter(), cpu()
found = open_store(sys.argv[1])
found.n_outcomes
opened, used = time.perf_counter(), cpu() - used
runs = found.relevant(f"{3:016x}")
forecast = Forecaster().fit(runs).predict(measured(runs[0]), **about(runs[0]))
done, most = time.perf_counter(), memory()
append_outcome(sys.argv[1], runs[-1])
print(opened - begun, done - opened, time.perf_counter() - done, most, used)
"""


def saved_runs(n):
    """Lines of a store: the sample's runs, as of 40 models on 70 tasks."""
    shipped = [asdict(outcome) for outcome in sample.load_outcomes()]
    for i in range(n):
        row = shipped[i % len(shipped)]
        task = f"{row['task']} {i // len(shipped) % 5}"
        names = {"model_fingerprint": f"{i % 40:016x}", "task": task, "run": f"{i:032x}"}
        yield f"{json.dumps(row | names, sort_keys=True)}\n".encode()


def write_store(folder, kind, n):
    """A file of JSON lines, or a folder of objects."""
    if kind == "file":
        path = folder / f"{n}.jsonl"
        with path.open("wb") as file:
            file.writelines(saved_runs(n))
        return str(path)
    place = folder / str(n)
    place.mkdir()
    for line in saved_runs(n):
        (place / object_name(line)).write_bytes(line)
    return f"{place}/"


def store_rows(settings):
    for n in (20,) if settings.smoke else (1_000, 10_000, 100_000):
        for kind in ("file", "folder"):
            with tempfile.TemporaryDirectory() as folder:
                place = write_store(Path(folder), kind, n)
                env = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache", "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-c", USE_STORE, place]
                starts = [
                    subprocess.run(command, env=env, check=True, capture_output=True, text=True)
                    for _ in range(2)
                ]
            first, later = (list(map(float, start.stdout.split())) for start in starts)
            name = f"{n} runs in a {kind}"
            for start, seconds, aim in ((f"{name}: first", first, 10), ("  later", later, 0.5)):
                yield f"{start} start", f"{seconds[0]:.2f} s, {seconds[4]:.2f} of CPU", f"{aim} s"
            yield "  reading what is relevant, and the forecast", f"{later[1]:.2f} s", "1 s"
            yield "  appending", f"{1e3 * later[2]:.0f} ms", "20 ms"
            yield "  memory in all", f"{later[3]:.0f} MB", "300 MB"


def in_a_child(function):
    """What a forked process says that it took, and its peak of memory beyond ours, in MB."""
    ours, theirs = multiprocessing.Pipe()

    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = function()
        theirs.send((told, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    theirs.close()
    told = ours.recv()
    child.join()
    return told


def task_rows(settings):
    """Large tasks with the shipped model of 2 M parameters, 64 images of the task."""
    model, processor = sample.load_model(), sample.load_processor()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (512, 48, 48, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]

    def task(name, n_images, n_classes, n_templates=1, probe_size=None, first=0):
        return Task(
            name,
            [(images[(i + first) % 512], i % n_classes) for i in range(n_images)],
            class_names=[f"{name} {c}" for c in range(n_classes)],
            templates=[f"{t} of a {{}}" for t in range(n_templates)],
            probe_size=probe_size,
        )

    def look(make):
        def run():
            seconds = [time.perf_counter()]
            task, *off_target = make()
            seconds.append(time.perf_counter())
            probe = Probe(task, off_target, processor=processor, progress=False)
            probe.prepare(model)
            seconds.append(time.perf_counter())
            probe.look(model, 0)
            seconds.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(seconds)]

        return run

    def ten_million():
        few = datasets.Dataset.from_dict(
            {"image": images, "label": [i % 10 for i in range(512)]},
            features=datasets.Features(
                image=datasets.Image(), label=datasets.ClassLabel(names=list("abcdefghij"))
            ),
        )
        rows = 10_000 if settings.smoke else 10_000_000
        few = few.select(np.arange(rows) % 512)
        return [Task("rows", few, templates="a {}", probe_size=64)]

    many = (10, 100) if settings.smoke else (10, 100, 1_000, 22_000)
    cases = {f"{c:,} classes": lambda c=c: [task("x", max(c, 512), c, 1, 64)] for c in many}
    for t in (2,) if settings.smoke else (8, 24):
        cases[f"1,000 classes, {t} templates"] = lambda t=t: [task("x", 1_000, 1_000, t, 64)]
    n = 600 if settings.smoke else 5_000
    cases[f"{n:,} off-target images"] = lambda: [task("x", 512, 10, 1, 64), task("y", n, 10, 1, n)]
    n_tasks = 3 if settings.smoke else 100
    cases[f"{n_tasks} off-target tasks of 48 images"] = lambda: [
        task("x", 512, 10, 1, 64),
        *(task(f"off {k}", 480, 10, 1, 48, first=k) for k in range(n_tasks)),
    ]
    cases["10 million rows"] = ten_million
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IIMM_CALLBACKS_TEXTS"] = folder
        for name, make in cases.items():
            again = (
                ["", ", second run"] if name.startswith(("22,000", "1,000 classes, 8")) else [""]
            )
            for which in again:
                (made, read, looked), peak = in_a_child(look(make))
                text = f"task {made:.1f}, reading {read:.1f}, look {looked:.1f} s"
                yield name + which, f"{text}; {peak:.0f} MB", "-"


def import_rows(settings):
    """Fresh processes in turns: the package has no more to import than the Trainer has anyway."""
    commands = {
        "bare": "import torch, transformers",
        "trainer": "import torch; from transformers import Trainer, TrainerCallback",
        "package": "import iimm_callbacks",
        "callback": "from iimm_callbacks import IIMMCallback",
    }
    if settings.smoke:
        commands = {name: "import sys" for name in commands}
    seconds = {name: [] for name in commands}
    for turn in range(1 if settings.smoke else 8):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", command], check=True)
            if turn > 0 or settings.smoke:  # the first fills the disk's cache
                seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in seconds.items()}

    def against(name, other):
        return f"{middle[name]:.1f} s, {middle[name] / middle[other]:.2f} of the time"

    # transformers loads nothing of itself until it is asked for a name, so both are told.
    yield "import of the package, against torch + transformers", against("package", "bare"), "1.1"
    yield "import of IIMMCallback, against the Trainer", against("callback", "trainer"), "1.1"


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    if settings.smoke:
        settings.n_images, settings.steps, settings.rounds = 2000, 4, 1
    sizes = f"N = {settings.n_images}, D = {settings.width}, C = {settings.n_classes}"
    if settings.store:
        sizes = f"{len(os.sched_getaffinity(0))} cores"
    elif settings.size == "tasks":
        sizes = "the shipped model"
    elif settings.size == "b32":
        sizes = "ViT-B/32, random weights, JPEGs of 640×480"
    table = Table(title=f"{sizes}; {torch.get_num_threads()} threads; torch {torch.__version__}")
    for column in ("what", "measured", "aim"):
        table.add_column(column)
    small = (measure_rows, probe_rows, run_row, import_rows)
    kinds = {"sample": small, "b32": (b32_rows,), "tasks": (task_rows,)}
    if settings.size not in kinds:
        raise ValueError(f"`--size` must be sample, b32 or tasks, got {settings.size!r}")
    chosen = (store_rows,) if settings.store else kinds[settings.size]
    for rows in chosen:
        for row in rows(settings):
            table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
