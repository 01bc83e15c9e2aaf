"""Boxes and points in, masks out: SAM through `segment-anything`, and SAM or SAM 2 through `transformers`.

Both encode all pictures of a call in one forward. (The package's own predictor takes one picture at a time, and its
`Sam.forward` cannot go on from embeddings; so the encoder, the prompt encoder and the mask decoder are called here.)
Source: Kirillov et al., "Segment Anything", arXiv 2304.02643; Ravi et al., "SAM 2", arXiv 2408.00714.

Legend: H x W pixels of a picture, S side of the model's square, h x w low-resolution logits, N boxes, M masks of a box,
P points of a box. Coordinates are x, y in pixels of the picture; boxes left, top, right, bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from models.errors import UsageError

WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # of the patch embedding in a published .pth


class Prompts(NamedTuple):
    """What is asked of one picture: boxes float [N, 4], points float [N, P, 2], point_labels int [N, P] (1 inside the
    object, 0 outside); P may be 0."""

    boxes: np.ndarray
    points: np.ndarray
    point_labels: np.ndarray


@dataclass(frozen=True)
class Frame:
    """How a picture lies in the square of a model: `content` is its part of the S x S square, from the top left."""

    size: tuple[int, int]
    content: tuple[int, int]
    side: int

    def to_square(self, coordinates: np.ndarray) -> Tensor:
        """x, y pairs [..., 2] of the picture -> of the square."""
        scale = np.array([self.content[1] / self.size[1], self.content[0] / self.size[0]])
        return torch.from_numpy(np.asarray(coordinates, dtype=np.float64) * scale).float()

    def up(self, logits: Tensor) -> Tensor:
        """[n, h, w] of the square -> [n, H, W] of the picture: to S x S, the content, to H x W; all bilinear."""
        if (self.side, self.side) != tuple(logits.shape[-2:]):
            logits = interpolate(logits[None], (self.side, self.side), mode="bilinear", align_corners=False)[0]
        inside = logits[..., : self.content[0], : self.content[1]]
        if tuple(inside.shape[-2:]) == self.size:
            return inside
        return interpolate(inside[None], self.size, mode="bilinear", align_corners=False)[0]

    def down(self, masks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Masks [n, H, W] of 0 or 1 -> bool [n, h, w] of the low-resolution square (half covered or more)."""
        rows, columns = (max(1, round(c / self.side * g)) for c, g in zip(self.content, grid, strict=True))
        shares = interpolate(masks[None].float(), (rows, columns), mode="area")[0]
        return pad(shares, (0, grid[1] - columns, 0, grid[0] - rows)) >= 0.5


class Masks(NamedTuple):
    """The answer for one picture: logits [N, M, h, w] (above 0: object) of the square, the quality [N, M] that the
    model itself expects (IoU), and the frame."""

    logits: Tensor
    quality: Tensor
    frame: Frame


class BoxSegmenter(Protocol):
    """Anything that answers boxes and points with masks, for several pictures uint8 [H, W] or [H, W, 3] at once."""

    def segment(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompts], masks: int = 3) -> list[Masks]: ...


