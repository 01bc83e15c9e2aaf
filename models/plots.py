"""Pictures for people: the qualitative grid, contact sheets and score bars.

Legend: H x W pixels; a picture is uint8 [H, W] or [H, W, 3]; a mask is uint8 [H, W] with 1 foreground, 0 background
and 255 unlabelled. Colours are (red, green, blue), 0..255.

Every function returns a `matplotlib.figure.Figure` of its own. Nothing goes through pyplot, so nothing is global, any
thread may draw, and no display is needed. Backgrounds are transparent and the lettering is a middle grey, so one PNG
reads on a white page and on a dark one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from models.errors import UsageError
from models.metrics import episode_counts

INK = "#7b838c"
UNLABELLED = (128, 128, 128)
STREAM_COLOURS = {"fusion": "#d9500b", "infrared": "#56708c", "rgb": "#25877f", "fused": "#8a5a9e",
                  "prototype": "#a2a9b1"}
STREAM_TITLES = {"fusion": "Fused", "infrared": "Infrared only", "rgb": "RGB only", "prototype": "Prototype (control)",
                 "prototype_both": "Prototype, both", "fused": "Fused picture only"}
LAYER_TITLES = {
    "infrared": "Infrared as it is", "lightness": "Lightness", "thermal_lightness": "Tones matched (control)",
    "rgb": "RGB", "rgb_lightness": "RGB of the lightness", "thermal_rgb": "Colour map (control)",
    "visible": "Real visible",
}


@dataclass(frozen=True)
class Example:
    """One row of the grid: an episode and what each stream made of it.

    name, colour: the class and its fixed colour. support and query are pictures, support_mask and truth masks.
    predictions: column title -> mask [H, W] of the query, drawn in this order.
    """

    name: str
    colour: tuple[int, int, int]
    support: NDArray[np.uint8]
    support_mask: NDArray[np.uint8]
    query: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    predictions: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)


def iou(mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Intersection over union of the foregrounds, in points; NaN when both are empty."""
    counts = episode_counts(mask, truth)
    return 100 * counts["inter_fg"] / counts["union_fg"] if counts["union_fg"] else float("nan")


def stretch(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A one-channel picture with its 1st..99.5th percentile spread over 0..255, so that a cold night can be seen.

    For the eye only; nothing is measured on it. Colour pictures come back as they are.
    """
    if picture.ndim == 3:
        return picture
    low, high = np.percentile(picture, (1, 99.5))
    spread = (picture.astype(np.float32) - low) / max(high - low, 1) * 255
    return spread.clip(0, 255).round().astype(np.uint8)


def overlay(picture: NDArray[np.uint8], mask: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The picture with the foreground tinted and outlined; unlabelled pixels turn grey. Returns uint8 [H, W, 3]."""
    canvas = _rgb(picture).astype(np.float32)
    if canvas.shape[:2] != mask.shape:
        raise UsageError(f"A mask of {mask.shape} cannot lie on a picture of {canvas.shape[:2]}; give both one size.")
    foreground = mask == 1
    for region, paint, weight in (
        (mask == 255, UNLABELLED, 0.5),
        (foreground, colour, 0.4),
        (_edge(foreground), colour, 1.0),
    ):
        canvas[region] = (1 - weight) * canvas[region] + weight * np.asarray(paint, np.float32)
    return canvas.round().astype(np.uint8)


def grid(rows: Sequence[Example], inches: float = 1.9) -> Figure:
    """The picture everyone in this field draws: one episode a row, fixed class colours, IoU in the corner.

    Columns: support with its mask, query, ground truth, then one per prediction. All rows name the same predictions.
    inches: width of one cell. Raises UsageError when there is no row or the rows disagree about their columns.
    """
    titles = list(rows[0].predictions) if rows else []
    if not rows or any(list(row.predictions) != titles for row in rows):
        raise UsageError("The grid needs at least one example, and the same predictions in every example.")
    heading = ["Support", "Query", "Ground truth", *(STREAM_TITLES.get(title, title) for title in titles)]
    aspect = max(row.query.shape[0] / row.query.shape[1] for row in rows)
    figure, axes = _cells(len(rows), len(heading), inches, inches * aspect)
    for axis, title in zip(axes[0], heading, strict=True):
        axis.set_title(title, fontsize=9, color=INK, pad=5)
    for line, row in zip(axes, rows, strict=True):
        _draw_example(line, row)
    return figure


def painted(
    picture: NDArray[np.uint8], label: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]],
) -> NDArray[np.uint8]:
    """The picture under its label map [H, W]: class k in `palette[k - 1]`, unlabelled pixels grey. uint8 [H, W, 3]."""
    canvas = overlay(picture, np.where(label == 255, np.uint8(255), np.uint8(0)), UNLABELLED)
    for k in np.unique(label[(label > 0) & (label < 255)]):
        canvas = overlay(canvas, (label == k).astype(np.uint8), palette[k - 1])
    return canvas


def label_sheet(
    rows: Sequence[tuple[str, NDArray[np.uint8], Mapping[str, NDArray[np.uint8]]]],
    palette: Sequence[tuple[int, int, int]],
) -> Figure:
    """One picture a row, and its label map after each step. rows: (name, picture, title of the step -> label map); all
    rows name the same steps. Raises UsageError when there is no row, or the steps differ."""
    titles = list(rows[0][2]) if rows else []
    if not rows or any(list(labels) != titles for _, _, labels in rows):
        raise UsageError("A sheet of labels needs at least one picture, and the same steps for every picture.")
    aspect = max(picture.shape[0] / picture.shape[1] for _, picture, _ in rows)
    figure, axes = _cells(len(rows), 1 + len(titles), 1.9, 1.9 * aspect)
    for axis, title in zip(axes[0], ["Picture", *titles], strict=True):
        axis.set_title(title, fontsize=9, color=INK, pad=5)
    for line, (name, picture, labels) in zip(axes, rows, strict=True):
        line[0].imshow(_rgb(stretch(picture)), interpolation="nearest")
        _corner(line[0], name)
        for axis, label in zip(line[1:], labels.values(), strict=True):
            axis.imshow(painted(stretch(picture), label, palette), interpolation="nearest")
    return figure


