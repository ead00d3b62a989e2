"""Guarded runs under random kills and faults, each compared with one that was left in peace.

    python examples/soak.py                      # five minutes
    python examples/soak.py --minutes 60 --seed 1
    python examples/soak.py --smoke              # 10 seconds

Each run is a guarded Trainer on the shipped sample, 16 steps with dropout, in a process of its own
that the parent forks and may kill with SIGKILL at any moment. A run that was killed, or whose
training raised, is started again and goes on from its last complete checkpoint. In the end its
weights, losses, looks, verdicts and the outcome in the store must be those of the same run left in
peace, bit for bit (looks to 1e-5 where the probe ran out of memory). Only a look during which the
data set raised may be missing. Exits with 1 if anything else was lost. Five minutes on two cores:

            101 runs, 209 processes, 301 seconds
    ┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━┓
    ┃ what happened to them                     ┃ times ┃
    ┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━┩
    │ SIGKILL                                   │ 85    │
    │ started again after its end               │ 8     │
    │ a checkpoint is cut short                 │ 25    │
    │ pictures cannot be read from the start on │ 24    │
    │ the data set raises during a look         │ 17    │
    │ a tracker raises in on_log                │ 112   │
    │ the user's action raises                  │ 41    │
    │ the disk is full for the run file         │ 158   │
    │ out of memory in the probe                │ 118   │
    │ the training raises                       │ 17    │
    └───────────────────────────────────────────┴───────┘
    101 runs ended as if nothing had been: same weights, losses, 464 looks and verdicts, and one
    outcome each (saved 128 times).
    0 runs lost something.

Not among them, since it is known to lose something: a picture that cannot be read, twice in a row,
just while a run is gone on with; the guard is off from there on.
"""

import errno
import gc
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from guarded_finetune import last_complete_checkpoint
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from iimm_callbacks import IIMMCallback, ImageCollator, PromptClassifier, Task, sample
from iimm_callbacks.monitor import monitor as monitor_module
from iimm_callbacks.probing.probe import Probe
from iimm_callbacks.records import ledger as ledger_module
from iimm_callbacks.records.ledger import Past
from iimm_callbacks.records.outcomes import one_of_each_run
from iimm_callbacks.records.run_file import file_name, read_run
from iimm_callbacks.records.store import read_outcomes

STEPS = 16
PATIENCE = 120  # seconds for a run of two
OFF_TARGET = ("printed_letters", "arrow_directions", "emoji_groups")
FAULTS = {  # kind -> how likely it is where it can happen
    "the data set raises during a look": 0.2,
    "a tracker raises in on_log": 0.5,
    "the user's action raises": 0.5,
    "the disk is full for the run file": 0.5,
    "out of memory in the probe": 1.0,
    "the training raises": 0.003,
}
READ, TRACKER, ACTION, DISK, MEMORY, TRAINING = FAULTS
UNREADABLE, CUT = "pictures cannot be read from the start on", "a checkpoint is cut short"
KILL, LATE = "SIGKILL", "started again after its end"
CHECKPOINT = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINT += ("trainer_state.json",)  # in the order in which they are written


@dataclass
class Settings:
    minutes: float = field(default=5.0, metadata={"help": "How long; what has begun is ended"})
    seed: int = field(default=0, metadata={"help": "Of runs, faults and kills"})
    folder: str = field(default="", metadata={"help": "New, and kept; default: a temporary one"})
    smoke: bool = field(default=False, metadata={"help": "A few runs, to see that it runs"})


@dataclass(frozen=True)
class Spec:
    """A run. Equal ones must end equal, whatever happens to them on the way."""

    task: str
    seed: int
    every: int | float | str | None
    save_steps: int
    action: str  # "call": a function of the user's, which never stops
    unreadable: bool

    @property
    def faults(self):
        """Those that must not change its numbers."""
        kinds = set(FAULTS) if self.action == "call" else set(FAULTS) - {ACTION}
        # Where a look fails the next may stop the run, or expect the one after it elsewhere.
        return kinds - {READ} if self.action == "stop" or self.every == "epoch" else kinds


