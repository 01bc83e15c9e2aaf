"""Fit the toy world's foundation models, where none can be fetched: a text-to-image pipeline, a judge of its pictures
and a small SAM.

Pipeline and judge see captioned training pictures of all classes and no mask, as web-trained ones know names; the SAM
sees outlines of the fold's base classes, whatever their class. All lie in one Ref and are opened like published ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UsageError
from models.frames import Frames, png_bytes, read_png
from models.generators.alignment import Aligner, targets_of
from models.generators.captions import Look, caption_of, look_of
from models.generators.recognition import (
    Recogniser,
    RecogniserSettings,
    build_recogniser,
    fit_recogniser,
    held_in,
    recognised,
    recogniser_fitting,
    save_judge,
)
from models.generators.toy_pipeline import (
    ToyPipeline,
    ToyPipelineSettings,
    as_tensor,
    autoencoder_fitting,
    build,
    denoiser_fitting,
    encode_all,
    fit_autoencoder,
    fit_denoiser,
)
from models.small_sam import SmallSAMSettings, build_small_sam, fit_sam, sam_fitting, save_sam
from tasks.checkpoints import Checkpoints, teller
from tasks.fanout import Compute
from tasks.prepare import DataSettings
from tasks.pretrain import resized
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import fit

KIND = "foundation"
CODE = ("tasks.fit_foundation", "models.fitting", "models.small_sam", "models.sam", "models.pseudolabels",
        "models.generators.toy_pipeline", "models.generators.alignment", "models.generators.recognition",
        "models.generators.captions", "models.generators.grammar", "models.generators.words")


@dataclass(frozen=True)
class FoundationSettings:
    """layer: "visible" or "infrared", what the pipeline draws and the SAM sees. captioned: the pictures that the
    pipeline learns from, of which only the names of what they show are told; None: the frames of the run. shown,
    guidance, options: pictures of each class on the contact sheet, how closely they follow the prompt, and what else
    the pipeline is told."""

    layer: str = "visible"
    captioned: DataSettings | None = None
    pipeline: ToyPipelineSettings = field(default_factory=ToyPipelineSettings)
    judge: RecogniserSettings = field(default_factory=RecogniserSettings)
    sam: SmallSAMSettings = field(default_factory=SmallSAMSettings)
    checkpoint_every: int = 250
    shown: int = 4
    guidance: float = 3.0
    options: Mapping[str, Any] = field(default_factory=lambda: {"guidance_rescale": 0.7})  # arXiv 2305.08891, §3.4


@dataclass(frozen=True)
class FoundationJob:
    foundation: FoundationSettings
    fold: int


@stage("fit_foundation")
def fit_foundation(frames: Ref, captioned: Ref, settings: FoundationSettings, fold: int, compute: Compute) -> Ref:
    """Kind "foundation": `pipeline/` (of diffusers), `judge/` (of `models.generators.recognition`), `sam/` (of
    `models.small_sam`), `contact.png`, `quality.json`, history. The SAM learns from base classes of `frames`, the
    others from `captioned`. Needs one training worker: the parts are too small to share."""
    return fit(foundation_loop, KIND, [frames, captioned], FoundationJob(settings, fold), CODE, compute)


def foundation_loop(config: dict) -> None:
    """Four fittings one after the other; each goes on from its own last step."""
    job: FoundationJob = config["settings"]
    settings, (frames, captioned) = job.foundation, map(Frames.open, config["folders"])
    scenes, outlined = Scenes(captioned, settings.layer), Scenes(frames, settings.layer)
    pictures = scenes.resized(settings.pipeline.size)
    parts, sam = build(settings.pipeline, captioned.classes), build_small_sam(settings.sam)
    judge = build_recogniser(len(captioned.classes), settings.judge)
    aligner = aligner_of(parts, judge, settings.pipeline)
    fittings = {"judge": recogniser_fitting(judge), "autoencoder": autoencoder_fitting(parts, settings.pipeline),
                "denoiser": denoiser_fitting(parts, settings.pipeline, aligner), "sam": sam_fitting(sam, settings.sam)}
    checkpoints = Checkpoints(config, sum(one.steps for one in fittings.values()), **fittings)
    checkpoints.restore()
    tell = {name: teller(checkpoints, name, fittings, settings.checkpoint_every) for name in fittings}
    fit_recogniser(judge, fittings["judge"], pictures, scenes.shown(captioned.classes), tell["judge"])
    fit_autoencoder(parts, fittings["autoencoder"], pictures, settings.pipeline, tell["autoencoder"])
    latents = encode_all(parts.vae, pictures)
    targets = targets_of(judge, as_tensor(pictures)) if aligner else None
    fit_denoiser(
        parts, fittings["denoiser"], latents, scenes.caption, settings.pipeline, tell["denoiser"], aligner, targets
    )
    labels = [frames.label(id) for id in outlined.ids]
    fit_sam(sam, fittings["sam"], outlined.pictures, labels, frames.base(job.fold), settings.sam, tell["sam"])

    def write(folder: Path) -> None:
        parts.save(folder / "pipeline")
        save_judge(folder / "judge", judge, captioned.classes)
        save_sam(folder / "sam", sam, settings.sam)
        drawn = draw_each(parts, captioned.classes, settings)
        (folder / "contact.png").write_bytes(png_bytes(contact(drawn)))
        (folder / "quality.json").write_text(json.dumps(judged(judge, drawn, pictures, scenes, captioned.classes)))

    checkpoints.finish(write)


def aligner_of(parts: ToyPipeline, judge: Recogniser, settings: ToyPipelineSettings) -> Aligner | None:
    """What pulls the denoiser to the judge's features, where the settings want it."""
    return Aligner(parts.unet, judge.described, settings.seed) if settings.align else None


