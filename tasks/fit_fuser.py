"""Fit a fuser on the aligned pairs of the train split.

Test frames are never read. Classes that are novel in any of the given folds are unknown pixels to a fuser that learns
from labels, so that nothing of them reaches the few-shot learners by way of the fused picture.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import FUSERS, find
from models.errors import UsageError
from models.frames import Frames
from models.fusers.settings import FuserSettings, MaskSettings
from models.views import Views
from tasks import places
from tasks.checkpoints import Checkpoints, seed_step
from tasks.fanout import Compute
from tasks.freeze_encoder import GIVEN, found_weights
from tasks.stage import stage
from tasks.store import Ref, digest_of
from tasks.train import fit

if TYPE_CHECKING:
    import numpy as np

    from models.fusers.training import Pairs

KIND = "fuser"
CODE = ("models.fusers", "models.generators.pictures", "models.views", "tasks.fit_fuser")
LOG_EVERY = 10  # reading a loss waits for the GPU
CACHED = 2000  # frames a worker keeps in memory


@dataclass(frozen=True)
class FuserJob:
    """What a worker is told.

    folds: those whose novel classes are hidden. layer: the visible picture of a pair. weights: digest of the encoder's
    file. first: digest of the fuser whose Stage I is taken.
    """

    settings: FuserSettings
    folds: tuple[int, ...] = ()
    layer: str = "visible"
    weights: str = ""
    first: str = ""

    @property
    def seed(self) -> int:
        return self.settings.seed


@stage("fit_fuser")
def fit_fuser(
    frames: Ref, settings: FuserSettings, folds: Sequence[int], compute: Compute, synthetic: Ref | None = None
) -> Ref:
    """The folder of a fuser (`models.fusers.base.load_fuser` opens it), `history.parquet` beside it.

    synthetic: translations, of which the layer `settings.visible` serves where no train frame has a visible picture.
    Raises UsageError when there are no pairs to learn from, or the settings do not fit together.
    """
    if find(FUSERS, settings.fuser).trainer is None:
        return given(settings.fuser)
    store = places.store()
    opened = Frames.open(store.local(frames))
    real = any(opened.has(id, "visible") for id in opened.ids("train"))
    job = job_of(settings, folds, "visible" if real or synthetic is None else settings.visible)
    inputs = [frames] if job.layer == "visible" else [frames, synthetic]
    training_pairs(Views(opened, *map(store.local, inputs[1:])), job)
    return fit(fusion_loop, KIND, inputs, job, CODE, compute)


def job_of(settings: FuserSettings, folds: Sequence[int] = (), layer: str = "visible") -> FuserJob:
    """The job of these settings, less what only matters when fusing."""
    told = replace(settings, splits=(), visible="visible", steps=None, masks=found_masks(settings.masks))
    return with_weights(FuserJob(told, tuple(folds), layer))


def training_pairs(views: Views, job: FuserJob) -> list[str]:
    """Ids of the train frames with all that the fuser learns from. Raises UsageError when there are none."""
    frames, kind = views.frames, find(FUSERS, job.settings.fuser)
    layers = ("infrared", job.layer, *(("label",) if kind.needs_labels else ()))
    ids = [id for id in frames.ids("train") if all(views.has(id, layer) for layer in layers)]
    if not ids:
        wanted = " and ".join(layers)
        raise UsageError(f"{frames.dataset} has no train frames with {wanted}; choose data that has, or a control.")
    return ids


def with_weights(job: FuserJob) -> FuserJob:
    """The same with the weights file of `network`, if it names one, found (as `encoder.weights` is) and digested."""
    weights = job.settings.network.get("weights", "random")
    if weights in GIVEN:
        return job
    path = found_weights(weights)
    network = {**job.settings.network, "weights": str(path)}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(job, settings=replace(job.settings, network=network), weights=digest)


def found_masks(settings: MaskSettings) -> MaskSettings:
    """The same with paths that are relative looked up under $THERMOFUSE_DATA."""
    root = places.data_root()
    return replace(
        settings,
        folder=settings.folder and str(root / settings.folder),
        checkpoint=settings.checkpoint and str(root / settings.checkpoint),
    )


def fusion_loop(config: dict) -> None:
    """What each training worker runs: one step of the fuser's trainer at a time."""
    import torch

    job: FuserJob = config["settings"]
    settings, frames = job.settings, Frames.open(config["folders"][0])
    views = Views(frames, *config["folders"][1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_step(settings.seed, -1)  # the same start on every rank
    trainer = build(settings, frames).to(device)
    checkpoints = Checkpoints(config, settings.iterations, **trainer.parts("fuser"))
    draw = PairCrops(views, job)
    for step in range(checkpoints.restore(), settings.iterations):
        rng = seed_step(settings.seed, step, checkpoints.rank)
        losses = trainer.iterate(draw(rng).to(device), step)
        if step % LOG_EVERY == 0 or step + 1 == settings.iterations:
            checkpoints.log(step, **losses)
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoints.save(step + 1)
    checkpoints.finish(trainer.fuser.save)


def build(settings: FuserSettings, frames: Frames, trainer: str | None = None) -> Any:
    """The trainer of a fresh fuser (its own, or "module:attribute"); who segments knows classes and background.

    Raises UsageError when `network` names an argument that the fuser does not have.
    """
    from pkgutil import resolve_name

    kind = find(FUSERS, settings.fuser)
    arguments = {"classes": len(frames.classes) + 1} if kind.needs_labels else {}
    arguments |= settings.network
    try:
        fuser = kind(**arguments)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(kind).parameters))
        raise UsageError(f"fuser.network does not fit {settings.fuser} ({error}); it takes {known}.") from error
    if kind.needs_labels and settings.class_weights is None and settings.class_balance:
        settings = replace(settings, class_weights=balanced(frames, settings.class_balance))
    return resolve_name(trainer or kind.trainer)(settings, fuser)


