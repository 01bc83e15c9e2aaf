"""Sizes: frames onto the canvas of a network and back, and the joint random transforms of training.

`exact` stretches a frame to the canvas, fills all of it, and `restore` undoes it with the true scales.
`bam` repeats the test geometry of BAM and MSANet (GenFusion spec §6) so that numbers can be compared: the long side
becomes S, each side is floored to a multiple of 8, the picture lies top-left on an S x S canvas of zeros, and the
prediction is stretched to a square of the long side; the flooring is never undone (up to 4 px of drift).

Random transforms go through torchvision.transforms.v2: every stream and label of a frame takes the same geometry.
Its transform classes draw from torch's global generator, so the parameters are drawn here from an explicit one and
the functional kernels, which treat an Image and a Mask rightly by their type, do the work.

Legend: V streams, C channels, H x W the canvas, h x w a frame's own size. Images are float in 0..1.
Labels are uint8 with 255 for ignored pixels. Resizing has half-pixel centres (align_corners=False) throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from models.errors import UsageError

IGNORE = 255
STRIDE = 8
GREY = (0.485, 0.456, 0.406)  # ImageNet's mean: zero once the encoder has normalised it


def valid_size(height: int, width: int) -> tuple[int, int]:
    """The nearest size whose sides are both 8n or both 8n + 1; for each form the sides are rounded, not floored."""
    options = [tuple(max(STRIDE, STRIDE * round((side - extra) / STRIDE)) + extra for side in (height, width))
               for extra in (0, 1)]
    return min(options, key=lambda size: abs(size[0] - height) + abs(size[1] - width))


def is_valid(height: int, width: int) -> bool:
    return height % STRIDE == width % STRIDE and height % STRIDE in (0, 1) and min(height, width) >= STRIDE


def cells(height: int, width: int) -> tuple[int, int]:
    """The feature grid of a stride-8 encoder: n cells of a side of 8n, n + 1 of a side of 8n + 1."""
    return -(-height // STRIDE), -(-width // STRIDE)


def enlarge(scores: Tensor, canvas: tuple[int, int], shrink: int = 1) -> Tensor:
    """Scores [B, C, ...] of the grid on the canvas [H, W], or on every `shrink`-th of its pixels; bilinear.

    On a canvas of 8n + 1 cell i is pixel 8i exactly, on one of 8n cells are taken for areas of 8 x 8 pixels.
    """
    size = tuple(side // shrink for side in canvas)
    if canvas[1] % STRIDE != 1:
        return interpolate(scores, size, mode="bilinear", align_corners=False)
    full = interpolate(scores, tuple(canvas), mode="bilinear", align_corners=True)
    return full if shrink == 1 else interpolate(full, size, mode="nearest-exact")


def as_image(picture: np.ndarray) -> Tensor:
    """uint8 [H, W] (repeated) or [H, W, 3] -> float [3, H, W] in 0..1, as the encoders want it."""
    channels = picture[..., None].repeat(3, -1) if picture.ndim == 2 else picture
    return torch.from_numpy(np.ascontiguousarray(channels)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Canvas:
    """The input size [H, W] of a network and how frames come onto it (`mode` "exact" or "bam").

    Raises UsageError for a size that is not 8n or 8n + 1 on both sides, naming the nearest one; `bam` needs a square.
    """

    size: tuple[int, int] = (360, 480)
    mode: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        height, width = self.size
        if self.mode not in ("exact", "bam"):
            raise UsageError(f"There is no letterbox mode {self.mode!r}; choose exact or bam.")
        if not is_valid(height, width):
            near = valid_size(height, width)
            raise UsageError(f"Size {height}x{width} does not fit stride 8; use {near[0]}x{near[1]}.")
        if self.mode == "bam" and height != width:
            raise UsageError(f"The bam letterbox is square; use {max(self.size)}x{max(self.size)}.")

    def content(self, height: int, width: int) -> tuple[int, int]:
        """The part of the canvas (from its top left) that a frame of height x width covers."""
        if self.mode == "exact":
            return self.size
        scale = self.size[0] / max(height, width)
        rows, columns = (int(side * scale) // STRIDE * STRIDE for side in (height, width))
        return max(STRIDE, rows), max(STRIDE, columns)

    def image(self, image: Tensor) -> Tensor:
        """[..., C, h, w] float in 0..1 -> [..., C, H, W]; bilinear, antialiased when it shrinks."""
        content = self.content(*image.shape[-2:])
        resized = transforms.resize(image, list(content), InterpolationMode.BILINEAR, antialias=True)
        return self._placed(resized, 0.0)

    def label(self, label: Tensor) -> Tensor:
        """[..., h, w] uint8 -> [..., H, W]; nearest, 255 outside the content."""
        return self._placed(_nearest(label, self.content(*label.shape[-2:])), IGNORE)

    def restore(self, scores: Tensor, height: int, width: int) -> Tensor:
        """Scores [B, C, ...] of the canvas, or of its grid, -> [B, C, h, w] of the frame; bilinear."""
        if scores.shape[-2:] == cells(*self.size) and self.size[1] % STRIDE == 1:
            scores = enlarge(scores, self.size)
        if self.mode == "exact":
            return interpolate(scores, (height, width), mode="bilinear", align_corners=False)
        side = max(height, width)
        return interpolate(scores, (side, side), mode="bilinear", align_corners=False)[..., :height, :width]

    def restore_label(self, label: Tensor, height: int, width: int) -> Tensor:
        """[..., H, W] uint8 -> [..., h, w]; nearest."""
        if self.mode == "exact":
            return _nearest(label, (height, width))
        side = max(height, width)
        return _nearest(label, (side, side))[..., :height, :width]

    def _placed(self, resized: Tensor, fill: float) -> Tensor:
        rows, columns = resized.shape[-2:]
        return pad(resized, (0, self.size[1] - columns, 0, self.size[0] - rows), value=fill)


def _nearest(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest with half-pixel centres, as the bilinear images have; v2's own "nearest" for masks has not."""
    flat = label.reshape(1, -1, *label.shape[-2:])
    return interpolate(flat, size, mode="nearest-exact").reshape(*label.shape[:-2], *size)


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random transforms; the defaults are the episodic recipe (GenFusion spec §3.5).

    scale is relative to the canvas (1 = as in testing), rotate in degrees, keep the share of the focus class that a
    crop must retain within `tries` draws. Photometry, for infrared streams: gain, gamma factors, offset and noise in
    units of the 0..1 range, blur as a Gaussian sigma in pixels. Every probability is of one frame.
    """

    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = 10.0
    rotate_probability: float = 0.5
    flip_probability: float = 0.5
    keep: float = 0.85
    tries: int = 31
    photometric_probability: float = 0.8
    gain: tuple[float, float] = (0.8, 1.25)
    offset: tuple[float, float] = (-0.1, 0.1)
    gamma: tuple[float, float] = (0.8, 1.25)
    noise: tuple[float, float] = (0.0, 0.03)
    blur: tuple[float, float] = (0.1, 1.5)
    blur_probability: float = 0.5


def augment(
    streams: Tensor, labels: Tensor, canvas: Canvas, settings: Augmentation, generator: torch.Generator,
    focus: int | None = None, infrared: tuple[int, ...] = (0,),
) -> tuple[Tensor, Tensor]:
    """One training view of one frame: streams [V, C, h, w] in 0..1 and labels [..., h, w] uint8 share the geometry.

    Scale, rotation, flip and crop to the canvas; outside the frame images are grey and labels 255. `focus` is the
    class id that the crop should keep (read off the first label); `infrared` the streams that get photometric jitter.
    The result depends on the arguments and the CPU generator's state alone. Returns [V, C, H, W] and [..., H, W].
    """
    fill = {tv_tensors.Image: list(GREY[: streams.shape[-3]]), tv_tensors.Mask: float(IGNORE)}
    factor = _uniform(settings.scale, generator)
    size = tuple(max(1, round(side * factor)) for side in canvas.size)
    angle = _uniform((-settings.rotate, settings.rotate), generator) * _chance(settings.rotate_probability, generator)
    flipped = _chance(settings.flip_probability, generator)
    image = transforms.resize(streams, list(size), InterpolationMode.BILINEAR, antialias=True)
    mask = _nearest(labels.reshape(-1, *labels.shape[-2:]), size)
    views = []
    for view in (tv_tensors.Image(image), tv_tensors.Mask(mask)):
        if angle:
            view = transforms.rotate(view, angle, InterpolationMode.BILINEAR, fill=fill[type(view)])
        view = transforms.horizontal_flip(view) if flipped else view
        short = [max(0, side - have) for side, have in zip(canvas.size, view.shape[-2:], strict=True)]
        views.append(transforms.pad(view, [0, 0, short[1], short[0]], fill=fill[type(view)]))
    top, left = _crop(views[1][0] == focus if focus is not None else None, views[1].shape[-2:], canvas, settings,
                      generator)
    streams, labels_out = (transforms.crop(view, top, left, *canvas.size).as_subclass(Tensor) for view in views)
    if infrared:
        views = [photometric(x, settings, generator) if v in infrared else x for v, x in enumerate(streams)]
        streams = torch.stack(views)
    return streams, labels_out.reshape(*labels.shape[:-2], *canvas.size)


def photometric(image: Tensor, settings: Augmentation, generator: torch.Generator) -> Tensor:
    """What cameras do to one infrared picture [C, H, W]: blur, gamma, gain, offset, noise; equal in all channels."""
    if not _chance(settings.photometric_probability, generator):
        return image
    if _chance(settings.blur_probability, generator):
        sigma = _uniform(settings.blur, generator)
        image = transforms.gaussian_blur(image, [5, 5], [sigma, sigma])
    gamma, gain = (_uniform(limits, generator) for limits in (settings.gamma, settings.gain))
    offset, sigma = (_uniform(limits, generator) for limits in (settings.offset, settings.noise))
    noise = sigma * torch.randn(1, *image.shape[-2:], generator=generator).to(image)
    return (gain * image.clamp(0, 1) ** gamma + offset + noise).clamp(0, 1)


def _crop(focus: Tensor | None, size: torch.Size, canvas: Canvas, settings: Augmentation,
          generator: torch.Generator) -> tuple[int, int]:
    """The corner of the first random crop that keeps enough of `focus` [h', w'], or of the one that keeps most."""
    room = [have - side + 1 for have, side in zip(size, canvas.size, strict=True)]
    draws = torch.stack([torch.randint(r, (settings.tries,), generator=generator) for r in room], 1).tolist()
    if focus is None or room == [1, 1]:
        return tuple(draws[0])
    total, kept = int(focus.sum()), []
    for top, left in draws:
        kept.append(int(focus[top : top + canvas.size[0], left : left + canvas.size[1]].sum()))
        if kept[-1] >= settings.keep * total:
            return top, left
    return tuple(draws[max(range(len(kept)), key=kept.__getitem__)])


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    low, high = limits
    return low + (high - low) * float(torch.rand((), generator=generator))


def _chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
