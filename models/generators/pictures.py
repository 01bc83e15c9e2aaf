"""Pictures on their way in and out of a generator, and how well a translation kept the edges.

Legend: H, W height and width in pixels; tensors are [B,c,H,W] in [-1,1], pictures uint8 [H,W] or [H,W,3].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LUMINANCE = (0.2126, 0.7152, 0.0722)


def lightness(rgb: Tensor) -> Tensor:
    """CIE L* (D65) of sRGB, both scaled to [-1,1]: [B,3,H,W] -> [B,1,H,W]; -1 is L* 0, 1 is L* 100."""
    value = (rgb + 1) / 2
    linear = torch.where(value <= 0.04045, value / 12.92, ((value.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    y = (linear * linear.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
    star = torch.where(y > (6 / 29) ** 3, 116 * y.clamp_min(1e-6) ** (1 / 3) - 16, y * (29 / 3) ** 3)
    return star / 50 - 1


def lightness_picture(rgb: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> uint8 [H,W], 0..255 for L* 0..100."""
    return to_picture(lightness(to_tensor(rgb)[None])[0])


def to_tensor(picture: np.ndarray) -> Tensor:
    """uint8 [H,W] or [H,W,3] -> float [c,H,W] in [-1,1]."""
    array = picture[..., None] if picture.ndim == 2 else picture
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(image: Tensor) -> np.ndarray:
    """float [c,H,W] in [-1,1] -> uint8 [H,W] or [H,W,3]."""
    array = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[2] == 1 else array


def random_crop(picture: np.ndarray, crop: int, short_side: int | None, rng: np.random.Generator) -> Tensor:
    """A square crop of the picture, flipped at random -> [c,crop,crop].

    The picture is first scaled so that its short side is 1 to 1.1 times `short_side` (None: left alone), and never
    less than the crop.
    """
    image = to_tensor(picture)[None]
    short = min(image.shape[2:])
    wanted = max(crop, short if short_side is None else round(short_side * rng.uniform(1.0, 1.1)))
    if wanted != short:
        size = [max(crop, round(side * wanted / short)) for side in image.shape[2:]]
        image = F.interpolate(image, size, mode="bilinear", antialias=True)
    top, left = (int(rng.integers(side - crop + 1)) for side in image.shape[2:])
    image = image[0, :, top : top + crop, left : left + crop]
    return image.flip(2) if rng.random() < 0.5 else image


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Pads bottom and right by reflection (by repetition where a side is too short to reflect)."""
    right, bottom = -images.shape[3] % stride, -images.shape[2] % stride
    mode = "reflect" if bottom < images.shape[2] and right < images.shape[3] else "replicate"
    return F.pad(images, (0, right, 0, bottom), mode=mode) if right or bottom else images


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical Sobel derivatives of the channel mean: [B,c,H,W] -> twice [B,1,H-2,W-2]."""
    grey = images.mean(1, keepdim=True)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=grey.device, dtype=grey.dtype)[None, None] / 8
    return F.conv2d(grey, kernel), F.conv2d(grey, kernel.transpose(2, 3))


def structure_loss(source: Tensor, output: Tensor, noise: float = 0.02) -> Tensor:
    """1 - cos² of the angle between the gradients of source and output, weighted by the source's edges; in [0,1].

    Normalised gradient fields (Haber and Modersitzki 2006): the polarity of an edge is free, since what is bright in
    infrared may be dark to the eye. `noise` is the gradient below which there is no edge.
    """
    (sx, sy), (ox, oy) = gradients(source), gradients(output)
    source_energy = sx.square() + sy.square()
    agreement = (sx * ox + sy * oy).square() / ((source_energy + 1e-8) * (ox.square() + oy.square() + noise**2))
    weight = source_energy / (source_energy + noise**2)
    return (weight * (1 - agreement)).sum() / (weight.sum() + 1e-8)


def edge_agreement(source: np.ndarray, output: np.ndarray) -> float:
    """Normalised correlation of the two pictures' gradients, in [-1,1], blind to the polarity of edges.

    Angles are doubled before the correlation, so that a light-to-dark edge equals a dark-to-light one. 1: the same
    edges at the same places; 0: unrelated, or one picture is flat; below 0: edges cross at right angles.
    """
    (sx, sy), (ox, oy) = (gradients(to_tensor(picture)[None]) for picture in (source, output))
    source_norm, output_norm = torch.hypot(sx, sy), torch.hypot(ox, oy)
    energies = source_norm.square().sum(), output_norm.square().sum()
    if min(energies) < 1e-9 * sx.numel():
        return 0.0
    cos_double = 2 * (sx * ox + sy * oy).square() / (source_norm * output_norm).square().clamp_min(1e-12) - 1
    return float((source_norm * output_norm * cos_double).sum() / (energies[0] * energies[1]).sqrt())
