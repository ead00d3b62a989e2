"""Put runs on record, so that the guard can forecast the next one.

    python examples/record_outcomes.py --output outcomes.jsonl     # about ten minutes, two cores

A forecast is fitted on finished runs of the same model and method. This fine-tunes the shipped
model on every shipped task with full fine-tuning and LoRA, guarded by the other tasks, and appends
one `Outcome` per run; runs that are in the file already are skipped. The file that ships with the
package was made by this very command. For a model of your own, loop over your own tasks likewise.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from guarded_finetune import Settings as RunSettings
from guarded_finetune import finetune
from transformers import HfArgumentParser

from iimm_callbacks import append_outcome, read_outcomes, sample


@dataclass
class Settings:
    output: str = field(default="outcomes.jsonl", metadata={"help": "JSON-lines file to append to"})
    methods: str = field(default="full,lora", metadata={"help": "Separated by commas"})
    tasks: str = field(default="", metadata={"help": "Separated by commas; default: all shipped"})
    steps: int = field(default=120, metadata={"help": "Optimizer steps of each run"})
    smoke: bool = field(default=False, metadata={"help": "A few steps each, to see that it runs"})


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    path = Path(settings.output)
    done = {(o.task, o.method) for o in read_outcomes(path)} if path.exists() else set()
    for task in settings.tasks.split(",") if settings.tasks else sample.task_names():
        for method in settings.methods.split(","):
            if (task, method) in done:
                continue
            run = RunSettings(task=task, method=method, steps=settings.steps, smoke=settings.smoke)
            guard, _ = finetune(run, outcomes=[])
            append_outcome(path, guard.outcome)
            o = guard.outcome
            print(f"{task}, {method}: gain {o.gain:+.3f}, forgetting {o.forgetting:+.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
