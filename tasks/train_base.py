"""Fit the base learners: PSPNet heads over the frozen encoder, one per fold, all folds in one loop.

Every step draws one batch of frames and one layer for each; the features are shared by all folds, the labels are each
fold's own: a novel class never reaches the loss (`novel_in_train`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from models.backbone import load_encoder
from models.episode import IGNORE, POLICIES, draw, kept_for_training
from models.errors import UsageError
from models.frames import Frames
from models.geometry import Canvas, cells, enlarge
from models.losses import cross_entropy
from models.segmenters.pspnet import PSPNet
from models.views import FeatureBank, Views
from tasks.fanout import Compute
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import Checkpoints, fit, seed_step

CODE = (
    "tasks.train_base", "models.backbone", "models.encoders", "models.views", "models.losses", "models.episode",
    "models.segmenters.pspnet", "models.geometry", "models.pseudolabels",
)


@dataclass(frozen=True)
class BaseSettings:
    """How the base learners are fitted (BAM §4.1; GenFusion spec §3.2).

    size: the encoder's input [H, W]. letterbox: how frames come onto it, "exact" or "bam". layers: pictures to learn
    from, drawn evenly (GenFusion: infrared and lightness). novel_in_train: "ignore", "background" or "drop". rate:
    Adam, decayed polynomially (0.9) to zero. flip: mirror half of the feature maps. cache_gb: features kept by a
    worker.
    """

    size: tuple[int, int] = (360, 480)
    letterbox: str = "exact"
    layers: tuple[str, ...] = ("infrared", "lightness")
    novel_in_train: str = "ignore"
    width: int = 512
    steps: int = 2000
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 1e-4
    flip: bool = True
    checkpoint_every: int = 200
    cache_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.novel_in_train not in POLICIES:
            raise UsageError(f"There is no novel_in_train {self.novel_in_train!r}; choose {', '.join(POLICIES)}.")


@dataclass(frozen=True)
class BaseJob:
    """What the loop needs to know."""

    base: BaseSettings
    folds: tuple[int, ...]


@stage("train_base")
def train_base(
    frames: Ref, synthetic: Ref, pseudolabels: Ref, encoder: Ref, settings: BaseSettings, folds: Sequence[int],
    compute: Compute,
) -> Ref:
    """One base learner per fold. Kind "base": `fold<n>.safetensors` and config.json."""
    inputs = [frames, synthetic, pseudolabels, encoder]
    return fit(base_loop, "base", inputs, BaseJob(settings, tuple(folds)), CODE, compute)


def base_loop(config: dict) -> None:
    """The loop: one batch of features, every fold's loss, one step."""
    import ray.train.torch

    job: BaseJob = config["settings"]
    settings = job.base
    device = ray.train.torch.get_device()
    frames = Frames.open(config["folders"][0])
    views = Views(frames, config["folders"][1], config["folders"][2])
    encoder = load_encoder(config["folders"][3]).to(device)
    bank = FeatureBank(encoder, views, Canvas(settings.size, settings.letterbox), int(settings.cache_gb * 2**30))
    torch.manual_seed(settings.seed)
    heads = nn.ModuleDict({str(f): PSPNet(encoder.channels, len(frames.base(f)), settings.width) for f in job.folds})
    model = ray.train.torch.prepare_model(_Heads(heads, bank.canvas.size))
    optimiser = torch.optim.Adam(model.parameters(), settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, settings.steps, power=0.9)
    data = _Batches(views, job, frames)
    checkpoints = Checkpoints(config, settings.steps, model=heads, optimiser=optimiser, schedule=schedule)
    model.train()
    for step in range(checkpoints.restore(), settings.steps):
        seed_step(settings.seed, step, checkpoints.rank)
        keys, labels = data.batch(step, checkpoints.rank)
        features, labels = data.flipped(bank.get(keys), labels, step)
        logits = model(features)
        losses = [cross_entropy(logits[f], labels[f].to(device)) for f in logits]
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimiser.step()
        schedule.step()
        if step % 20 == 0 or step + 1 == settings.steps:
            checkpoints.log(step, **{f"loss_fold{f}": loss for f, loss in zip(logits, losses, strict=True)})
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoints.save(step + 1)
    checkpoints.finish(lambda folder: save_heads(folder, heads, frames, job))