class Scenes:
    """The labelled training frames: their pictures uint8, and the names of what each shows."""

    def __init__(self, frames: Frames, layer: str) -> None:
        self.ids = [id for id in frames.ids("train") if frames.has(id, layer) and frames.has(id, "label")]
        if not self.ids:
            raise UsageError(f"{frames.dataset} has no labelled training frame with a {layer} picture; choose another.")
        self.pictures = [read_png(frames.path(id, layer)) for id in self.ids]
        self.names = [[frames.class_name(k) for k in sorted(frames.pixels(id))] for id in self.ids]

    @cached_property
    def looks(self) -> list[Look]:
        return [look_of(picture) for picture in self.pictures]

    def resized(self, size: tuple[int, int]) -> np.ndarray:
        """All pictures as one array uint8 [N, H, W, 3]."""
        return np.stack([resized(picture, size) for picture in self.pictures])

    def shown(self, classes: Sequence[str]) -> np.ndarray:
        """bool [N, K]: which classes each picture shows."""
        return np.array([[name in here for name in classes] for here in self.names])

    def caption(self, n: int, step: int) -> str:
        return caption_of(self.names[n], self.looks[n], self.ids[n], step)


def draw_each(parts: ToyPipeline, classes: Sequence[str], settings: FoundationSettings) -> list[list[np.ndarray]]:
    """Pictures uint8 [H, W, 3] of each class alone, half of them on dark ground; a broken one is black."""
    from models.generators.grammar import caption
    from models.generators.text2image import PictureSettings, TextToImage

    size = settings.pipeline.size
    chosen = PictureSettings("foundation", dtype="float32", size=size, steps=20, guidance=settings.guidance, batch=4,
                             options=settings.options)
    prompts = [caption([name], dark=bool(n % 2)) for name in classes for n in range(settings.shown)]
    drawn = TextToImage(parts.pipeline(), chosen).draw(prompts, list(range(len(prompts))))
    cells = [np.zeros((*size, 3), np.uint8) if one.picture is None else one.picture for one in drawn]
    return [cells[n : n + settings.shown] for n in range(0, len(cells), settings.shown)]


def contact(drawn: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """A sheet of drawn pictures, one row a class: what the pipeline has learnt, to be looked at."""
    return np.concatenate([np.concatenate(list(row), 1) for row in drawn])


def judged(
    judge: Recogniser, drawn: Sequence[Sequence[np.ndarray]], pictures: np.ndarray, scenes: Scenes,
    classes: Sequence[str],
) -> dict[str, float]:
    """How often the judge finds the asked class first: in drawn pictures, and in captioned ones that it did not learn
    from and that show one thing alone (what there is to reach); `chance` is what guessing gives."""
    asked = [k for k, row in enumerate(drawn) for _ in row]
    alone = [n for n in range(held_in(len(pictures), judge.settings), len(pictures)) if len(scenes.names[n]) == 1]
    names = [list(classes).index(scenes.names[n][0]) for n in alone]
    return {"recognised": recognised(judge, [cell for row in drawn for cell in row], asked),
            "recognised_real": recognised(judge, pictures[alone], names), "chance": 1 / len(classes)}
