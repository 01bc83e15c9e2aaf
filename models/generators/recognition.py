"""A small judge of toy pictures: which classes does a picture show? It stands in for CLIP where none can be fetched.

It learns from the captioned pictures alone, as the toy pipeline does: names, no masks. Its folder is opened by
`models.generators.inspection.open_judge` like a CLIP's.

Legend: B pictures of H x W pixels, uint8 outside and -1..1 inside; K classes; d width of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from models.errors import UsageError
from models.fitting import Fitting, Tell, batch_indices, run
from models.generators.toy_pipeline import as_tensor

FILE = "recogniser.json"
LAYERS = 6  # of one level
FAINTEST = 0.02  # deviation of light that counts as contrast, of pictures in -1..1


@dataclass(frozen=True)
class RecogniserSettings:
    """widths: channels, halved in size level by level. colour: whether it sees colour, or only light and shade; a class
    that has a usual colour is soon known by it, and a coloured blob then passes for any shape. held_out: share of the
    pictures, the last ones, that it is measured on."""

    widths: tuple[int, ...] = (24, 48, 96, 96)
    colour: bool = True
    steps: int = 900
    batch: int = 32
    rate: float = 3e-3
    held_out: float = 0.1
    seed: int = 0


class Recogniser(nn.Module):
    """Logits [B, K] of pictures [B, 3, H, W]: each class where it is seen best. Any size of 32 pixels or more."""

    def __init__(self, classes: int, settings: RecogniserSettings) -> None:
        super().__init__()
        self.settings, inside = settings, (3 if settings.colour else 1, *settings.widths)
        self.levels = nn.Sequential(*(
            layer for n, width in enumerate(settings.widths)
            for layer in (nn.Conv2d(inside[n], width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                          nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        ))
        self.classify = nn.Conv2d(settings.widths[-1], classes, 1)
        self.register_buffer("usual", torch.zeros(settings.widths[-1]))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.read(pictures)[0]

    @property
    def described(self) -> int:
        """Channels of `describe`."""
        return (3, *self.settings.widths)[-2]

    def describe(self, pictures: Tensor) -> Tensor:
        """What it sees, cell by cell, before its last level: [B, `described`, H/8, W/8] with the usual four levels."""
        return self.levels[: len(self.levels) - LAYERS](self.sees(pictures))

    def sees(self, pictures: Tensor) -> Tensor:
        """The pictures [B, 3, H, W], or without colour their light alone [B, 1, H, W], of mean 0 and deviation 1."""
        if self.settings.colour:
            return pictures
        light = pictures.mean(1, keepdim=True)
        return (light - light.mean((2, 3), keepdim=True)) / (light.std((2, 3), keepdim=True) + FAINTEST)

    def read(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, K], unit rows [B, d]: what is seen anywhere, less what is usually seen)."""
        maps = self.levels(self.sees(pictures))
        return self.classify(maps).amax((2, 3)), normalize(maps.amax((2, 3)) - self.usual, dim=1)


def build_recogniser(classes: int, settings: RecogniserSettings) -> Recogniser:
    """Random weights, from the settings' seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Recogniser(classes, settings)


def recogniser_fitting(model: Recogniser) -> Fitting:
    return Fitting({"recogniser": model}, model.settings.rate, model.settings.steps)


def fit_recogniser(
    model: Recogniser, fitting: Fitting, pictures: np.ndarray, shown: np.ndarray, tell: Tell | None = None,
) -> None:
    """Fits it to pictures uint8 [N, H, W, 3] and shown bool [N, K]; the held-out ones stay unseen."""
    settings, count = model.settings, held_in(len(pictures), model.settings)

    def losses_at(step: int) -> dict[str, Tensor]:
        chosen = batch_indices(count, settings.batch, settings.seed, "recogniser", step)
        logits = model(as_tensor(pictures[chosen]))
        return {"loss": binary_cross_entropy_with_logits(logits, torch.from_numpy(shown[chosen]).float())}

    run(fitting, losses_at, tell)
    with torch.no_grad():
        model.usual.copy_(model.levels(model.sees(as_tensor(pictures[:256]))).amax((2, 3)).mean(0))


def held_in(total: int, settings: RecogniserSettings) -> int:
    """How many pictures, the first ones, it learns from."""
    return max(total - int(total * settings.held_out), 1)


@torch.no_grad()
def recognised(model: Recogniser, pictures: Sequence[np.ndarray], asked: Sequence[int]) -> float:
    """The share of pictures uint8 [H, W, 3] whose best class is the asked one (0..K-1); NaN of none."""
    if not len(pictures):
        return float("nan")
    found = model(as_tensor(np.stack(pictures))).argmax(1)
    return float(np.mean(found.numpy() == np.asarray(asked)))


class ToyJudge:
    """What `tasks.imagine` asks of a judge."""

    def __init__(self, model: Recogniser, classes: Sequence[str], device: str = "cpu") -> None:
        self.model, self.classes, self.device = model.to(device).eval(), list(classes), device

    @torch.no_grad()
    def margins(self, pictures: Sequence[np.ndarray], classes: Sequence[str], target: int) -> tuple:
        """(margin [N], unit embeddings [N, d]). Margin: the log-odds that the asked class is in the picture; others may
        be there, too. Raises UsageError when the classes are not those that the judge knows."""
        if list(classes) != self.classes:
            raise UsageError("This judge knows other classes than the dataset; fit the foundation models on the same.")
        logits, rows = self.model.read(as_tensor(np.stack(pictures)).to(self.device))
        return logits[:, target].cpu().numpy(), rows.cpu().numpy()


def save_judge(folder: Path, model: Recogniser, classes: Sequence[str]) -> None:
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, Path(folder) / "recogniser.safetensors")
    (Path(folder) / FILE).write_text(json.dumps({"classes": list(classes), "settings": asdict(model.settings)}))


def load_judge(folder: Path, device: str = "cpu") -> ToyJudge:
    from safetensors.torch import load_file

    kept = json.loads((Path(folder) / FILE).read_text())
    model = build_recogniser(len(kept["classes"]), RecogniserSettings(**kept["settings"]))
    model.load_state_dict(load_file(Path(folder) / "recogniser.safetensors"))
    return ToyJudge(model, kept["classes"], device)
