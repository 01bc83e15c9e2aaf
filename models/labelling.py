"""Labels of synthetic pictures: predicted, filtered, relabelled, sharpened (Syn4Seg spec §2-3; Y0 -> Y1 -> Y2 -> Y*).

Y0 is what the base segmenter with registered novel prototypes says; novel classes that the prompt does not name are out
of the question. APF frees its novel regions that are unlike the supports, APR labels anew what is clear, SABR lets SAM
redraw the outlines. Each step can be left out, and none of them touches a picture: sweeping them redraws nothing.

Legend: H x W pixels of a picture, h x w cells, C channels of the trunk, K classes of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
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

    views: random views of each support that λ is read from. seed: of those views. calibrate: the share of the way to
    the offset of a novel logit with which Y0 fits the supports' masks best (`novel_offsets`); 0: none, as published.
    """

    upto: str = "sabr"
    calibrate: float = 0.0
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


@torch.inference_mode()
def novel_offsets(model: Generalised, supports: Sequence[Support], logits: Callable[[np.ndarray], Tensor]) -> Tensor:
    """What to add to the novel logits so that argmax fits the supports' masks best: [C], 0 for all other classes.

    Base training calls novel objects background, and a prototype in the head is no answer to that: it wins nearly
    everywhere, or hardly anywhere. A support's mask says where its class is and, by the rest, where it is not. Over the
    pixels of all supports of a class, the offset is the one with the largest IoU. A handful of pictures says too much
    about themselves, so that callers go a share of the way.

    logits: a picture uint8 [H, W] or [H, W, 3] -> [1, C, H, W].
    """
    space, found = model.space, torch.zeros(len(model.space.ids))
    known = [n for n, k in enumerate(space.ids) if k not in space.novel]
    for k in space.novel:
        n, margins, truths = space.ids.index(k), [], []
        for support in supports:
            truth = torch.from_numpy(support.label == k)
            if truth.any():
                said = logits(support.picture)[0]
                margins.append((said[n] - said[known].amax(0)).flatten())
                truths.append(truth.flatten())
        found[n] = -best_threshold(torch.cat(margins), torch.cat(truths))
    return found


def best_threshold(scores: Tensor, truth: Tensor) -> float:
    """The threshold of scores [N] above which pixels overlap best (IoU) with the true ones, bool [N], at least one."""
    falling, order = scores.sort(descending=True)
    hits = truth[order].cumsum(0)
    taken = torch.arange(1, len(scores) + 1)
    best = int((hits / (truth.sum() + taken - hits)).argmax())
    return float(falling[best : best + 2].mean())


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
        self.offsets = settings.calibrate * novel_offsets(model, supports, self._logits) if settings.calibrate else None

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

    def _logits(self, picture: np.ndarray, embedded: Tensor | None = None) -> Tensor:
        """[1, C, H, W] of a picture, on the CPU."""
        embedded = self._embedded(picture) if embedded is None else embedded
        logits = stretched(self.model.trunk.classify(embedded), self.canvas.size)
        return self.canvas.restore(logits, *picture.shape[:2]).cpu()

    @torch.inference_mode()
    def _in_features(self, picture: np.ndarray, target: int) -> dict[str, np.ndarray]:
        """The label after each step that needs only features."""
        embedded = self._embedded(picture)
        logits = self._logits(picture, embedded)
        if self.offsets is not None:
            logits = logits + self.offsets[:, None, None]
        steps = {"predict": predict(logits, self.model.space, (target,))[0].numpy()}
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
