"""What the guard promises, checked on this machine's device: a GPU, or the CPU without one.

    python examples/device_check.py            # no network; exits with 1 where a promise fails
    python examples/device_check.py --steps 4  # shorter runs
    python examples/device_check.py --cpu      # on the CPU even if there is a GPU

One table: check, what was measured, what is promised, and "kept", "FAILED" or why it was not tried.
The model and pictures are those that ship.
"""

import contextlib
import copy
import gc
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, sample
from iimm_callbacks.models.tuning import prepare
from iimm_callbacks.probing.probe import Probe

TASK, KEPT = "printed_letters", "emoji_groups"
KEPT_PROMISE, FAILED = "kept", "FAILED"


@dataclass
class Settings:
    steps: int = field(default=8, metadata={"help": "Of each training run"})
    cpu: bool = field(default=False, metadata={"help": "Keep off a GPU"})
    run: str = field(default="", metadata={"help": "For the check itself: a run in this folder"})
    die_at: int = field(default=0, metadata={"help": "For the check itself: the run's last step"})


@dataclass
class Row:
    """A line of the table."""

    check: str
    measured: str
    promise: str
    kept: bool | None = None
    why: str = ""

    @property
    def state(self):
        return self.why if self.kept is None else KEPT_PROMISE if self.kept else FAILED


def device_of(settings):
    return "cuda" if torch.cuda.is_available() and not settings.cpu else "cpu"


def tasks():
    return sample.load_task(TASK, probe_size=64), [sample.load_task(KEPT, probe_size=48)]


def guard(**more):
    task, kept = tasks()
    settings = {"outcomes": None, "every": 0.25, "max_overhead": None, "verbose": False}
    return IIMMCallback(task, kept, **(settings | {"strict": True, "card": False} | more))


def train(settings, callbacks=(), method="full", folder=None, resume=False, **arguments):
    """A Trainer after its last step, and its model."""
    processor = sample.load_processor()
    torch.manual_seed(0)
    options = {"dropout": 0.1} if method == "lora" else {}
    model = prepare(sample.load_model(), method, **options)
    with contextlib.ExitStack() as stack:
        folder = folder or stack.enter_context(tempfile.TemporaryDirectory())
        usual = {
            "output_dir": str(folder),
            "max_steps": settings.steps,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-4,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "seed": 0,
            "use_cpu": device_of(settings) == "cpu",
            "dataloader_pin_memory": device_of(settings) == "cuda",
        }
        trainer = Trainer(
            model=PromptClassifier(model, sample.load_task(TASK), processor),
            args=TrainingArguments(**(usual | arguments)),
            train_dataset=sample.load_dataset(TASK, "train"),
            data_collator=ImageCollator(processor),
            processing_class=processor,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume or None)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # `TrainingArguments(bf16=True)` sets it for the whole process
    return trainer


def weights(trainer):
    model = getattr(trainer.model, "_orig_mod", trainer.model)
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def bit_identical(settings):
    """Training with the guard ends at the weights of training without, in every precision."""
    ways = {"fp32": {}, "bf16 autocast": {"bf16": True}, "torch.compile": {"torch_compile": True}}
    if device_of(settings) == "cuda":
        ways["fp16 with scaler"] = {"fp16": True}
    ways["deterministic algorithms"] = {"full_determinism": True}
    for name, arguments in ways.items():
        check = f"weights with and without the guard, {name}"
        try:
            bare, again = (weights(train(settings, **arguments)) for _ in range(2))
            if not same(bare, again):
                yield Row(check, "", "equal, bit for bit", why="two runs without it differ, too")
                continue
            guarded = weights(train(settings, [guard()], **arguments))
        finally:
            torch.use_deterministic_algorithms(False)
        equal = same(bare, guarded)
        yield Row(check, "equal" if equal else "differ", "equal, bit for bit", equal)


def numbers_of_the_cpu(settings):
    """A look on the device has the numbers of one on the CPU."""
    task, kept = tasks()
    model, processor = sample.load_model(), sample.load_processor()

    def look(device, dtype=None):
        probe = Probe(task, kept, processor=processor, progress=False)
        return probe.look(copy.deepcopy(model).to(device), 0, dtype).measurement.iimm

    reference, device = look("cpu"), device_of(settings)
    for name, dtype, bound in (("fp32", None, 1e-5), ("bf16", torch.bfloat16, 1e-3)):
        away = abs(look(device, dtype) - reference)
        yield Row(f"IIMM on {device}, {name}, from the CPU's", f"{away:.1e}", f"{bound:.0e}",
                  away <= bound)  # fmt: skip


