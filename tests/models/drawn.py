"""Drawn scenes as the stages leave them on disk, and an encoder small enough to wait for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from models.backbone import Encoder, EncoderSettings, build_encoder
from models.datasets.toy import Toy
from models.frames import Frames, layer_name, png_bytes
from models.geometry import Canvas
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.expert import ExpertSettings
from models.segmenters.lessons import MetaSettings
from models.views import FeatureBank, PseudoViews

SIZE = (64, 96)
ENCODER = EncoderSettings("test_resnet", stages=(2, 3, 4), normalise="symmetric")
EXPERT = ExpertSettings(base_width=16, anchored=AnchoredSettings(width=4))
META = MetaSettings(size=SIZE, expert=EXPERT, min_pixels=40, batch=4, held_out=2, validation=3)


def tiny_encoder(seed: int = 0, **changes) -> Encoder:
    """Three levels of 48, 192 and 96 channels at stride 8; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(EncoderSettings(**{**vars(ENCODER), **changes}))


@cache
def _scenes(train: int, test: int) -> list:
    toy = Toy(size=SIZE, train=train, test=test)
    return [(item, toy.read(item)) for item in toy.items()]


def drawn_frames(folder: Path, train: int = 24, test: int = 6) -> Frames:
    """Toy scenes of 64 x 96 pixels, as `prepare` commits them."""
    rows = []
    for item, picture in _scenes(train, test):
        ids, counts = np.unique(picture.label, return_counts=True)
        pixels = {int(n): int(c) for n, c in zip(ids, counts, strict=True) if n}
        names = {layer: layer_name(item.id, layer) for layer in ("infrared", "visible", "label")}
        _write(folder, {name: getattr(picture, layer) for layer, name in names.items()})
        facts = {"height": SIZE[0], "width": SIZE[1], "sha256": "", "classes": json.dumps(pixels)}
        rows.append({"id": item.id, "split": item.split} | names | facts)
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    info = {"dataset": "toy", "classes": Toy.classes, "palette": Toy.palette, "folds": Toy().folds, "ignored": []}
    (folder / "manifest.json").write_text(json.dumps({"meta": info}))
    return Frames.open(folder)


def drawn_translations(folder: Path, frames: Frames) -> Path:
    """Pictures in place of translated ones, each layer unlike the others."""
    for id in frames.ids():
        grey = frames.infrared(id)
        made = {"lightness": 255 - grey, "rgb": np.stack([grey, 255 - grey, grey // 2], -1)}
        made["rgb_lightness"] = made["rgb"][..., ::-1]
        _write(folder, {layer_name(id, layer): picture for layer, picture in made.items()})
    return folder


def drawn_bank(folder: Path, test: int) -> FeatureBank:
    """Features of 40 training scenes and `test` others in all layers, with pseudo-labels, by `tiny_encoder`."""
    frames = drawn_frames(folder / "frames", train=40, test=test)
    synthetic = drawn_translations(folder / "synthetic", frames)
    refined = drawn_refined(folder / "refined", frames, ("lightness", "rgb", "rgb_lightness"))
    return FeatureBank(tiny_encoder(), PseudoViews(frames, synthetic, refined), Canvas(SIZE))


def drawn_refined(folder: Path, frames: Frames, layers: tuple[str, ...] = ("lightness", "rgb")) -> Path:
    """Pseudo-labels in which every object is freed left of the middle."""
    for id in frames.ids("train"):
        label = frames.label(id)
        left = np.arange(SIZE[1])[None] < SIZE[1] // 2
        freed = np.where(left & (label > 0), 255, label).astype(np.uint8)
        _write(folder, {layer_name(id, f"{layer}.label"): freed for layer in layers})
    return folder


def _write(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / name).write_bytes(png_bytes(picture))