def balanced(frames: Frames, power: float) -> tuple[float, ...]:
    """Weights of the classes, background first: (pixels of the largest / own pixels)^power in the labelled train
    frames, of whatever sizes; 1 for a class that none of them shows."""
    import numpy as np

    found, area = np.zeros(len(frames.classes) + 1), 0
    for id in (id for id in frames.ids("train") if frames.has(id, "label")):
        area += math.prod(frames.size(id))
        for label, count in frames.pixels(id).items():
            found[label] += count
    found[0] = area - found.sum()
    weights = np.divide(found.max(), found, out=np.ones_like(found), where=found > 0) ** power
    return tuple(weights.round(4).tolist())


class PairCrops:
    """Draws batches of pairs; keeps the frames it has read, and their masks."""

    def __init__(self, views: Views, job: FuserJob) -> None:
        from models.fusers.masks import MaskProvider

        self.views, self.frames, self.settings, self.layer = views, views.frames, job.settings, job.layer
        self.kind = find(FUSERS, job.settings.fuser)
        self.ids = training_pairs(views, job)
        self.novel = sorted({label for fold in job.folds for label in self.frames.novel(fold)})
        self.provider = MaskProvider(job.settings.masks, places.home() / "masks")
        self.layers = lru_cache(CACHED)(self._layers)

    def __call__(self, rng: np.random.Generator) -> Pairs:
        from models.fusers.training import crop_pair, stack_pairs

        s = self.settings
        chosen = [self.ids[i] for i in rng.integers(len(self.ids), size=s.batch)]
        return stack_pairs([crop_pair(self.layers(id), s.crop, s.scale, rng) for id in chosen])

    def _layers(self, id: str) -> dict[str, np.ndarray]:
        from models.episode import train_label

        layers = {"infrared": self.frames.infrared(id), "visible": self.views.picture(id, self.layer)}
        if self.kind.needs_labels:
            return layers | {"label": train_label(self.frames.label(id), self.novel, "ignore")}
        masks = self.provider.masks(layers["infrared"], layers["visible"], id)
        return layers | dict(zip(("mask_infrared", "mask_visible"), masks, strict=True))


def given(name: str) -> Ref:
    """A control, which needs no training: committed here."""
    store = places.store()
    digest = digest_of(KIND, [], name, CODE)
    if found := store.find(KIND, digest):
        return found
    draft = store.draft(KIND, digest)
    with tempfile.TemporaryDirectory() as folder:
        find(FUSERS, name)().save(Path(folder))
        draft.upload(Path(folder))
    return draft.commit(None, {}, count=1)
