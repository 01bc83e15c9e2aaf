"""A trained model folder as one call: infrared picture and supports in, mask out.

Everything a prediction needs lies in the folder that `tasks/train_meta.py` writes: config.json, the encoder, one expert
per fold, the translators that make the other modalities, and the fuser where a fused picture is one of them. There is
no visible picture here, so the fuser is given the translated RGB one. A model that learnt from, and was examined on,
pictures fused from real visible ones ("fuse": {"visible": "visible"} in config.json) therefore sees others here than in
its exam. Masks that come from files or from SAM do not travel; the fuser does without.

Legend: H x W pixels of the query, any size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models import GENERATORS, find
from models.backbone import Features, load_encoder
from models.errors import UsageError
from models.fusers.base import Fuser, load_fuser
from models.fusers.masks import MaskProvider
from models.fusers.settings import MaskSettings
from models.geometry import Canvas, as_image
from models.segmenters.episodes import shown_features
from models.segmenters.expert import Expert, stored_settings
from models.views import FUSED, Stream, encode, episode_mask


def load_experts(folder: Path) -> tuple[dict, nn.Module, dict[int, Expert]]:
    """(config, frozen encoder, expert per fold) of a model folder, in eval mode on the CPU."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    settings = stored_settings(config["expert"])
    encoder = load_encoder(folder / "encoder", settings.wants)
    experts = {}
    for fold, base in config["base"].items():
        streams, shots = len(config["streams"]), config.get("shots", 1)
        expert = Expert(encoder.channels, base, streams, settings, encoder.blocks, shots)
        expert.load_state_dict(load_file(folder / f"fold{fold}.safetensors"))
        experts[int(fold)] = expert.eval()
    return config, encoder, experts


def model_canvas(config: dict) -> Canvas:
    """The canvas that a model was trained on, of its config.json."""
    return Canvas(tuple(config["size"]), config.get("letterbox", "exact"))


class Predictor:
    """Segments one infrared picture, given supports. Deterministic: translations are seeded by the picture."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config, self.encoder, self.experts = load_experts(self.folder)
        self.canvas = model_canvas(self.config)
        self.streams = [Stream(**stream) for stream in self.config["streams"]]
        self._translators: dict[str, object] = {}

    @classmethod
    def load(cls, folder: Path) -> Predictor:
        return cls(folder)

    @torch.inference_mode()
    def predict(
        self, query: np.ndarray, supports: Sequence[np.ndarray], masks: Sequence[np.ndarray], fold: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(mask uint8 [H, W] of {0, 1}, probability float32 [H, W] in 0..1).

        query uint8 [H, W]; supports uint8 [h, w] each and their masks of the same size, 1 where the class is (255: not
        known). fold: whose expert answers; None takes the mean of all. Raises UsageError for pictures in colour,
        sizes that do not fit, an empty mask, or an unknown fold.
        """
        _check(query, supports, masks)
        experts = self._chosen(fold)
        pictures = [np.asarray(query, np.uint8), *(np.asarray(s, np.uint8) for s in supports)]
        features = [self._features(pictures, stream.layer) for stream in self.streams]
        shown = torch.stack([self.canvas.label(episode_mask(np.asarray(mask, np.uint8), 1)) for mask in masks])[None]
        asked = [levels.part(0, 1) for levels in features]
        support = [levels.part(1, None).shots(len(supports)) for levels in features]
        support = [shown_features(self.encoder, levels, shown) for levels in support]
        shares = [expert(asked, support, shown).final.softmax(1) for expert in experts]
        probability = self.canvas.restore(torch.stack(shares).mean(0)[:, 1:], *query.shape)[0, 0].numpy()
        return (probability > 0.5).astype(np.uint8), probability.astype(np.float32)

    def _chosen(self, fold: int | None) -> list[Expert]:
        if fold is None:
            return list(self.experts.values())
        if fold not in self.experts:
            raise UsageError(f"This model has the folds {', '.join(map(str, self.experts))}; there is no fold {fold}.")
        return [self.experts[fold]]

    def _features(self, pictures: list[np.ndarray], layer: str) -> Features:
        views = [self._layer(picture, layer) for picture in pictures]
        return encode(self.encoder, torch.stack([self.canvas.image(as_image(view)) for view in views]))

    def _layer(self, picture: np.ndarray, layer: str) -> np.ndarray:
        """The picture itself, its translation, or both in one; a stand-in goes by its layer's translator."""
        if layer == "infrared":
            return picture
        if layer == FUSED:
            return self._fused(picture)
        if not (self.folder / "translators" / layer).is_dir():
            raise UsageError(f"This model reads {layer} pictures and has no translator for them; retrain without them.")
        if layer not in self._translators:
            self._translators[layer] = find(GENERATORS, self.config["generator"]).load(
                self.folder / "translators" / layer
            )
        return self._translators[layer].translate([picture], [_seed(picture)])[0]

    def _fused(self, picture: np.ndarray) -> np.ndarray:
        """With the translated layer that the model was trained with, or the RGB one in place of a real picture."""
        told = self.config["fuse"]
        visible = self._layer(picture, "rgb" if told["visible"] == "visible" else told["visible"])
        aux = {"seeds": [_seed(picture)], **self._masks.aux(picture, visible)}
        steps = {} if told["steps"] is None else {"steps": told["steps"]}
        return self._fuser.pictures([picture], [visible], [aux | steps])[0]

    @cached_property
    def _fuser(self) -> Fuser:
        return load_fuser(self.folder / "fuser").cpu()

    @cached_property
    def _masks(self) -> MaskProvider:
        told = self.config["fuse"]["masks"]
        if told["backend"] in ("file", "sam"):
            return MaskProvider(MaskSettings())
        return MaskProvider(MaskSettings(**{**told, "area": tuple(told["area"])}))


def _seed(picture: np.ndarray) -> int:
    return int.from_bytes(blake2b(picture.tobytes(), digest_size=8).digest(), "big") >> 1


def _check(query: np.ndarray, supports: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> None:
    for picture in (query, *supports):
        if np.ndim(picture) != 2:
            raise UsageError(f"A picture has the shape {np.shape(picture)}; give grey infrared pictures [H, W].")
    if not supports or len(supports) != len(masks):
        raise UsageError(f"Give one mask per support; got {len(supports)} supports and {len(masks)} masks.")
    for number, (support, mask) in enumerate(zip(supports, masks, strict=True), start=1):
        if np.shape(support) != np.shape(mask):
            sizes = f"{np.shape(support)} and {np.shape(mask)}"
            raise UsageError(f"Support {number} and its mask differ in size ({sizes}); give a mask of the same size.")
        if not (np.asarray(mask) == 1).any():
            raise UsageError(f"The mask of support {number} marks nothing; mark the object with 1.")
