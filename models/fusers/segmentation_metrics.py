"""mIoU of closed-set segmentation, under the protocols in use for fused pictures.

One confusion matrix over the whole test set; IoU_c = TP / (TP + FP + FN). A class with neither a true nor a predicted
pixel has no IoU and enters no mean.

    all       every class, background (id 0, "unlabelled") included
    fg        without background
    present   without background and without classes that have no true pixel, even if they were predicted

Which of them a paper used is rarely said, and they differ by points: name the protocol beside each number.

Legend: B images, H W pixels, K classes with background; labels are class ids with 255 unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.errors import UsageError
from models.losses import IGNORE

PROTOCOLS = ("all", "fg", "present")


def confusion(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Counts int64 [K,K], true class down, predicted class across, of [B,H,W] class ids each; 255 counts nowhere.

    Raises UsageError when the sizes differ, or ids lie beyond K.
    """
    if prediction.shape != label.shape:
        sizes = f"{list(prediction.shape)} and {list(label.shape)}"
        raise UsageError(f"Prediction and label differ in size ({sizes}); restore the label's size first.")
    known = label != IGNORE
    pairs = torch.stack([label[known].long(), prediction[known].long()])
    if pairs.numel() and int(pairs.max()) >= classes:
        raise UsageError(f"There are class ids up to {int(pairs.max())}, but {classes} classes; give the right number.")
    return torch.bincount(pairs[0] * classes + pairs[1], minlength=classes**2).view(classes, classes)


def class_iou(counts: Tensor) -> Tensor:
    """float64 [K] of a confusion matrix [K,K]; NaN for a class with neither a true nor a predicted pixel."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - both)


def mean_iou(counts: Tensor, protocol: str) -> float:
    """mIoU in 0..1 under a protocol of PROTOCOLS; NaN when no class is left. Raises UsageError for other names."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"There is no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    iou = class_iou(counts)
    if protocol != "all":
        iou = iou[1:]
    if protocol == "present":
        iou = iou[counts.sum(1)[1:] > 0]
    return float(iou.nanmean())


def all_protocols(counts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """mIoU under every protocol, and the IoU of every class of `names` (background first), ready for a table."""
    means = {f"miou_{protocol}": mean_iou(counts, protocol) for protocol in PROTOCOLS}
    return means | {f"iou_{name}": float(value) for name, value in zip(names, class_iou(counts), strict=True)}
