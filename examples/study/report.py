"""What the recorded runs say: IIMM and other predictors against gain and forgetting.

    python examples/study/report.py                              # the runs that ship, 20 seconds
    python examples/study/report.py --outcomes outcomes.jsonl    # your own, of the shipped sample

Writes RESULTS.md and three pictures to `--output_dir`. The figures come from
analysis.py, their form from tables.py and plots.py.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from analysis import groups_of, relations_of
from plots import draw
from tables import (
    explained_table,
    extreme_table,
    heading,
    left_out_tables,
    line_table,
    method_table,
    outcome_table,
    predictor_table,
    relation_tables,
    seed_table,
    share_table,
    summary,
)
from transformers import HfArgumentParser

from iimm_callbacks import read_outcomes, sample
from iimm_callbacks.measures.transferability import SCORES
from iimm_callbacks.models.encoders import find_encoder, undisturbed
from iimm_callbacks.models.wrappers import model_fingerprint


@dataclass
class Settings:
    outcomes: str = field(default="", metadata={"help": "JSON lines; default: those that ship"})
    output_dir: str = field(
        default=str(Path(__file__).parent), metadata={"help": "Where RESULTS.md and pictures go"}
    )


def unit_embeddings(model, task):
    """The task's image embeddings as the model classifies them, of length 1, and their labels."""
    encoder = find_encoder(model, sample.load_processor())
    positions = task.subset()  # the images of the measurement; here the whole split
    with undisturbed(model):
        embeds = encoder.embed_images(model, encoder.preprocess(task.images(positions)))
    embeds = embeds.double().numpy()  # [N, D]
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True), task.labels(positions)


def transferability_scores(tasks):
    """Score -> task -> value, on the test split with the untouched sample."""
    model = sample.load_model()
    embedded = {name: unit_embeddings(model, sample.load_task(name)) for name in tasks}
    return {
        score: {name: function(*embedded[name]) for name in tasks}
        for score, function in SCORES.items()
    }


def markdown(outcomes, scores, command="python examples/study/report.py"):
    """All tables as one Markdown page; `scores` is name -> task -> value and may be empty."""
    finished = [o for o in outcomes if o.complete]
    groups = groups_of(finished)
    relations = {(g.method, g.level): relations_of(g, scores) for g in groups}
    sections = [
        heading(finished, len(outcomes) - len(finished), command),
        explained_table(groups, relations),
        summary(groups, relations),
        outcome_table(groups),
        *relation_tables(groups, relations),
        extreme_table(groups),
        *left_out_tables(groups, scores),
        seed_table(groups),
        method_table(groups),
        share_table(groups),
        predictor_table(groups, scores),
        line_table(groups, relations),
    ]
    return "\n\n".join(sections) + "\n"


def main(argv=None):
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses(argv)
    chosen = read_outcomes(settings.outcomes) if settings.outcomes else sample.load_outcomes()
    fingerprint = model_fingerprint(sample.load_model())
    outcomes = [o for o in chosen if o.model_fingerprint == fingerprint]
    if not outcomes:
        raise ValueError(
            f"`outcomes` must hold runs of the shipped sample, got none among {len(chosen)}: the "
            "transferability scores are measured on that model"
        )
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    scores = transferability_scores(sorted({o.task for o in outcomes}))
    command = "python examples/study/report.py" + (" --outcomes ..." * bool(settings.outcomes))
    (folder / "RESULTS.md").write_text(markdown(outcomes, scores, command), encoding="utf-8")
    pictures = draw([o for o in outcomes if o.complete], folder)
    print(f"Written to {folder}: RESULTS.md, {', '.join(p.name for p in pictures)}")


if __name__ == "__main__":
    main(sys.argv[1:])
