"""Pretrain: an encoder fitted on captions, where no ImageNet weights can be fetched.

It learns which base classes a picture shows, and nothing of where. Pictures that show a novel class are left out, so
that none of their pixels reaches a loss. What is kept is an encoder as `tasks.freeze_encoder` keeps one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.backbone import Encoder, EncoderSettings, build_encoder, write_encoder
from models.errors import UsageError
from models.fitting import Fitting, batch_indices, run
from models.frames import Frames, read_png
from models.sam import rgb
from tasks.checkpoints import Checkpoints, teller
from tasks.fanout import Compute
from tasks.prepare import DataSettings
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import fit

CODE = ("tasks.pretrain", "models.fitting", "models.backbone", "models.encoders")


@dataclass(frozen=True)
class PretrainSettings:
    """captioned: the pictures, of which only the names of what they show are told; None: the frames of the run.

    layer: "visible" or "infrared". size: what the encoder is shown [H, W]; about as large as objects will be later.
    """

    captioned: DataSettings | None = None
    layer: str = "visible"
    size: tuple[int, int] = (96, 96)
    steps: int = 500
    batch: int = 32
    rate: float = 2e-3
    checkpoint_every: int = 100
    seed: int = 0


@dataclass(frozen=True)
class PretrainJob:
    settings: PretrainSettings
    encoder: EncoderSettings
    base: tuple[str, ...]


@stage("pretrain")
def pretrain(captioned: Ref, encoder: EncoderSettings, base: Collection[str], settings: PretrainSettings,
             compute: Compute) -> Ref:
    """Kind "encoder": config.json and encoder.safetensors of `encoder`, fitted from random weights on the pictures that
    show nothing but classes named in `base`. Needs one training worker."""
    job = PretrainJob(replace(settings, captioned=None), encoder, tuple(sorted(base)))
    return fit(pretrain_loop, "encoder", [captioned], job, CODE, compute)


def pretrain_loop(config: dict) -> None:
    """Every step: a batch of pictures, and which of the base classes each shows."""
    job: PretrainJob = config["settings"]
    settings = job.settings
    pictures, shown = lessons(Frames.open(config["folders"][0]), job.base, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.encoder.seed)
        encoder = build_encoder(job.encoder)
        head = nn.Linear(sum(encoder.channels), len(job.base))
    encoder.stages.requires_grad_(True)
    fitting = Fitting({"stages": encoder.stages, "head": head}, settings.rate, settings.steps)
    checkpoints = Checkpoints(config, settings.steps, encoder=fitting)
    checkpoints.restore()

    def losses_at(step: int) -> dict[str, Tensor]:
        chosen = batch_indices(len(pictures), settings.batch, settings.seed, "pretrain", step)
        logits = head(seen(encoder, torch.from_numpy(pictures[chosen])))
        return {"loss": binary_cross_entropy_with_logits(logits, torch.from_numpy(shown[chosen]).float())}

    run(fitting, losses_at, teller(checkpoints, "encoder", {"encoder": fitting}, settings.checkpoint_every))
    checkpoints.finish(lambda folder: write_encoder(Path(folder), encoder, job.encoder))


def seen(encoder: Encoder, pictures: Tensor) -> Tensor:
    """What each level sees anywhere [B, Σ c] of pictures uint8 [B, H, W, 3], with gradient."""
    images = pictures.permute(0, 3, 1, 2).float() / 255
    levels = encoder.stages((images - encoder.mean) / encoder.deviation)
    return torch.cat([level.amax((2, 3)) for level in levels], 1)


def lessons(frames: Frames, base: Collection[str], settings: PretrainSettings) -> tuple[np.ndarray, np.ndarray]:
    """(pictures uint8 [N, H, W, 3], shown bool [N, K]) of the training frames that show base classes and nothing else;
    K in the order of `base`. Raises UsageError when there is none."""
    kept, shown = [], []
    for id in frames.ids("train"):
        names = {frames.class_name(k) for k in frames.pixels(id)}
        if frames.has(id, settings.layer) and names and names <= set(base):
            kept.append(id)
            shown.append([name in names for name in base])
    if not kept:
        raise UsageError(f"No {settings.layer} picture of {frames.dataset} shows base classes alone; add some.")
    return np.stack([resized(read_png(frames.path(id, settings.layer)), settings.size) for id in kept]), np.array(shown)


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a grey or colour picture."""
    from PIL import Image

    return np.asarray(Image.fromarray(rgb(picture)).resize(size[::-1], Image.Resampling.BILINEAR))
