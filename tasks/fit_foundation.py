"""Fit the toy world's foundation models: a text-to-image pipeline and a small SAM, where none can be fetched.

The pipeline sees captioned training pictures of all classes and no mask, as a web-trained one knows names; the SAM sees
outlines of the fold's base classes, whatever their class. Both lie in one Ref and are opened like published ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.errors import UsageError
from models.fitting import Fitting
from models.frames import Frames, png_bytes, read_png
from models.generators.toy_pipeline import (
    ToyPipelineSettings,
    autoencoder_fitting,
    build,
    captions_of,
    denoiser_fitting,
    encode_all,
    fit_autoencoder,
    fit_denoiser,
)
from models.small_sam import SmallSAMSettings, build_small_sam, fit_sam, sam_fitting, save_sam
from tasks.checkpoints import Checkpoints
from tasks.fanout import Compute
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import fit

KIND = "foundation"
CODE = ("tasks.fit_foundation", "models.fitting", "models.small_sam", "models.sam", "models.pseudolabels",
        "models.generators.toy_pipeline", "models.generators.grammar", "models.generators.words")
LOG_EVERY = 20


@dataclass(frozen=True)
class FoundationSettings:
    """layer: "visible" or "infrared", what the pipeline draws and the SAM sees. shown: pictures of each class on the
    contact sheet."""

    layer: str = "visible"
    pipeline: ToyPipelineSettings = field(default_factory=ToyPipelineSettings)
    sam: SmallSAMSettings = field(default_factory=SmallSAMSettings)
    checkpoint_every: int = 250
    shown: int = 2


@dataclass(frozen=True)
class FoundationJob:
    foundation: FoundationSettings
    fold: int


@stage("fit_foundation")
def fit_foundation(frames: Ref, settings: FoundationSettings, fold: int, compute: Compute) -> Ref:
    """Kind "foundation": `pipeline/` (of diffusers), `sam/` (of `models.small_sam`), `contact.png`, history. Needs one
    training worker: the parts are too small to share."""
    return fit(foundation_loop, KIND, [frames], FoundationJob(settings, fold), CODE, compute)


def foundation_loop(config: dict) -> None:
    """Three fittings one after the other; each goes on from its own last step."""
    job: FoundationJob = config["settings"]
    settings, frames = job.foundation, Frames.open(config["folders"][0])
    scenes = Scenes(frames, settings.layer, settings.pipeline.size)
    parts, sam = build(settings.pipeline, frames.classes), build_small_sam(settings.sam)
    fittings = {"autoencoder": autoencoder_fitting(parts, settings.pipeline),
                "denoiser": denoiser_fitting(parts, settings.pipeline), "sam": sam_fitting(sam, settings.sam)}
    checkpoints = Checkpoints(config, sum(one.steps for one in fittings.values()), **fittings)
    checkpoints.restore()
    tell = {name: teller(checkpoints, name, fittings, settings.checkpoint_every) for name in fittings}
    fit_autoencoder(parts, fittings["autoencoder"], scenes.pictures, settings.pipeline, tell["autoencoder"])
    latents = encode_all(parts.vae, scenes.pictures)
    fit_denoiser(parts, fittings["denoiser"], latents, scenes.caption, settings.pipeline, tell["denoiser"])
    labels = [frames.label(id) for id in scenes.ids]
    fit_sam(sam, fittings["sam"], scenes.originals(), labels, frames.base(job.fold), settings.sam, tell["sam"])

    def write(folder: Path) -> None:
        parts.save(folder / "pipeline")
        save_sam(folder / "sam", sam, settings.sam)
        (folder / "contact.png").write_bytes(png_bytes(contact(parts, frames.classes, settings)))

    checkpoints.finish(write)


def teller(checkpoints: Checkpoints, name: str, fittings: dict[str, Fitting], every: int):
    """What a fitting calls after each step: the history counts the steps of all fittings together."""
    names = list(fittings)
    before = sum(fittings[other].steps for other in names[: names.index(name)])

    def tell(step: int, numbers: dict[str, float]) -> None:
        if step % LOG_EVERY == 0 or step + 1 == fittings[name].steps:
            checkpoints.log(before + step, **{f"{name}_{key}": value for key, value in numbers.items()})
        if (step + 1) % every == 0:
            checkpoints.save(before + step + 1)

    return tell


class Scenes:
    """The labelled training frames as one array of pictures uint8 [N, H, W, 3], and what each shows."""

    def __init__(self, frames: Frames, layer: str, size: tuple[int, int]) -> None:
        self.frames, self.layer = frames, layer
        self.ids = [id for id in frames.ids("train") if frames.has(id, layer) and frames.has(id, "label")]
        if not self.ids:
            raise UsageError(f"{frames.dataset} has no labelled training frame with a {layer} picture; choose another.")
        self.pictures = np.stack([resized(picture, size) for picture in self.originals()])
        self.names = [[frames.class_name(k) for k in sorted(frames.pixels(id))] for id in self.ids]

    def originals(self) -> list[np.ndarray]:
        return [read_png(self.frames.path(id, self.layer)) for id in self.ids]

    def caption(self, n: int, step: int) -> str:
        return captions_of(self.names[n], self.pictures[n], self.ids[n], step)


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of a grey or colour picture."""
    from PIL import Image

    from models.sam import rgb

    return np.asarray(Image.fromarray(rgb(picture)).resize(size[::-1], Image.Resampling.BILINEAR))


def contact(parts, classes, settings: FoundationSettings) -> np.ndarray:
    """A sheet of drawn pictures, one row a class: what the pipeline has learnt, to be looked at."""
    from models.generators.grammar import caption
    from models.generators.text2image import PictureSettings, TextToImage

    size = settings.pipeline.size
    chosen = PictureSettings("foundation", dtype="float32", size=size, steps=20, guidance=3.0, batch=4)
    prompts = [caption([name], dark=bool(n % 2)) for name in classes for n in range(settings.shown)]
    drawn = TextToImage(parts.pipeline(), chosen).draw(prompts, list(range(len(prompts))))
    cells = [np.zeros((*size, 3), np.uint8) if one.picture is None else one.picture for one in drawn]
    rows = [np.concatenate(cells[n : n + settings.shown], 1) for n in range(0, len(cells), settings.shown)]
    return np.concatenate(rows)
