"""Fit the segmenter of base and novel classes: first on base classes alone, then on base, synthetic and support frames.

Base training hides novel objects as background (`models.segmenters.joint` gives them back where it sees them).
The joint training starts from the base model with the novel classes registered by their supports' prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.backbone import Encoder, load_encoder
from models.episode import class_index, draw, number, train_label
from models.errors import UsageError
from models.frames import Frames, read_png
from models.geometry import Canvas
from models.labelling import LAST, register_supports
from models.paste import paste
from models.segmenters.generalised import ClassSpace, Generalised, load_model, save_model
from models.segmenters.joint import (
    ROLES,
    JointBatch,
    JointSettings,
    base_step,
    joint_keys,
    joint_step,
    optimiser_of,
)
from models.views import FeatureBank
from tasks.checkpoints import Checkpoints, seed_step
from tasks.fanout import Compute
from tasks.imagine import unfold
from tasks.label import LABEL_COLUMNS, only, support_pictures
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import fit

CODE = ("tasks.train_generalised", "models.backbone", "models.segmenters.generalised", "models.segmenters.joint",
        "models.segmenters.pspnet", "models.losses", "models.views", "models.episode", "models.geometry",
        "models.paste")
LOG_EVERY = 20
PASTED, PASTED_SUPPORT = 3, 100  # frames that what a picture shows, or without pictures a support, comes pasted on
KEPT = 1024  # labels of pasted pictures, a byte a pixel


@dataclass(frozen=True)
class GeneralisedSettings:
    """size: the encoder's input [H, W]. layer: "infrared" or "visible", of all frames. width: of the trunk.

    steps, batch, rate: of base training (Adam, polynomial decay). joint: of joint training. support_labels: "target"
    (only the novel class of a support is known, as in DIaM) or "all" (as in CAPL).
    """

    size: tuple[int, int] = (360, 480)
    layer: str = "infrared"
    width: int = 512
    steps: int = 2000
    batch: int = 8
    rate: float = 1e-3
    joint: JointSettings = field(default_factory=JointSettings)
    support_labels: str = "target"
    checkpoint_every: int = 200
    cache_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.support_labels not in ("target", "all"):
            raise UsageError(f"support_labels is target or all, not {self.support_labels!r}.")


@dataclass(frozen=True)
class BaseJob:
    settings: GeneralisedSettings
    fold: int


@dataclass(frozen=True)
class JointJob:
    """supports: novel class -> ids. truth: real training frames with their masks take the place of synthetic ones.
    upto: how far the labelling went whose labels are learnt from (`models.labelling.LAST`). paste: what synthetic
    pictures show, or where there are none what the supports show, comes pasted on base frames (`models.paste`)."""

    settings: GeneralisedSettings
    fold: int
    supports: Mapping[int, tuple[str, ...]]
    truth: bool = False
    upto: str = "sabr"
    paste: bool = False


@stage("train_generalised_base")
def train_generalised_base(
    frames: Ref, encoder: Ref, settings: GeneralisedSettings, fold: int, compute: Compute,
) -> Ref:
    """The base model of one fold; kind "generalised_base": model.safetensors and config.json."""
    chosen = replace(settings, joint=JointSettings(), support_labels="target")  # no part of base training
    return fit(base_loop, "generalised_base", [frames, encoder], BaseJob(chosen, fold), CODE, compute)


@stage("train_joint")
def train_joint(
    frames: Ref, encoder: Ref, base: Ref, synthetic: tuple[Ref, Ref] | None, supports: Mapping[int, Sequence[str]],
    settings: GeneralisedSettings, fold: int, compute: Compute, truth: bool = False, upto: str = "sabr",
    paste: bool = False,
) -> Ref:
    """The model of one fold and one list of supports; kind "generalised". synthetic: the pictures (`tasks.imagine`) and
    their labels (`tasks.label`), or None for supports alone. truth: the ceiling, every training frame of the novel
    classes with its real mask. upto: which of the labels. paste: what the pictures show comes pasted on base
    frames, too; where there are none, what the supports show."""
    job = JointJob(settings, fold, {k: tuple(ids) for k, ids in supports.items()}, truth, upto, paste)
    inputs = [frames, encoder, base, *(synthetic or ())]
    return fit(joint_loop, "generalised", inputs, job, CODE, compute)


def base_loop(config: dict) -> None:
    """Every step: a batch of base frames, one step of cross-entropy."""
    job: BaseJob = config["settings"]
    settings, parts = job.settings, Parts.open(config["folders"], job.settings, job.fold)
    torch.manual_seed(settings.seed)
    model = Generalised(parts.encoder.channels, parts.space, settings.width).to(parts.device)
    optimiser = torch.optim.Adam(model.parameters(), settings.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, settings.steps, power=0.9)
    checkpoints = Checkpoints(config, settings.steps, model=model, optimiser=optimiser, schedule=schedule)
    for step in range(checkpoints.restore(), settings.steps):
        seed_step(settings.seed, step)
        ids = draw(parts.base, min(settings.batch, len(parts.base)), settings.seed, step, "base")
        features, label, _ = parts.batch([("base", id, 0) for id in ids])
        loss = base_step(model, optimiser, features, label)
        schedule.step()
        _note(checkpoints, step, settings.steps, settings.checkpoint_every, {"loss": loss})
    checkpoints.finish(lambda folder: save_model(folder, model, size=settings.size, layer=settings.layer))


def joint_loop(config: dict) -> None:
    """Every step: base, synthetic and support frames in one batch, one step of the joint loss."""
    job: JointJob = config["settings"]
    settings, told = job.settings, (job.truth, job.upto, job.paste)
    parts = Parts.open(config["folders"], settings, job.fold, *told, job.supports)
    joint = Joint(parts, config["folders"][2], settings, job.supports)
    checkpoints = Checkpoints(config, settings.joint.steps, model=joint.model, optimiser=joint.optimiser)
    for step in range(checkpoints.restore(), settings.joint.steps):
        _note(checkpoints, step, settings.joint.steps, settings.checkpoint_every, joint.step(step))
    checkpoints.finish(lambda folder: save_model(folder, joint.model, size=settings.size, layer=settings.layer))


class Joint:
    """One joint training: the base model with the supports registered, its frozen copy, and an optimiser."""

    def __init__(
        self, parts: Parts, base: Path, settings: GeneralisedSettings, supports: Mapping[int, Sequence[str]],
    ) -> None:
        self.parts, self.settings, self.supports = parts, settings, supports
        self.teacher = load_model(base).to(parts.device).frozen()
        self.model = load_model(base).to(parts.device)
        shown = support_pictures(parts.frames, settings.layer, supports)
        register_supports(self.model, parts.encoder, shown, parts.bank.canvas)
        self.optimiser = optimiser_of(self.model, settings.joint)

    def step(self, step: int) -> dict[str, Tensor]:
        """One step down the joint loss; returns the losses, detached. What it draws depends on (seed, step) alone."""
        chosen, parts = self.settings.joint, self.parts
        seed_step(self.settings.seed, step)
        keys = joint_keys(parts.base, parts.synthetic, self.supports, chosen.mix, self.settings.seed, step)
        batch = JointBatch(*parts.batch(keys))
        return joint_step(self.model, self.teacher, self.optimiser, batch, chosen, step)


def _note(checkpoints: Checkpoints, step: int, steps: int, every: int, losses: Mapping[str, Tensor]) -> None:
    if step % LOG_EVERY == 0 or step + 1 == steps:
        checkpoints.log(step, **losses)
    if (step + 1) % every == 0:
        checkpoints.save(step + 1)


# ---- pictures and labels


class Parts:
    """What both loops read: frames, an encoder, synthetic pictures with labels, and batches of all of them.

    synthetic: novel class -> ids of the pictures that are fit for training, by their labels at the end of `upto`. It
    stands in for `models.views.Views` in the feature bank; `bank`: one to share, which then reads these pictures.
    paste: beside each synthetic picture, what it shows is pasted on a few base frames, the same at every step; without
    synthetic pictures, what each of the supports (novel class -> ids) shows.
    """

    def __init__(
        self, frames: Frames, encoder: Encoder, synthetic: Sequence[Path], settings: GeneralisedSettings, fold: int,
        truth: bool = False, upto: str = "sabr", paste: bool = False,
        supports: Mapping[int, Sequence[str]] = MappingProxyType({}), bank: FeatureBank | None = None,
    ) -> None:
        self.frames, self.settings, self.encoder, self.last = frames, settings, encoder, LAST[upto]
        self.space = ClassSpace(frames.base(fold), frames.novel(fold))
        self.base = [id for id in frames.ids("train") if frames.has(id, settings.layer) and frames.has(id, "label")]
        self.files: dict[str, dict[str, Path]] = {}
        self.pasted: dict[str, tuple[str, str, int]] = {}
        self.synthetic: dict[int, list[str]] = {k: [] for k in self.space.novel}
        if synthetic:
            self._list(*synthetic)
        elif truth:
            self.synthetic |= class_index(frames, self.space.novel)
        if paste:
            self._place(self.synthetic if synthetic else supports, PASTED if synthetic else PASTED_SUPPORT)
        self.device = encoder.mean.device
        self.bank = bank or FeatureBank(encoder, self, Canvas(settings.size), int(settings.cache_gb * 2**30))
        self.bank.views = self
        self._pasted_label = lru_cache(KEPT)(lambda id: self._paste(id)[1])

    @classmethod
    def open(
        cls, folders: Sequence[Path], settings: GeneralisedSettings, fold: int, truth: bool = False, upto: str = "sabr",
        paste: bool = False, supports: Mapping[int, Sequence[str]] = MappingProxyType({}),
    ) -> Parts:
        encoder = load_encoder(folders[1]).to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(Frames.open(folders[0]), encoder, folders[3:], settings, fold, truth, upto, paste, supports)

    def _list(self, imagined: Path, labelled: Path) -> None:
        """Note the synthetic pictures whose labels are fit for training."""
        for row in unfold(pd.read_parquet(labelled / "rows.parquet"), LABEL_COLUMNS).to_dict("records"):
            if row["statuses"][self.last] == "ok":
                path = labelled / row["labels"][self.last]
                self.files[row["id"]] = {"picture": imagined / row["picture"], "label": path}
                self.synthetic[int(row["class_id"])].append(row["id"])

    def _place(self, sources: Mapping[int, Sequence[str]], frames: int) -> None:
        """Note on which base frames what each source shows is pasted."""
        for k, ids in sources.items():
            names = [(f"{id}-{k}-pasted{n}", id) for id in dict.fromkeys(ids) for n in range(frames)]
            self.pasted |= {name: (id, self.base[number(name) % len(self.base)], k) for name, id in names}
            self.synthetic[k] = [*self.synthetic[k], *(name for name, _ in names)]

    def _paste(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """A frame with what a synthetic picture or a support shows, and its label."""
        source, frame, k = self.pasted[id]
        picture, mask = self.picture(source, "support"), self.label(source, "support", k) == k
        return paste(self.picture(frame, "base"), self.label(frame, "base"), picture, mask, k, id)

    def picture(self, id: str, role: str) -> np.ndarray:
        """uint8 [H, W] or [H, W, 3]."""
        if id in self.pasted:
            return self._paste(id)[0]
        if id in self.files:
            return read_png(self.files[id]["picture"])
        return read_png(self.frames.path(id, self.settings.layer))

    def label(self, id: str, role: str, target: int = 0) -> np.ndarray:
        """uint8 [H, W] of class ids as a loss may see it: base frames without novel classes, supports with theirs."""
        if id in self.pasted:
            return self._pasted_label(id)
        if id in self.files:
            return read_png(self.files[id]["label"])
        label = self.frames.label(id)
        if role == "synthetic":
            return label
        if role == "base":
            return train_label(label, self.space.novel, "background")
        if self.settings.support_labels == "target":
            return only(label, target)
        others = [k for k in self.space.novel if k != target]
        return train_label(label, others, "ignore")

    def batch(self, keys: Sequence[tuple[str, str, int]]) -> tuple:
        """(features, label long [B, H/2, W/2] of class indices, role long [B]) of (role, id, novel class) keys."""
        size = tuple(side // 2 for side in self.settings.size)
        labels = [torch.from_numpy(self.label(id, role, target)) for role, id, target in keys]
        small = [interpolate(label[None, None], size, mode="nearest-exact")[0, 0] for label in labels]
        features = self.bank.get([(id, "synthetic" if role == "synthetic" else "real") for role, id, _ in keys])
        role = torch.tensor([ROLES.index(role) for role, *_ in keys])
        return features, self.space.encode(torch.stack(small)).to(self.device), role.to(self.device)
