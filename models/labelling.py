"""Labels of synthetic pictures: predicted, filtered, relabelled, sharpened (Syn4Seg spec §2-3; Y0 -> Y1 -> Y2 -> Y*).

Y0 is what the base segmenter with registered novel prototypes says; novel classes that the prompt does not name are out
of the question. APF frees its novel regions that are unlike the supports, APR labels anew what is clear, SABR lets SAM
redraw the outlines. Each step can be left out, and none of them touches a picture: sweeping them redraws nothing.

Legend: H x W pixels of a picture, h x w cells, C channels of the trunk, K classes of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn.functional import normalize

from models.backbone import Encoder
from models.boundary import BoundarySettings, sharpen
from models.errors import UsageError
from models.geometry import Canvas, as_image
from models.prototypes import SYN4SEG, ClassPrototypes, Support, support_prototypes
from models.pseudolabels import IGNORE, RefineSettings, prototype_filter
from models.relabel import RelabelSettings, accept, relabel
from models.sam import BoxSegmenter, rgb
from models.segmenters.generalised import Generalised, predict, stretched

LAST = {"predict": "predict", "ape": "apr", "sabr": "sabr"}
"""How far labelling goes, and the step whose label that ends with."""
UNCALIBRATED = replace(SYN4SEG, lam=SYN4SEG.fallback)  # for callers that want prototypes alone


@dataclass(frozen=True)
class LabelSettings:
    """upto: "predict" (Y0 as it is), "ape" (and APF, APR) or "sabr" (and SAM). stretch: contrast for SAM, of infrared.

    views: random views of each support that λ is read from. seed: of those views. split: Y0 calls those pixels novel
    where the prompted class leads by more than splits the picture best (`split_at`), not where it leads at all, as
    published.
    """

    upto: str = "sabr"
    split: bool = False
    filter: RefineSettings = SYN4SEG
    relabel: RelabelSettings = field(default_factory=RelabelSettings)
    boundary: BoundarySettings = field(default_factory=BoundarySettings)
    stretch: bool = False
    views: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.upto not in LAST:
            raise UsageError(f"There is no labelling step {self.upto!r}; choose one of {', '.join(LAST)}.")


@dataclass(frozen=True)
class Labelled:
    """One picture's label after each step, in order: uint8 [H, W] of class ids (255 unknown), and whether it is fit for
    training (`models.relabel.accept`). facts: shares of pixels: kept after APF, free after APR, changed by SABR."""

    steps: dict[str, np.ndarray]
    statuses: dict[str, str]
    facts: dict[str, float]

    @property
    def label(self) -> np.ndarray:
        return list(self.steps.values())[-1]

    @property
    def status(self) -> str:
        return list(self.statuses.values())[-1]


def register_supports(
    model: Generalised, encoder: Encoder, supports: Sequence[Support], canvas: Canvas,
    settings: RefineSettings = UNCALIBRATED, views: int = 32, seed: int = 0,
) -> ClassPrototypes:
    """Prototypes by class id, novel ones of the supports, background and base ones the head's own rows; the novel ones
    become rows of the head. Thresholds as `models.prototypes` finds them.

    Raises UsageError when a novel class has no support.
    """

    @torch.inference_mode()
    def describe(image: Tensor) -> Tensor:
        return normalize(model.embed(encoder(image[None].to(encoder.mean.device)))[0].cpu(), dim=0)

    model.eval()
    rows, novel = model.rows(), list(model.space.novel)
    found = support_prototypes(supports, describe, len(rows), canvas, settings, views, seed)
    if not found.prototypes[novel].any(1).all():
        raise UsageError("A novel class has no support with a pixel of it; draw other supports.")
    rows[novel] = found.prototypes[novel]
    model.register_novel(rows[novel].to(model.trunk.classify.weight.device))
    return replace(found, prototypes=rows)


def split_at(lead: Tensor) -> float:
    """The threshold that splits leads [...] of the prompted class over the best other one into two groups that differ
    most: Otsu, "A threshold selection method from gray-level histograms", 1979.

    A prototype in the head knows no level: base training calls novel objects background, and beside that row it wins
    nearly everywhere, or hardly anywhere, as the picture's ground has it. But a picture that was asked to show a class
    shows it and its ground, and the two differ. Without a difference, 0.
    """
    values = lead.numpy()
    return float(threshold_otsu(values)) if values.max() > values.min() else 0.0


class Labeller:
    """Holds a base segmenter, its encoder, the supports' prototypes, and a segmenter for SABR (None: not asked)."""

    def __init__(
        self, model: Generalised, encoder: Encoder, supports: Sequence[Support], canvas: Canvas,
        segmenter: BoxSegmenter | None, settings: LabelSettings,
    ) -> None:
        if settings.upto == "sabr" and segmenter is None:
            raise UsageError("SABR needs a SAM; name its weights, or label up to ape.")
        self.model, self.encoder, self.canvas = model.eval(), encoder, canvas
        self.segmenter, self.settings = segmenter, settings
        self.known = register_supports(model, encoder, supports, canvas, self._filter(), settings.views, settings.seed)

    def _filter(self) -> RefineSettings:
        """The filter's scope "foreground" means the novel classes here: only they are guessed from supports."""
        chosen = self.settings.filter
        return replace(chosen, scope=self.model.space.novel) if chosen.scope == "foreground" else chosen

    def label(self, pictures: Sequence[np.ndarray], targets: Sequence[int]) -> list[Labelled]:
        """Labels of pictures uint8 [H, W] or [H, W, 3], each asked to show one novel class; SAM sees them together."""
        steps = [self._in_features(picture, target) for picture, target in zip(pictures, targets, strict=True)]
        if self.settings.upto == "sabr":
            shown = [rgb(picture, self.settings.stretch) for picture in pictures]
            before = [one["apr"] for one in steps]
            sharpened = sharpen(shown, before, self.segmenter, self.settings.boundary)
            steps = [one | {"sabr": after.label} for one, after in zip(steps, sharpened, strict=True)]
        return [self._judged(one, target) for one, target in zip(steps, targets, strict=True)]

    @torch.inference_mode()
    def gate(self, picture: np.ndarray, label: np.ndarray) -> np.ndarray:
        """A label of `picture` uint8 [H, W] without the regions that are unlike the supports in it: APF alone."""
        features = normalize(self._embedded(picture)[0].cpu(), dim=0)
        known = self.known
        return prototype_filter(label, features, known.prototypes, known.thresholds, self._filter()).label

    def _embedded(self, picture: np.ndarray) -> Tensor:
        image = self.canvas.image(as_image(picture)[None]).to(self.encoder.mean.device)
        return self.model.embed(self.encoder(image))

    def _predicted(self, embedded: Tensor, size: tuple[int, int], target: int) -> np.ndarray:
        """Y0 of a picture of that size."""
        space = self.model.space
        logits = stretched(self.model.trunk.classify(embedded), self.canvas.size)
        logits = self.canvas.restore(logits, *size).cpu()
        if self.settings.split:
            asked, known = space.ids.index(target), [n for n, k in enumerate(space.ids) if k not in space.novel]
            logits[:, asked] -= split_at(logits[0, asked] - logits[0, known].amax(0))
        return predict(logits, space, (target,))[0].numpy()

    @torch.inference_mode()
    def _in_features(self, picture: np.ndarray, target: int) -> dict[str, np.ndarray]:
        """The label after each step that needs only features."""
        embedded = self._embedded(picture)
        steps = {"predict": self._predicted(embedded, picture.shape[:2], target)}
        if self.settings.upto == "predict":
            return steps
        features, known = normalize(embedded[0].cpu(), dim=0), self.known
        kept = prototype_filter(steps["predict"], features, known.prototypes, known.thresholds, self._filter())
        steps["apf"] = kept.label
        steps["apr"] = relabel(kept.label, features, known.prototypes, self.settings.relabel, (target,)).label
        return steps

    def _judged(self, steps: dict[str, np.ndarray], target: int) -> Labelled:
        label = list(steps.values())[-1]
        last = steps.get("apr", label)
        facts = {"kept": _share(steps.get("apf", label) != IGNORE), "free": _share(last == IGNORE),
                 "changed": _share(label != last), "target": _share(label == target)}
        statuses = {name: accept(one, target, self.settings.relabel) for name, one in steps.items()}
        return Labelled(steps, statuses, facts)


