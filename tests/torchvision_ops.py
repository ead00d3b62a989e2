"""Import before anything that imports torchvision: makes one that was built for another torch load.

Such a torchvision cannot load its compiled operators, and its import fails where it refers to them.
Declared but empty they are enough: no transform runs them.
"""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:  # the main tests do without
    pass
except RuntimeError:
    for name in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{name}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
