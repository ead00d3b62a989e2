"""Classifiers on frozen embeddings, to be compared; `linear_probe.py` grades them.

Each is fitted to training images and returns scores [M, C] of others. Unit rows throughout: `x`
training images [N, D], `new` others [M, D], `t` classes [C, D], `y` labels [N], `s` logit scale.
`features` are those of several layers, as `linear_probe.py` reads them.
"""

import numpy as np
import torch
from scipy import optimize
from torch.nn import functional as F

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-8, 7))
LOGISTIC_PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, -1))
STEPS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
FOLDS = 5


def zero_shot(x, y, t, s, new):
    return s * new @ t.T


def nearest_mean(x, y, t, s, new):
    """The class whose mean training image is nearest by cosine."""
    return new @ F.normalize(F.one_hot(y, len(t)).float().T @ x, dim=1).T


class Ridge:
    """Ridge regression of targets [N, C]; leave-one-out predictions in closed form."""

    def __init__(self, x, target):
        self.x = x.double()
        values, self.basis = torch.linalg.eigh(self.x.T @ self.x)
        self.values = values.clamp_min(0)
        self.target = target.double()
        self.rotated = self.x @ self.basis
        self.moment = self.rotated.T @ self.target
        self.unit = float(self.values.mean())

    def weights(self, penalty):
        return self.basis @ (self.moment / (self.values + penalty * self.unit)[:, None])

    def left_out(self, penalty):
        """[N, C] predictions of each row from the others."""
        shrunk = 1 / (self.values + penalty * self.unit)
        leverage = (self.rotated**2 @ shrunk).clamp_max(1 - 1e-6)[:, None]
        fitted = (self.rotated * shrunk) @ self.moment
        return self.target - (self.target - fitted) / (1 - leverage)


def squared(scores, y):
    return float((F.one_hot(y, scores.shape[1]) - scores).square().sum())


def wrong(scores, y):
    """Images classified wrong; ties go to the lower squared error."""
    return int((scores.argmax(1) != y).sum()) + squared(scores, y) / (1e3 * scores.numel())


def log_loss(scores, y):
    return float(F.cross_entropy(scores, y))


def ridge_residual(x, y, t, s, new, criterion=squared, features=None):
    """Zero-shot probabilities plus a ridge regression of what they lack."""
    fitted_to, applied_to = features or (x, new)
    start = (s * x @ t.T).softmax(1).double()
    ridge = Ridge(fitted_to, F.one_hot(y, len(t)) - start)
    found = {p: criterion(start + ridge.left_out(p), y) for p in PENALTIES}
    after = (s * new @ t.T).softmax(1).double()
    best = min(found, key=found.get)
    if criterion(start, y) <= found[best]:
        return after
    return after + applied_to.double() @ ridge.weights(best)


def ridge_on_logits(x, y, t, s, new, features=None):
    """Zero-shot logits plus a step times that ridge; both by log-loss left out, as the package."""
    fitted_to, applied_to = features or (x, new)
    logits = (s * x @ t.T).double()
    ridge = Ridge(fitted_to, F.one_hot(y, len(t)) - logits.softmax(1))
    found = {}
    for penalty in PENALTIES:
        left_out = ridge.left_out(penalty)
        for step in STEPS:
            found[penalty, step] = log_loss(logits + step * left_out, y)
    penalty, step = min(found, key=found.get)
    after = (s * new @ t.T).double()
    if log_loss(logits, y) <= found[penalty, step]:
        return after
    return after + step * applied_to.double() @ ridge.weights(penalty)


def ridge_one_hot(x, y, t, s, new, features=None):
    """Ridge regression of centred one-hot labels; knows nothing of the class texts."""
    fitted_to, applied_to = features or (x, new)
    target = F.one_hot(y, len(t)).double()
    share, middle = target.mean(0), fitted_to.mean(0)
    ridge = Ridge(fitted_to - middle, target - share)
    penalty = min(PENALTIES, key=lambda p: squared(share + ridge.left_out(p), y))
    return share + (applied_to - middle).double() @ ridge.weights(penalty)


def ridge_part_anchored(x, y, t, s, new):
    """``a`` times the zero-shot probabilities plus ridge of the rest; ``a`` in [0, 1], left out."""
    truth, start = F.one_hot(y, len(t)).double(), (s * x @ t.T).softmax(1).double()
    found = {}
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        ridge = Ridge(x, truth - share * start)
        for penalty in PENALTIES:
            found[share, penalty] = squared(share * start + ridge.left_out(penalty), y), ridge
    (share, penalty), (_, ridge) = min(found.items(), key=lambda item: item[1][0])
    after = (s * new @ t.T).softmax(1).double()
    return share * after + new.double() @ ridge.weights(penalty)


def ridge_centred(x, y, t, s, new, unit=False):
    """As the package's, on features less their mean, which may then be scaled to length 1."""
    centred = x - x.mean(0), new - x.mean(0)
    if unit:
        centred = tuple(F.normalize(features, dim=1) for features in centred)
    return ridge_residual(x, y, t, s, new, features=centred)


def logistic(x, y, t, s, new, criterion=log_loss, features=None):
    """Logits ``s·x·t + x·v``, mean log-loss + ``λ‖v‖²`` (v = s·w), λ by 5-fold cross-validation."""
    fitted_to, applied_to = features or (x, new)
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(y)) % FOLDS)
    start = s * x @ t.T
    left_out = {penalty: torch.empty_like(start) for penalty in LOGISTIC_PENALTIES}
    for fold in range(FOLDS):
        here, rest = folds == fold, folds != fold
        path = _logistic_path(fitted_to[rest], y[rest], start[rest], LOGISTIC_PENALTIES)
        for penalty, v in path.items():
            left_out[penalty][here] = start[here] + fitted_to[here] @ v.T
    found = {penalty: criterion(scores, y) for penalty, scores in left_out.items()}
    best = min(found, key=found.get)
    after = s * new @ t.T
    if criterion(start, y) <= found[best]:
        return after
    stronger = [p for p in LOGISTIC_PENALTIES if p >= best]
    return after + applied_to @ _logistic_path(fitted_to, y, start, stronger)[best].T


def _logistic_path(x, y, start, penalties):
    """Penalty -> weights [C, D]; each fit starts from that of the next stronger penalty."""
    n, n_classes = start.shape
    truth = F.one_hot(y, n_classes).float()
    basis = None
    if x.shape[1] > n:  # the solution lies in the span of the images
        basis = torch.linalg.qr(x.T)[0]  # [D, N]
        x = x @ basis
    solved, v = {}, np.zeros(n_classes * x.shape[1])
    for penalty in sorted(penalties, reverse=True):

        def loss(flat, penalty=penalty):
            v = torch.from_numpy(flat).float().reshape(n_classes, -1)
            logp = (start + x @ v.T).log_softmax(1)
            value = -(truth * logp).sum() / n + penalty * v.square().sum()
            slope = (logp.exp() - truth).T @ x / n + 2 * penalty * v
            return float(value), slope.double().numpy().ravel()

        options = {"maxiter": 100, "ftol": 1e-6, "gtol": 1e-5}
        v = optimize.minimize(loss, v, jac=True, method="L-BFGS-B", options=options).x
        w = torch.from_numpy(v).float().reshape(n_classes, -1)
        solved[penalty] = w if basis is None else w @ basis.T
    return solved