def rgb(picture: np.ndarray, stretch: bool = False) -> np.ndarray:
    """uint8 [H, W, 3]; an infrared picture is repeated, and with `stretch` its 1st..99th percentiles go to 0..255."""
    if stretch:
        low, high = np.percentile(picture, (1, 99))
        picture = np.clip((picture - low) * (255 / max(high - low, 1)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(picture[..., None].repeat(3, -1) if picture.ndim == 2 else picture)


class OriginalSAM:
    """A `segment_anything.modeling.Sam`. chunk: boxes of one decoder call."""

    def __init__(self, sam: nn.Module, chunk: int = 64) -> None:
        self.sam, self.chunk, self.side = sam.eval(), chunk, sam.image_encoder.img_size

    @torch.inference_mode()
    def segment(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompts], masks: int = 3) -> list[Masks]:
        """Logits at the decoder's resolution; `masks` is 1 or 3."""
        from segment_anything.utils.transforms import ResizeLongestSide

        resize, squares, frames = ResizeLongestSide(self.side), [], []
        for picture in pictures:
            resized = resize.apply_image(rgb(picture))
            frames.append(Frame(picture.shape[:2], resized.shape[:2], self.side))
            image = torch.from_numpy(resized).permute(2, 0, 1).to(self.sam.device)
            squares.append(self.sam.preprocess(image.float()))
        embeddings = self.sam.image_encoder(torch.stack(squares))
        return [self._decode(*one, masks) for one in zip(embeddings, prompts, frames, strict=True)]

    def _decode(self, embedding: Tensor, prompts: Prompts, frame: Frame, masks: int) -> Masks:
        grid = tuple(4 * n for n in embedding.shape[-2:])
        parts = [(torch.empty(0, masks, *grid), torch.empty(0, masks))]
        for start in range(0, len(prompts.boxes), self.chunk):
            piece = Prompts(*(part[start : start + self.chunk] for part in prompts))
            logits, quality = self._mask_decoder(embedding, piece, frame, masks > 1)
            parts.append((logits.float().cpu(), quality.float().cpu()))
        return Masks(*(torch.cat(column) for column in zip(*parts, strict=True)), frame)

    def _mask_decoder(self, embedding: Tensor, prompts: Prompts, frame: Frame, several: bool) -> tuple[Tensor, Tensor]:
        device, points = self.sam.device, None
        if prompts.points.shape[1]:
            labels = torch.from_numpy(np.asarray(prompts.point_labels)).to(device)
            points = (frame.to_square(prompts.points).to(device), labels)
        boxes = frame.to_square(np.asarray(prompts.boxes).reshape(-1, 2, 2)).reshape(-1, 4).to(device)
        sparse, dense = self.sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        return self.sam.mask_decoder(
            image_embeddings=embedding[None], image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=several,
        )


class TransformersSAM:
    """A `transformers` SamModel or Sam2Model. SAM keeps the picture's proportions in its square, SAM 2 stretches it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.keeps_shape = model.eval(), model.config.model_type == "sam"
        side = model.config.prompt_encoder_config.image_size
        self.side = side if isinstance(side, int) else side[0]

    @torch.inference_mode()
    def segment(self, pictures: Sequence[np.ndarray], prompts: Sequence[Prompts], masks: int = 3) -> list[Masks]:
        """As OriginalSAM, with the boxes of all pictures in one forward; missing ones are filled up and dropped."""
        most = max((len(p.boxes) for p in prompts), default=0)
        frames = [self._frame(picture.shape[:2]) for picture in pictures]
        if most == 0:
            return [Masks(torch.empty(0, masks, 1, 1), torch.empty(0, masks), frame) for frame in frames]
        images = torch.stack([self._square(p, f) for p, f in zip(pictures, frames, strict=True)])
        device = next(self.model.parameters()).device
        asked = {name: x.to(device) for name, x in _filled(prompts, frames, most).items()}
        out = self.model(pixel_values=images.to(device), multimask_output=masks > 1, **asked)
        logits, quality = out.pred_masks.float().cpu(), out.iou_scores.float().cpu()
        return [Masks(logits[i, : len(p.boxes)], quality[i, : len(p.boxes)], frame)
                for i, (p, frame) in enumerate(zip(prompts, frames, strict=True))]

    def _frame(self, size: tuple[int, int]) -> Frame:
        scale = self.side / max(size)
        content = tuple(int(n * scale + 0.5) for n in size) if self.keeps_shape else (self.side, self.side)
        return Frame(size, content, self.side)

    def _square(self, picture: np.ndarray, frame: Frame) -> Tensor:
        image = torch.from_numpy(rgb(picture)).permute(2, 0, 1)[None].float() / 255
        image = interpolate(image, frame.content, mode="bilinear", align_corners=False, antialias=True)[0]
        mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        rows, columns = (self.side - n for n in frame.content)
        return pad((image - mean) / deviation, (0, columns, 0, rows))


def _filled(prompts: Sequence[Prompts], frames: Sequence[Frame], most: int) -> dict[str, Tensor]:
    """Boxes [B, most, 4], points [B, most, P, 2] and labels of all pictures, filled up with boxes of whole frames."""
    boxes, points, labels = [], [], []
    for asked, frame in zip(prompts, frames, strict=True):
        short, (height, width) = most - len(asked.boxes), frame.size
        whole = np.array([[0, 0, width, height]] * short, dtype=np.float64).reshape(-1, 4)
        corners = np.concatenate([np.asarray(asked.boxes, np.float64).reshape(-1, 4), whole]).reshape(-1, 2, 2)
        boxes.append(frame.to_square(corners).reshape(-1, 4))
        middle = np.full((short, asked.points.shape[1], 2), (width / 2, height / 2))
        points.append(frame.to_square(np.concatenate([asked.points, middle])))
        ones = np.ones((short, asked.points.shape[1]), np.int64)
        labels.append(torch.from_numpy(np.concatenate([np.asarray(asked.point_labels, np.int64), ones])))
    found = {"input_boxes": torch.stack(boxes)}
    if points[0].shape[1]:
        found |= {"input_points": torch.stack(points), "input_labels": torch.stack(labels)}
    return found


def open_segmenter(weights: str, device: str = "cpu") -> BoxSegmenter:
    """The segmenter of some weights.

    weights: a published sam_vit_*.pth (or its .safetensors), a folder of `models.small_sam`, or a folder or id of a
    transformers SAM or SAM 2. Raises UsageError when there is nothing of the kind.
    """
    path = Path(weights)
    if path.is_file():
        return OriginalSAM(_published(path).to(device))
    if (path / "sam.json").is_file():
        from models.small_sam import load_sam

        return OriginalSAM(load_sam(path).to(device))
    return TransformersSAM(_from_transformers(weights).to(device))


def _published(path: Path) -> nn.Module:
    from segment_anything import sam_model_registry

    from models.encoders import read_weights

    state = read_weights(path)
    width = state.get("image_encoder.patch_embed.proj.weight", torch.empty(0)).shape[0]
    if width not in WIDTHS:
        raise UsageError(f"{path.name} holds no published SAM; give a sam_vit_b, _l or _h file, or a transformers id.")
    sam = sam_model_registry[WIDTHS[width]]()
    sam.load_state_dict(state)
    return sam


def _from_transformers(name: str) -> Any:
    from transformers import AutoConfig, Sam2Model, SamModel

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        kinds = {"sam": SamModel, "sam2": Sam2Model, "sam2_video": Sam2Model}
        return kinds[kind].from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UsageError(f"There is no SAM at {name!r} ({first}); give a .pth file, a folder, or a SAM id.") from error
