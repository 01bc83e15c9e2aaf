"""A small SAM, fitted from scratch: the real `segment_anything.modeling.Sam` behind a small convolutional encoder.

It stands in for the published weights where none can be fetched. It learns outlines of the base classes' objects,
whatever their class, from boxes and points that are off as those of pseudo-labels are; novel classes it has never seen.
Losses: of the three masks the best one counts (binary cross-entropy + Dice), and each mask's IoU is predicted (spec §3;
arXiv 2304.02643 §3). The encoder's stride is 8, for outlines of objects that are small.

Legend: B pictures, N objects of one, S side of the model's square, h x w = S/2 x S/2 low-resolution logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from models.episode import number
from models.errors import UsageError
from models.fitting import Fitting, Tell, batch_indices, run
from models.pseudolabels import find_regions
from models.sam import Frame, rgb

STRIDE = 8


@dataclass(frozen=True)
class SmallSAMSettings:
    """side: S, a multiple of 8. width: of the encoder. channels: of the embeddings (a multiple of 8).

    jitter: how far a training box is off, as a share of its sides. objects: most objects of one picture a step.
    min_area: smaller objects, in pixels, are passed over.
    """

    side: int = 256
    width: int = 32
    channels: int = 64
    blocks: int = 4
    steps: int = 3000
    batch: int = 4
    rate: float = 2e-3
    jitter: float = 0.12
    objects: int = 4
    min_area: int = 40
    seed: int = 0


class ConvEncoder(nn.Module):
    """[B, 3, S, S] -> [B, channels, S/8, S/8]; residual blocks with growing dilation see the whole object."""

    def __init__(self, side: int, width: int, channels: int, blocks: int) -> None:
        super().__init__()
        from segment_anything.modeling.common import LayerNorm2d

        self.img_size = side
        self.stem = nn.Sequential(*(
            layer for inside, outside in ((3, width), (width, 2 * width), (2 * width, 2 * width))
            for layer in (nn.Conv2d(inside, outside, 3, 2, 1), LayerNorm2d(outside), nn.GELU())
        ))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, padding=2**n, dilation=2**n), LayerNorm2d(2 * width),
                          nn.GELU(), nn.Conv2d(2 * width, 2 * width, 1))
            for n in range(blocks)
        )
        self.neck = nn.Sequential(nn.Conv2d(2 * width, channels, 1), LayerNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = x + block(x)
        return self.neck(x)


def build_small_sam(settings: SmallSAMSettings) -> nn.Module:
    """A Sam with random weights from the settings' seed alone."""
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    if settings.side % STRIDE or settings.channels % 8:
        raise UsageError(f"side and channels are multiples of 8, not {settings.side} and {settings.channels}.")
    grid, channels = (settings.side // STRIDE,) * 2, settings.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        transformer = TwoWayTransformer(depth=2, embedding_dim=channels, num_heads=4, mlp_dim=2 * channels)
        return Sam(
            ConvEncoder(settings.side, settings.width, channels, settings.blocks),
            PromptEncoder(channels, grid, (settings.side,) * 2, mask_in_chans=8),
            MaskDecoder(transformer_dim=channels, transformer=transformer, iou_head_hidden_dim=channels),
        )


def save_sam(folder: Path, sam: nn.Module, settings: SmallSAMSettings) -> None:
    """Writes sam.json and sam.safetensors, which `models.sam.open_segmenter` reads."""
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in sam.state_dict().items()}, Path(folder) / "sam.safetensors")
    (Path(folder) / "sam.json").write_text(json.dumps(asdict(settings), indent=1))