class Pictures:
    """(image, label) pairs in memory, as a user's data set; fails while `broken`."""

    def __init__(self, dataset, n):
        chosen = dataset.select(range(0, len(dataset), max(len(dataset) // n, 1)))
        self.pairs = [(row["image"].convert("RGB"), row["label"]) for row in chosen]
        self.targets = [label for _, label in self.pairs]
        self.classes = dataset.features["label"].names
        self.broken = lambda: False

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, position):
        if self.broken():
            raise OSError(errno.ESTALE, "stale file handle")
        return self.pairs[position]


class World:
    """What all runs share: made once, before the first fork."""

    def __init__(self):
        self.model, self.processor = sample.load_model(), sample.load_processor()
        for module in self.model.modules():  # so that a wrong random stream would show
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.1
        self.outcomes = sample.load_outcomes()
        names = sample.task_names()
        self.train = {name: Pictures(sample.load_dataset(name, "train"), 60) for name in names}
        self.test = {name: Pictures(sample.load_dataset(name), 24) for name in names}

    def task(self, name):
        return Task(name, self.test[name], templates=sample.templates(name))


class Faults:
    """Decides which of them happen in one attempt, and leaves a line for each that does."""

    def __init__(self, kinds, seed, path):
        self.kinds = kinds
        self.rng = random.Random(seed)
        self.path = path

    def strike(self, kind):
        if kind not in self.kinds or self.rng.random() >= FAULTS[kind]:
            return False
        with self.path.open("a") as file:
            file.write(f"{kind}\n")
        return True


class Tracker(TrainerCallback):
    """Raises for the guard's rows, and tells the parent how far the run is: a byte per step."""

    def __init__(self, faults, beats):
        self.faults = faults
        self.beats = beats

    def on_step_end(self, args, state, control, **kwargs):
        with self.beats.open("ab") as file:
            file.write(b".")

    on_train_begin = on_train_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_iimm" in logs and self.faults.strike(TRACKER):
            raise ConnectionError("the tracker's server is away")


def break_things(world, spec, faults):
    """Put the faults where they belong, for the life of this process."""
    looked_at = world.test[spec.task]
    if spec.unreadable:
        for pictures in (looked_at, world.test[OFF_TARGET[0]]):
            pictures.pairs[3] = (b"no picture", pictures.pairs[3][1])

    class FaultyProbe(Probe):
        def look(self, model, step, autocast_dtype=None, **settings):
            # If the first look fails the run does not begin; the last is then taken once more.
            fails = 0 < step < STEPS and faults.strike(READ)
            looked_at.broken = lambda: fails
            try:
                return super().look(model, step, autocast_dtype, **settings)
            finally:
                looked_at.broken = lambda: False

    def save_run(record, path, save=ledger_module.save_run):
        if faults.strike(DISK):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(record, path)

    def embed(pixel_values, embed=world.model.get_image_features, **kwargs):
        if not torch.is_grad_enabled() and len(pixel_values) > 5 and faults.strike(MEMORY):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embed(pixel_values=pixel_values, **kwargs)

    world.train[spec.task].broken = lambda: faults.strike(TRAINING)
    monitor_module.Probe = FaultyProbe
    ledger_module.save_run = save_run
    world.model.get_image_features = embed


def attempt(world, spec, folder, faults, beats):
    """Train from the last complete checkpoint to the end; in a process of its own."""
    break_things(world, spec, faults)

    def pager(verdict):
        if faults.strike(ACTION):
            raise ConnectionError("the pager is off")

    task = world.task(spec.task)
    guard = IIMMCallback(
        task,
        [world.task(name) for name in OFF_TARGET],
        max_forgetting=0.04,
        action=pager if spec.action == "call" else spec.action,
        every=spec.every,
        max_overhead=None,  # else the looks would depend on the clock
        outcomes=Past(
            [o for o in world.outcomes if o.task != spec.task], folder.parent / "outcomes.jsonl"
        ),
        batch_size=16,
        cache_limit=0,  # so that pictures are read at every look
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        logging_steps=1,
        save_steps=spec.save_steps,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=spec.seed,
    )
    torch.manual_seed(spec.seed)
    trainer = Trainer(
        model=PromptClassifier(world.model, task, world.processor),
        args=arguments,
        train_dataset=world.train[spec.task],
        data_collator=ImageCollator(world.processor),
        processing_class=world.processor,
        callbacks=[Tracker(faults, beats), guard],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    if guard.monitor is None:
        raise RuntimeError("the guard was off")
    # Gone on with at its last step, the Trainer takes one more, of learning rate 0.
    log = [row for row in trainer.state.log_history if row["step"] <= STEPS]
    result = {
        "record": guard.record(),
        "losses": [(row["step"], row["loss"]) for row in log if "loss" in row],
        "outcome": asdict(guard.outcome),
        "weights": world.model.state_dict(),
    }
    torch.save(result, folder / "result.pt")


def fork(function, log):
    """The id of a process that does it; what that prints goes to a file."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()  # a run that failed saves itself
        sys.stdout.flush()
        os._exit(code)


def wait(pid, seconds, until=lambda: False):
    """Its exit code; None where it still runs after that long, or once `until` holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.004)
    return None


def cut_short(folder, rng):
    """Make of the newest checkpoint what a kill while it is written does; False: there is none."""
    newest = last_complete_checkpoint(folder)
    if newest is None:
        return False
    paths = [Path(newest) / name for name in CHECKPOINT]
    at = rng.randrange(len(paths))
    whole = paths[at].read_bytes()
    paths[at].write_bytes(whole[: rng.randrange(len(whole))])
    for path in paths[at + 1 :]:
        path.unlink()
    return True


class Soak:
    """Runs, what happened to them, and what was lost by it."""

    def __init__(self, folder, seed):
        self.world = World()
        self.folder = folder
        self.rng = random.Random(seed)
        self.references = {}
        self.counts = Counter()
        self.lost = []

    def start(self, spec, folder, kinds, name):
        faults = Faults(kinds, self.rng.random(), folder / f"faults-{name}.log")
        faults.path.touch()
        beats = folder / f"beats-{name}"
        beats.touch()
        pid = fork(lambda: attempt(self.world, spec, folder, faults, beats), folder / "log.txt")
        return pid, faults.path, beats

    def reference(self, spec):
        """What becomes of the run undisturbed."""
        if spec not in self.references:
            folder = self.folder / f"reference-{len(self.references)}"
            folder.mkdir(parents=True)
            if wait(self.start(spec, folder, (), 1)[0], PATIENCE) != 0:
                sys.exit(f"an undisturbed run failed, see {folder}/log.txt")
            self.references[spec] = torch.load(folder / "result.pt", weights_only=False)
        return self.references[spec]

    def watch(self, pid, beats, doomed):
        """Its exit code; it may be killed at a random moment. None: it hung."""
        if doomed:
            moment = self.rng.randrange(STEPS + 2)
            code = wait(pid, PATIENCE, lambda: beats.stat().st_size >= moment)
            code = wait(pid, self.rng.uniform(0, 0.3)) if code is None else code
        else:
            code = wait(pid, PATIENCE)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL if doomed else None
        return code

    def run(self, spec):
        """One run, until it has ended or is lost."""
        reference = self.reference(spec)
        folder = self.folder / f"run-{self.counts['runs']:05d}"
        folder.mkdir()
        self.counts["runs"] += 1
        self.counts[UNREADABLE] += spec.unreadable
        kills, again = self.rng.choice((0, 1, 1, 2, 3)), self.rng.random() < 0.1
        attempts, struck, problems = 0, set(), []
        while not problems:
            attempts += 1
            kinds = [k for k in FAULTS if k in spec.faults and self.rng.random() < 0.4]
            pid, log, beats = self.start(spec, folder, kinds if attempts < 9 else (), attempts)
            code = self.watch(pid, beats, doomed=kills > 0)
            seen = log.read_text().split("\n")[:-1]
            self.counts.update(seen)
            struck.update(seen)
            problems += damage(folder / file_name(spec.task))
            if code == 0 and not again:
                break
            if code == 0:
                again = False
                self.counts[LATE] += 1
            elif code == -signal.SIGKILL:
                kills -= 1
                self.counts[KILL] += 1
                self.counts[CUT] += self.rng.random() < 0.3 and cut_short(folder, self.rng)
            elif TRAINING not in seen:
                problems.append("it hung" if code is None else f"it ended with code {code}")
        self.counts["attempts"] += attempts
        if not problems:
            result = torch.load(folder / "result.pt", weights_only=False)
            self.counts["looks"] += len(result["record"]["looks"])
            problems += differences(result, reference, struck)
            problems += self.misrecorded(result["outcome"], attempts)
            if DISK not in seen and read_run(folder / file_name(spec.task)) != result["record"]:
                problems.append("the run file lags behind")
            (folder / "result.pt").unlink()
        self.lost += [f"{folder.name}: {problem}" for problem in problems]
        self.counts["lost"] += bool(problems)
        if not problems:
            shutil.rmtree(folder)

    def misrecorded(self, outcome, attempts):
        """What is wrong with its outcome in the store."""
        store = read_outcomes(self.folder / "outcomes.jsonl")
        found = [asdict(o) for o in store if o.run == outcome["run"]]
        counts = [asdict(o) for o in one_of_each_run(store) if o.run == outcome["run"]]
        self.counts["lines"] += len(found)
        if counts != [outcome]:
            return [f"{len(counts)} outcomes count, of {len(found)} saved"]
        return [] if len(found) <= attempts else [f"{len(found)} outcomes of {attempts} attempts"]

    def report(self, seconds):
        counts, console = self.counts, Console(width=96)
        title = f"{counts['runs']} runs, {counts['attempts']} processes, {seconds:.0f} seconds"
        table = Table("what happened to them", "times", title=title)
        for kind in (KILL, LATE, CUT, UNREADABLE, *FAULTS):
            table.add_row(kind, str(counts[kind]))
        console.print(table)
        console.print(
            f"{counts['runs'] - counts['lost']} runs ended as if nothing had been: same weights, "
            f"losses, {counts['looks']} looks and verdicts, and one outcome each (saved "
            f"{counts['lines']} times).",
            f"{counts['lost']} runs lost something.",
            *self.lost,
            sep="\n",
        )


def damage(run_file):
    """What is wrong with a run file: it is whole or not there."""
    try:
        if run_file.exists():
            read_run(run_file)
    except ValueError as error:
        return [str(error)]
    return []


def differences(result, reference, struck):
    """What a disturbed run lost or changed."""
    found = []
    rows = {row["step"]: row for row in result["record"]["looks"]}
    expected = {row["step"]: row for row in reference["record"]["looks"]}
    missing, failed = sorted(expected.keys() - rows.keys()), result["record"]["failures"]
    # One that failed at the end of an epoch is taken again where the run goes on from there.
    if len(missing) > failed or (failed and READ not in struck):
        found.append(f"looks are missing at steps {missing}, {failed} failed")
    for step, row in rows.items():
        if not same_look(row, expected.get(step, {}), exactly=MEMORY not in struck):
            found.append(f"look at step {step}: {row} instead of {expected.get(step)}")
    if result["losses"] != reference["losses"]:
        found.append("other losses")
    weights = reference["weights"]
    if any(not torch.equal(value, weights[name]) for name, value in result["weights"].items()):
        found.append("other weights")
    for name in ("complete", "ended", "final_accuracy", "off_target_after", "method"):
        ours, theirs = result["outcome"][name], reference["outcome"][name]
        if ours != theirs:
            found.append(f"outcome: {name} {ours} instead of {theirs}")
    return found


def same_look(row, expected, exactly):
    """But for the clock; a batch in parts may round otherwise in the last digits."""
    keys = (row.keys() | expected.keys()) - {"time", "eval_iimm_runtime"}
    if exactly:
        return all(row.get(key) == expected.get(key) for key in keys)
    numbers = [key for key in keys if isinstance(expected.get(key), float)]
    return row["level"] == expected.get("level") and all(
        abs(row.get(key, torch.inf) - expected[key]) < 1e-5 for key in numbers
    )


def make_specs(rng, n):
    """Runs to choose from: few, since each needs an undisturbed one of its own."""
    actions = [("warn", "call", "stop")[i % 3] for i in range(n)]
    return [
        Spec(
            task=rng.choice(("handwritten_digits", "printed_digits")),
            seed=rng.randrange(1000),
            every=(None, 3, 0.25, "epoch")[i % 4],
            save_steps=rng.choice((1, 2, 3)),
            action=action,
            unreadable=i % 5 == 1,
        )
        for i, action in enumerate(actions)
    ]


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    torch.set_num_threads(1)  # threads do not survive a fork
    gc.freeze()  # else each `Trainer.train` walks all imports to collect garbage
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("iimm_callbacks").setLevel(logging.ERROR)
    folder = Path(settings.folder or tempfile.mkdtemp(prefix="soak-"))
    rng = random.Random(settings.seed)
    specs = make_specs(rng, 1 if settings.smoke else 12)
    soak, start, seconds = Soak(folder, settings.seed), time.monotonic(), 60 * settings.minutes
    while soak.counts["runs"] < 1 if settings.smoke else time.monotonic() - start < seconds:
        soak.run(rng.choice(specs))
    soak.report(time.monotonic() - start)
    if soak.lost:
        sys.exit(f"See {folder}")
    if not settings.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