def random_streams(settings):
    """A look leaves the random streams of the device where they were."""
    device = device_of(settings)
    model = sample.load_model().to(device)
    task, kept = tasks()
    probe = Probe(task, kept, processor=sample.load_processor(), progress=False)
    probe.prepare(model)
    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    probe.look(model, 0)
    equal = torch.equal(torch.rand(4, device=device), expected)
    yield Row("random stream after a look", "as before" if equal else "moved", "as before", equal)


class _Peaks(TrainerCallback):
    """Peak memory of training steps; allocated and reserved before and after each look."""

    def __init__(self):
        self.peak = 0

    def on_step_end(self, *_, **__):
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())


def memory(settings):
    """A look raises the peak by no more than one batch of its own, and gives all of it back."""
    if device_of(settings) == "cpu":
        yield Row("memory of a look", "", "peak + 1 batch; back to 1 %", why="needs CUDA")
        return
    watch = _Peaks()
    trainer = train(settings, [watch], per_device_train_batch_size=64)
    model = trainer.model
    task, kept = tasks()
    probe = Probe(task, kept, processor=sample.load_processor(), progress=False)
    probe.prepare(model)
    probe.look(model, 0)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    probe.look(model, 1)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    batch = 64 * 3 * 48 * 48 * 4
    beyond = max(peak - watch.peak, 0) / 1e6
    yield Row("peak of a look beyond that of training", f"{beyond:.1f} MB",
              f"a batch, {batch / 1e6:.1f} MB", beyond <= batch / 1e6)  # fmt: skip
    for name, was, now in zip(("allocated", "reserved"), before, after, strict=True):
        share = now / max(was, 1)
        yield Row(f"{name} after a look, of before", f"{share:.3f}", "1.01", share <= 1.01)


def out_of_memory(settings):
    """A look that runs out of memory is finished in smaller batches."""
    device = device_of(settings)
    model, processor = sample.load_model().to(device), sample.load_processor()
    task, kept = tasks()
    whole = Probe(task, kept, processor=processor, progress=False).look(model, 0)
    sizes = []

    def fail(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Says this check")

    handle = model.vision_model.embeddings.register_forward_pre_hook(fail)
    look = Probe(task, kept, processor=processor, progress=False).look(model, 0)
    handle.remove()
    away = abs(look.measurement.iimm - whole.measurement.iimm)
    finished = max(sizes) > 16 and min(sizes) <= 16 and away < 1e-5
    yield Row("out of memory above 16 images", f"IIMM {away:.0e} away", "finished, 1e-5", finished)


def overhead(settings):
    """What looks take of a run; informative, since it depends on the length of the run."""
    steps = Settings(steps=10 * settings.steps, cpu=settings.cpu)
    began = time.perf_counter()
    train(steps)
    bare = time.perf_counter() - began
    watch = guard()
    train(steps, [watch])
    looks = sum(row["eval_iimm_runtime"] for row in watch.monitor.history)
    yield Row(f"looks of a run of {steps.steps} steps", f"{looks / bare:.1%} of {bare:.1f} s", "-",
              None, "told, not judged")  # fmt: skip


@contextlib.contextmanager
def one_rank(backend):
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


def ranks(settings):
    """One rank of a process group, plain and sharded, has the numbers of no group at all."""
    device = device_of(settings)
    task, kept = tasks()

    def look(model):
        probe = Probe(task, kept, processor=sample.load_processor(), progress=False)
        return probe.look(model, 0).measurement.iimm

    expected = look(sample.load_model().to(device))
    backend = "nccl" if device == "cuda" else "gloo"
    with one_rank(backend):
        for name in (backend, "FSDP2"):
            model = sample.load_model().to(device)
            if name == "FSDP2":
                from torch.distributed.fsdp import fully_shard

                mesh = distributed.device_mesh.init_device_mesh(device, (1,))
                for layer in (*model.text_model.encoder.layers, *model.vision_model.encoder.layers):
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})  # a scalar
            away = abs(look(model) - expected)
            yield Row(f"IIMM on one rank, {name}", f"{away:.0e} away", "1e-6", away <= 1e-6)