def load_sam(folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    sam = build_small_sam(SmallSAMSettings(**json.loads((Path(folder) / "sam.json").read_text())))
    sam.load_state_dict(load_file(Path(folder) / "sam.safetensors"))
    return sam.eval()


# ---- what it learns from


@dataclass(frozen=True)
class Objects:
    """Objects of one picture: boxes [N, 4] (x0, y0, x1, y1, a little off), points [N, 2], masks bool [N, H, W]."""

    boxes: np.ndarray
    points: np.ndarray
    masks: np.ndarray


def sample_objects(label: np.ndarray, base: Sequence[int], settings: SmallSAMSettings, *key: object) -> Objects:
    """Up to `objects` regions of base classes of a label [H, W], with boxes and points as pseudo-labels give them."""
    regions = find_regions(label)
    usable = np.flatnonzero(np.isin(regions.class_id, list(base)) & (regions.area >= settings.min_area))
    rng = np.random.default_rng(number(*key))
    chosen = rng.permutation(usable)[: settings.objects]
    masks = np.stack([regions.index == r for r in chosen]) if len(chosen) else np.zeros((0, *label.shape), bool)
    boxes = regions.box[chosen][:, [1, 0, 3, 2]].reshape(-1, 4).astype(float)
    sides = (boxes[:, 2:] - boxes[:, :2])[:, [0, 1, 0, 1]]
    boxes = boxes + rng.uniform(-settings.jitter, settings.jitter, boxes.shape) * sides
    points = [rng.permutation(np.argwhere(mask))[0, ::-1] for mask in masks]
    return Objects(boxes, np.array(points, float).reshape(-1, 2), masks)


# ---- the step


def mask_losses(logits: Tensor, quality: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """logits [N, M, h, w], quality [N, M], masks [N, h, w] of 0 or 1: of each object the best mask's loss; all IoUs."""
    target = masks[:, None].expand_as(logits).float()
    entropy = binary_cross_entropy_with_logits(logits, target, reduction="none").mean((2, 3))
    shares = logits.sigmoid()
    overlap, total = (shares * target).sum((2, 3)), (shares + target).sum((2, 3))
    outline = (5 * entropy + 1 - (2 * overlap + 1) / (total + 1)).amin(1).mean()
    with torch.no_grad():
        said = logits > 0
        iou = (said & (target > 0)).sum((2, 3)) / (said | (target > 0)).sum((2, 3)).clamp(min=1)
    expected = mse_loss(quality, iou)
    return {"loss": outline + expected, "outline": outline, "quality": expected, "iou": iou.amax(1).mean()}


def sam_losses(sam: nn.Module, pictures: Sequence[np.ndarray], objects: Sequence[Objects]) -> dict[str, Tensor]:
    """One step's losses on pictures uint8 [H, W] or [H, W, 3], encoded together."""
    squares, frames = zip(*(to_square(sam, picture) for picture in pictures), strict=True)
    embeddings = sam.image_encoder(torch.stack(squares))
    parts = [_decoded(sam, *one) for one in zip(embeddings, frames, objects, strict=True) if len(one[2].masks)]
    if not parts:
        return {"loss": embeddings.sum() * 0}
    return mask_losses(*(torch.cat(column) for column in zip(*parts, strict=True)))


def to_square(sam: nn.Module, picture: np.ndarray) -> tuple[Tensor, Frame]:
    """A picture as the model wants it [3, S, S], scaled as `models.sam.OriginalSAM` does it."""
    from segment_anything.utils.transforms import ResizeLongestSide

    resized = ResizeLongestSide(sam.image_encoder.img_size).apply_image(rgb(picture))
    frame = Frame(picture.shape[:2], resized.shape[:2], sam.image_encoder.img_size)
    return sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float().to(sam.device)), frame


def _decoded(sam: nn.Module, embedding: Tensor, frame: Frame, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
    boxes = frame.to_square(objects.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
    points = frame.to_square(objects.points[:, None]), torch.ones(len(objects.points), 1)
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    logits, quality = sam.mask_decoder(
        image_embeddings=embedding[None], image_pe=sam.prompt_encoder.get_dense_pe(), sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense, multimask_output=True,
    )
    return logits, quality, frame.down(torch.from_numpy(objects.masks), tuple(logits.shape[-2:]))


# ---- the loop


def sam_fitting(sam: nn.Module, settings: SmallSAMSettings) -> Fitting:
    return Fitting({"sam": sam}, settings.rate, settings.steps)


def fit_sam(
    sam: nn.Module, fitting: Fitting, pictures: Sequence[np.ndarray], labels: Sequence[np.ndarray],
    base: Sequence[int], settings: SmallSAMSettings, tell: Tell | None = None,
) -> None:
    """Fits a Sam to objects of the base classes; labels [H, W] of class ids."""

    def losses_at(step: int) -> dict[str, Tensor]:
        chosen = batch_indices(len(pictures), settings.batch, settings.seed, "sam", step)
        objects = [sample_objects(labels[n], base, settings, settings.seed, step, int(n)) for n in chosen]
        return sam_losses(sam, [pictures[n] for n in chosen], objects)

    run(fitting, losses_at, tell)
