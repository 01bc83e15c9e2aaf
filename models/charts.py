"""Charts of studies: a dot and its interval for each row, or a curve for each stream along a strength.

Values are points of mIoU; intervals are 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from models.errors import UsageError
from models.plots import INK, STREAM_COLOURS, STREAM_TITLES, quiet

if TYPE_CHECKING:
    from collections.abc import Iterable

ACCENT = STREAM_COLOURS["fusion"]


def dots(rows: Sequence[Mapping[str, Any]], reference: str | None = None) -> Figure:
    """One line per row {row, miou, low, high}, the first on top; a vertical rule stands at the row `reference`.

    Where the rows hold `over_<reference>` with its `_low` and `_high`, a second panel shows these paired differences
    beside a rule at 0: episodes differ more than variants do, so intervals that overlap on the left may well not here.
    """
    if not rows:
        raise UsageError("There is no row to draw; run the study first.")
    over = f"over_{reference}"
    panels = [("mIoU, points", ("miou", "low", "high"), {row["row"]: row["miou"] for row in rows}.get(reference))]
    if any(not pd.isna(row.get(over)) for row in rows):
        title = f"over {reference.replace('_', ' ')}, same episodes"
        panels.append((title, (over, f"{over}_low", f"{over}_high"), 0.0))
    figure = Figure(figsize=(3.2 + 3.2 * len(panels), 0.9 + 0.3 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, keys, rule) in zip(axes, panels, strict=True):
        _draw_dots(axis, rows, keys, reference)
        if rule is not None:
            axis.axvline(rule, color=ACCENT, linewidth=0.8, alpha=0.5, zorder=0)
        axis.set_xlabel(title, fontsize=9, color=INK)
        quiet(axis)
    axes[0].set_yticks(range(len(rows)), [row["row"].replace("_", " ") for row in rows], fontsize=9, color=INK)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _draw_dots(axis: Any, rows: Sequence[Mapping[str, Any]], keys: tuple[str, str, str], reference: str | None) -> None:
    """keys: of value, low and high; a row without a value is left out."""
    for y, row in enumerate(rows):
        value, low, high = (row[key] for key in keys)
        if pd.isna(value):
            continue
        colour = ACCENT if row["row"] == reference else INK
        spread = [[value - low], [high - value]]
        axis.errorbar([value], [y], xerr=spread, fmt="o", color=colour, markersize=5, elinewidth=1.8)


def curves(panels: Mapping[str, Mapping[str, Iterable[tuple[float, float, float, float]]]], label: str) -> Figure:
    """panels: title -> stream -> points (x, miou, low, high). label: what x is. All panels share their axes."""
    if not panels:
        raise UsageError("There is no curve to draw; run the study first.")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(0.8 + 2.5 * columns, 0.6 + 2.1 * lines), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, streams) in zip(axes.flat, panels.items(), strict=False):
        _draw_curves(axis, streams)
        axis.set_title(title.replace("_", " "), fontsize=9, color=INK, loc="left")
        quiet(axis)
        axis.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    figure.supxlabel(label, fontsize=9, color=INK)
    figure.supylabel("mIoU, points", fontsize=9, color=INK)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, labelcolor=INK, loc="outside upper right", ncols=4)
    return figure


def _draw_curves(axis: Any, streams: Mapping[str, Iterable[tuple[float, float, float, float]]]) -> None:
    """Controls are dashed; of the others, later ones are thinner, so that curves which coincide are all seen."""
    learnt = [stream for stream in streams if not stream.startswith("prototype")]
    widths = dict(zip(reversed(learnt), np.linspace(1.5, 3.8, len(learnt)), strict=True))
    for stream, points in streams.items():
        x, value, low, high = zip(*sorted(points), strict=True)
        width, colour = widths.get(stream, 1.2), STREAM_COLOURS.get(stream, INK)
        look = {"color": colour, "linewidth": width, "linestyle": "-" if stream in widths else "--"}
        axis.plot(x, value, marker="o", markersize=2 + width, **look, label=STREAM_TITLES.get(stream, stream))
        axis.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
        axis.set_xticks(x)
    axis.tick_params(axis="y", colors=INK, labelsize=8)