def adapters(settings):
    """LoRA, also on a base in 8 bits: bit-identical training again."""
    bare = weights(train(settings, method="lora"))
    equal = same(bare, weights(train(settings, [guard()], method="lora")))
    yield Row("weights with and without the guard, LoRA", "equal" if equal else "differ",
              "equal, bit for bit", equal)  # fmt: skip
    check = "LoRA on an 8-bit base"
    if device_of(settings) == "cpu" or importlib.util.find_spec("bitsandbytes") is None:
        yield Row(check, "", "a look, and a step after it", why="needs CUDA and bitsandbytes")
        return
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, CLIPModel

    base = CLIPModel.from_pretrained(
        sample.model_path(), quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    task, kept = tasks()
    classifier = PromptClassifier(tuned, sample.load_task(TASK), sample.load_processor())
    first = Probe(task, kept, processor=sample.load_processor(), progress=False).look(tuned, 0)
    batch = ImageCollator(sample.load_processor())(
        [sample.load_dataset(TASK, "train")[i] for i in range(8)]
    )
    classifier(**{k: v.to("cuda") for k, v in batch.items()})["loss"].backward()
    finite = all(
        p.grad is not None and bool(p.grad.isfinite().all())
        for p in tuned.parameters()
        if p.requires_grad
    )
    yield Row(check, f"IIMM {first.measurement.iimm:.3f}", "a look, and a step after it", finite)


def kill_and_resume(settings):
    """A process that dies in the middle goes on to the history of one in one piece."""
    with tempfile.TemporaryDirectory() as folder:
        ends = {}
        for name, deaths in (("whole", (0,)), ("cut", (settings.steps // 2 + 1, 0))):
            place = Path(folder) / name
            for die_at in deaths:
                command = [sys.executable, __file__, "--run", str(place), "--die_at", str(die_at),
                           "--steps", str(settings.steps)]  # fmt: skip
                command += ["--cpu"] if settings.cpu else []
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != (9 if die_at else 0):
                    yield Row("killed and resumed", done.stderr[-200:], "as in one piece", False)
                    return
            ends[name] = torch.load(place / "end.pt", weights_only=True)
    equal = same(ends["whole"]["weights"], ends["cut"]["weights"])
    looks = ends["whole"]["looks"] == ends["cut"]["looks"]
    yield Row("killed and resumed: weights", "equal" if equal else "differ", "as in one piece",
              equal)  # fmt: skip
    yield Row("killed and resumed: looks", "equal" if looks else "differ", "as in one piece", looks)


class _Dies(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, _, state, *__, **___):
        if state.global_step == self.step:
            os._exit(9)


def run_in_folder(settings):
    """For `kill_and_resume`: train in a folder, going on from its checkpoint."""
    folder = Path(settings.run)
    watch = guard()
    resume = any(folder.glob("checkpoint-*"))
    trainer = train(
        settings, [watch, _Dies(settings.die_at)], folder=folder, resume=resume,
        save_strategy="steps", save_steps=max(settings.steps // 4, 1),
    )  # fmt: skip
    looks = [row["eval_iimm"] for row in watch.monitor.history]
    torch.save({"weights": weights(trainer), "looks": looks}, folder / "end.pt")


CHECKS = (
    bit_identical, numbers_of_the_cpu, random_streams, memory, out_of_memory, overhead, ranks,
    adapters, kill_and_resume,
)  # fmt: skip


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    if device_of(settings) == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if settings.run:
        run_in_folder(settings)
        return 0
    name = "CPU" if device_of(settings) == "cpu" else torch.cuda.get_device_name()
    table = Table(title=f"{name}, torch {torch.__version__}")
    for column in ("check", "measured", "promise", "so"):
        table.add_column(column)
    rows = []
    for check in CHECKS:
        try:
            for row in check(settings):
                rows.append(row)
        except Exception as error:
            rows.append(Row(check.__name__, f"{type(error).__name__}: {error}", "no error", False))
    for row in rows:
        table.add_row(row.check, row.measured, row.promise, row.state)
    Console(width=110).print(table)
    return int(any(row.kept is False for row in rows))


if __name__ == "__main__":
    logging.getLogger("iimm_callbacks").setLevel(logging.ERROR)
    sys.exit(main())
