"""Which synthetic pictures are worth a label (Syn4Seg spec §1.8): of the right class, not seen before, no collage.

Legend: H x W pixels, N pictures, K class names, d dimensions of an image embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.fft import dctn
from skimage.transform import resize
from torch.nn.functional import normalize

from models.errors import UsageError
from models.generators import recognition
from models.generators.words import class_words


@dataclass(frozen=True)
class QualitySettings:
    """margin: least lead of the asked class's image-text cosine over all other classes' (None: no such check).

    hash_distance: pictures whose 64-bit hashes differ in so many bits or fewer are one. copy: image-embedding cosine
    from which pictures are one. seam: how much steeper than the picture's usual steps a straight, full-length edge may
    be; above it the picture is a collage. frame: the share of a side that an even border may take.
    """

    margin: float | None = 0.0
    hash_distance: int = 4
    copy: float = 0.97
    seam: float = 6.0
    frame: float = 0.08


def perceptual_hash(picture: np.ndarray) -> int:
    """64 bits of uint8 [H, W] or [H, W, 3]: which of the 8 x 8 lowest cosine terms (of a 32 x 32 grey thumbnail) lie
    above their median."""
    grey = picture.mean(-1) if picture.ndim == 3 else picture.astype(float)
    low = dctn(resize(grey, (32, 32), anti_aliasing=True), norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first term is the brightness
    return int(np.packbits(bits).view(">u8")[0])


def hamming(a: int, b: int) -> int:
    return (a ^ b).bit_count()


def is_collage(picture: np.ndarray, settings: QualitySettings) -> bool:
    """A straight edge from side to side, or an even frame around the picture.

    Full-length edges: the median step across one column (or row) boundary is `seam` times the usual one, and large.
    """
    grey = picture.mean(-1) if picture.ndim == 3 else picture.astype(float)
    for view in (grey, grey.T):
        steps = np.median(np.abs(np.diff(view, axis=1)), axis=0)[2:-2]
        if len(steps) and steps.max() > max(settings.seam * (np.median(steps) + 1), 16):
            return True
    return min(_border(grey), _border(grey.T)) > settings.frame


def _border(grey: np.ndarray) -> float:
    """The share of rows at top and bottom, the lesser of the two, that are of one tone."""
    even = grey.std(axis=1) < 1.5
    runs = [int(np.argmin(side)) if not side.all() else len(side) for side in (even, even[::-1])]
    return min(runs) / len(grey)


class ClipJudge:
    """A CLIP-like model and processor of transformers as the judge of pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @torch.inference_mode()
    def margins(
        self, pictures: Sequence[np.ndarray], classes: Sequence[str], target: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(margin [N], unit image embeddings [N, d]) of pictures that are to show classes[target].

        Margin: the cosine of a picture with "a photo of a {noun}" less the largest with any other class's noun.
        """
        texts = [f"a photo of a {class_words(name).noun}" for name in classes]
        shown = {"images": list(pictures), "input_data_format": "channels_last"}
        batch = self.processor(text=texts, return_tensors="pt", padding=True, **shown)
        out = self.model(**batch.to(next(self.model.parameters()).device))
        images, words = (normalize(x.float(), dim=1).cpu() for x in (out.image_embeds, out.text_embeds))
        cosines = images @ words.T
        own = cosines[:, target].clone()
        cosines[:, target] = -torch.inf
        return (own - cosines.amax(1)).numpy(), images.numpy()


def open_judge(name: str, device: str = "cpu") -> Any:
    """The judge of a folder or id: a CLIP, or the toy world's own. Its `margins` gives margin and embedding of
    pictures. Raises UsageError when there is none."""
    from transformers import CLIPModel, CLIPProcessor

    if (Path(name) / recognition.FILE).exists():
        return recognition.load_judge(Path(name), device)
    try:
        return ClipJudge(CLIPModel.from_pretrained(name).to(device).eval(), CLIPProcessor.from_pretrained(name))
    except OSError as error:
        reason = f"There is no CLIP {name!r} here or on the hub; set imagine.judge to a folder, an id, or nothing."
        raise UsageError(reason) from error