def contact_sheet(images: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int = 4) -> Figure:
    """Pictures [H, W] or [H, W, 3] of any sizes, side by side with a caption each. Raises UsageError when empty."""
    if not images or len(images) != len(titles):
        raise UsageError(f"A contact sheet needs one title per image; got {len(images)} and {len(titles)}.")
    columns = min(columns, len(images))
    aspect = max(image.shape[0] / image.shape[1] for image in images)
    figure, axes = _cells(-(-len(images) // columns), columns, 2.2, 2.2 * aspect, gap=0.2)
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(_rgb(image), interpolation="nearest")
        axis.set_title(title, fontsize=7.5, color=INK, pad=3, loc="left")
    return figure


def score_bars(streams: Mapping[str, Mapping[str, Any]]) -> Figure:
    """mIoU of every stream with its 95 % interval: one group per fold, then the mean over folds, in points.

    streams: the `streams` of `models.metrics.Scores.as_dict()`. What has no value leaves a gap.
    """
    if not streams:
        raise UsageError("There is no score to draw; evaluate first.")
    folds = sorted({fold for tree in streams.values() for fold in tree["folds"]}, key=int)
    groups = [f"fold {fold}" for fold in folds] + (["mean"] if len(folds) != 1 else [])
    figure = Figure(figsize=(6.4, 0.7 + 0.2 * len(groups) * (len(streams) + 1)), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.add_subplot()
    for offset, (stream, tree) in enumerate(streams.items()):
        leaves = [tree["folds"].get(fold, {}).get("miou") for fold in folds] + [tree["miou"]]
        _draw_bars(axis, leaves[: len(groups)], offset, len(streams), stream)
    axis.set_yticks(range(len(groups)), groups, fontsize=9, color=INK)
    axis.invert_yaxis()
    axis.set_xlabel("mIoU, points", fontsize=9, color=INK)
    axis.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    quiet(axis)
    return figure


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as PNG bytes, margins trimmed."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.04)
    return buffer.getvalue()


def _draw_example(axes: Sequence[Axes], row: Example) -> None:
    support, query = stretch(row.support), stretch(row.query)
    axes[0].imshow(overlay(support, row.support_mask, row.colour), interpolation="nearest")
    axes[1].imshow(_rgb(query), interpolation="nearest")
    axes[2].imshow(overlay(query, row.truth, row.colour), interpolation="nearest")
    _corner(axes[0], row.name, colour=_ink_on_dark(row.colour))
    for axis, mask in zip(axes[3:], row.predictions.values(), strict=True):
        axis.imshow(overlay(query, mask, row.colour), interpolation="nearest")
        _corner(axis, f"{iou(mask, row.truth):.0f}")


def _draw_bars(axis: Axes, leaves: Sequence[Mapping | None], offset: int, streams: int, stream: str) -> None:
    """One stream's bar in every group; a leaf is {value, low, high} as fractions, or None."""
    known = [(row, leaf) for row, leaf in enumerate(leaves) if leaf and leaf["value"] is not None]
    value, low, high = (np.array([100 * leaf[key] for _, leaf in known]) for key in ("value", "low", "high"))
    height = 0.84 / streams
    y = np.array([row for row, _ in known]) - 0.42 + height * (offset + 0.5)
    colour = STREAM_COLOURS.get(stream, INK)
    axis.barh(y, value, height * 0.82, color=colour, alpha=0.35, label=STREAM_TITLES.get(stream, stream))
    spread = np.clip([value - low, high - value], 0, None)
    axis.errorbar(value, y, xerr=spread, fmt="o", color=colour, markersize=4, elinewidth=1.6, capsize=0)


def _cells(rows: int, columns: int, width: float, height: float, gap: float = 0.0) -> tuple[Figure, NDArray]:
    """A figure of empty, frameless cells `width` x `height` inches; `gap` inches are left above each for a caption."""
    space = 0.04
    size = (columns * (width + space), rows * (height + space + gap) + 0.3)
    figure = Figure(figsize=size)
    figure.patch.set_alpha(0)
    spread = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.3 / size[1]}
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={**spread, "wspace": space / width, "hspace": (space + gap) / height},
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _corner(axis: Axes, text: str, colour: str = "white") -> None:
    axis.text(
        0.03, 0.96, text, transform=axis.transAxes, va="top", fontsize=8, fontweight="bold", color=colour,
        path_effects=[withStroke(linewidth=2, foreground="black", alpha=0.75)],
    )  # fmt: skip


def quiet(axis: Axes) -> None:
    axis.patch.set_alpha(0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(INK)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", colors=INK, labelsize=8)
    axis.grid(axis="x", color=INK, alpha=0.2, linewidth=0.6)
    axis.set_axisbelow(True)


def _ink_on_dark(colour: tuple[int, int, int]) -> str:
    """The class colour, lifted towards white until it reads on a dark halo."""
    lifted = (np.asarray(colour, float) + 0.45 * (255 - np.asarray(colour, float))) / 255
    return "#" + "".join(f"{round(255 * part):02x}" for part in lifted)


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Foreground pixels with a background pixel among their four neighbours."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def _rgb(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)