def _share(mask: np.ndarray) -> float:
    return round(float(np.count_nonzero(mask) / mask.size), 6)


def label_counts(label: np.ndarray, truth: np.ndarray, k: int) -> tuple[int, int, int, int, int]:
    """Pixels of class k against the truth: in both, in either, in the label, labelled at all among the true, true.

    Where the truth is 255 nothing counts; an unknown pixel of the class counts as missed.
    """
    said, there = (label == k) & (truth != IGNORE), truth == k
    both, either, seen = said & there, said | there, there & (label != IGNORE)
    return tuple(int(np.count_nonzero(mask)) for mask in (both, either, said, seen, there))


def label_quality(
    before: Sequence[np.ndarray], truth: Sequence[np.ndarray], classes: Sequence[int],
) -> dict[str, float]:
    """How good labels are against the truth, over `classes`: mean IoU, precision and coverage (the share of true pixels
    of the classes that has any label at all)."""
    pairs = list(zip(before, truth, strict=True))
    counts = np.array([[label_counts(label, true, k) for k in classes] for label, true in pairs], float).sum(0)
    both, either, said, seen, there = counts.reshape(len(classes), 5).T
    means = {"miou": (both, either), "precision": (both, said), "coverage": (seen, there)}
    return {name: float(np.nanmean(np.divide(x, y, out=np.full(len(x), np.nan), where=y > 0)))
            for name, (x, y) in means.items()}