def save_heads(folder: Path, heads: nn.ModuleDict, frames: Frames, job: BaseJob) -> None:
    from safetensors.torch import save_file

    for fold, head in heads.items():
        state = {name: x.contiguous().cpu() for name, x in head.state_dict().items()}
        save_file(state, folder / f"fold{fold}.safetensors")
    base = {fold: list(frames.base(int(fold))) for fold in heads}
    (folder / "config.json").write_text(json.dumps({"base": base, "width": job.base.width}, indent=1))


class _Heads(nn.Module):
    """All folds' heads on one batch of features; logits at half the canvas, where thin objects survive."""

    def __init__(self, heads: nn.ModuleDict, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.canvas = heads, canvas

    def forward(self, features) -> dict[str, torch.Tensor]:
        grid = cells(*self.canvas)
        return {fold: enlarge(head(features, grid), self.canvas, 2) for fold, head in self.heads.items()}


class _Batches:
    """Which frames and layers a step sees, and their labels per fold; pure functions of (seed, step, rank)."""

    def __init__(self, views: Views, job: BaseJob, frames: Frames) -> None:
        self.views, self.job = views, job
        policy = job.base.novel_in_train
        self.kept = {fold: set(kept_for_training(frames, fold, policy)) for fold in job.folds}
        kept = set().union(*self.kept.values())
        self.ids = [id for id in frames.ids("train") if id in kept and self._layers(id)]
        if not self.ids:
            wanted = " or ".join(job.base.layers)
            raise UsageError(
                f"No training frame with a picture of {wanted} is left under novel_in_train={policy}; "
                "choose ignore or background, or other layers."
            )
        self.remap = {fold: _remap(frames.base(fold)) for fold in job.folds}
        self.novel = {fold: frames.novel(fold) for fold in job.folds}

    def batch(self, step: int, rank: int):
        """Keys [B] of (id, layer), and labels per fold, uint8 [B, H/2, W/2] of {0..base classes, 255}."""
        settings = self.job.base
        ids = draw(self.ids, min(settings.batch, len(self.ids)), settings.seed, step, rank, "frames")
        keys = []
        for id in ids:
            keys.append((id, draw(self._layers(id), 1, settings.seed, step, rank, id)[0]))
        return keys, {str(fold): torch.stack([self._label(*key, fold) for key in keys]) for fold in self.job.folds}

    def _layers(self, id: str) -> list[str]:
        return [layer for layer in self.job.base.layers if self.views.has(id, layer)]

    def _label(self, id: str, layer: str, fold: int) -> torch.Tensor:
        base = self.job.base
        height, width = (side // 2 for side in base.size)
        if id not in self.kept[fold]:
            return torch.full((height, width), IGNORE, dtype=torch.uint8)
        label = self.views.label(id, layer, self.novel[fold], base.novel_in_train)
        mapped = torch.from_numpy(self.remap[fold][label])
        if base.letterbox != "exact":  # an exact canvas is the frame itself at another size
            mapped = Canvas(base.size, base.letterbox).label(mapped)
        return interpolate(mapped[None, None], (height, width), mode="nearest-exact")[0, 0]

    def flipped(self, features, labels: dict, step: int):
        """The whole batch mirrored on every other step."""
        if not self.job.base.flip or step % 2 == 0:
            return features, labels
        mirrored = type(features)(*(level.flip(-1) for level in features))
        return mirrored, {fold: label.flip(-1) for fold, label in labels.items()}


def _remap(base: Sequence[int]) -> np.ndarray:
    """Label id -> index among the base classes from 1; everything that is neither base nor background is ignored."""
    table = np.full(256, IGNORE, np.uint8)
    table[0] = 0
    for index, label in enumerate(base, start=1):
        table[label] = index
    return table
