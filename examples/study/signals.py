"""What the guard's looks see beyond accuracy, taken from their own forward pass.

    with Signals(model) as signals:
        trainer.train()
    signals.looks  # one dictionary per look: task -> three numbers

Of each task: the mean probability of the right class, the share of images whose prediction is still
that of the first look (which needs no labels), and the mean cosine of an image's embedding with its
first one. `grade_signals.py` tells what they add to a forecast. The package does not record them.
"""

from collections import defaultdict

import numpy as np
import torch.nn.functional as F

from iimm_callbacks.models.wrappers import find_dual_encoder
from iimm_callbacks.probing.scoring import Sums

NAMES = ("probability", "agreement", "cosine")


class Signals:
    """Watches every batch that a probe of this model scores; for the study only.

    Attributes:
        looks: Task -> means of `NAMES` over its images, one dictionary per look.
    """

    def __init__(self, model):
        self._scale = find_dual_encoder(model).logit_scale
        self._first = {}  # (task, position) -> embeddings and predictions of the first look
        self._sums = []  # of each look: task -> sums over its images, and their number

    @property
    def looks(self):
        return [
            {task: (row[:-1] / row[-1]).round(6).tolist() for task, row in sums.items()}
            for sums in self._sums
        ]

    def __enter__(self):
        self._add = add = Sums.add
        seen = set()

        def watch(sums, batch, images, texts, shown, logits):
            key = shown.task.name, batch.first
            if not self._sums or key in seen:
                seen.clear()
                self._sums.append(defaultdict(lambda: np.zeros(len(NAMES) + 1)))
            seen.add(key)
            self._sums[-1][shown.task.name] += self._see(key, images, texts, shown)
            add(sums, batch, images, texts, shown, logits)

        Sums.add = watch
        return self

    def __exit__(self, *_):
        Sums.add = self._add

    def _see(self, key, images, texts, shown):
        images, texts = F.normalize(images.float()), F.normalize(texts.float())
        logits = self._scale.detach().exp() * images @ texts.T
        labels = shown.labels[key[1] : key[1] + len(images)]
        guesses = logits.argmax(1)
        first_images, first_guesses = self._first.setdefault(key, (images, guesses))
        values = (
            logits.softmax(1).gather(1, labels[:, None]).sum(),
            (guesses == first_guesses).sum(),
            (images * first_images).sum(),
            len(images),
        )
        return np.array([float(value) for value in values])
