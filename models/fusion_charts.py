"""Charts of fused pictures: dots with intervals, one panel per metric, and a metric along how wrong the masks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.errors import UsageError
from models.plots import INK, STREAM_COLOURS, contact_sheet, quiet

ACCENT = STREAM_COLOURS["fusion"]


def metric_dots(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], controls: Sequence[str]) -> Figure:
    """One panel per metric, one line per row {row, <metric>, <metric>_low, <metric>_high}; a rule stands at the best of
    `controls`. Raises UsageError without rows."""
    if not rows:
        raise UsageError("There is no row to draw; run the study first.")
    figure = Figure(figsize=(2.4 + 2.3 * len(metrics), 0.9 + 0.26 * len(rows)), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for y, row in enumerate(rows):
            spread = [[row[metric] - row[f"{metric}_low"]], [row[f"{metric}_high"] - row[metric]]]
            colour = INK if row["row"] in controls else ACCENT
            axis.errorbar([row[metric]], [y], xerr=np.clip(spread, 0, None), fmt="o", color=colour, markersize=4)
        best = max((row[metric] for row in rows if row["row"] in controls), default=None)
        if best is not None:
            axis.axvline(best, color=INK, linewidth=0.8, alpha=0.6, zorder=0)
        axis.set_title(metric, fontsize=9, color=INK, loc="left")
        axis.set_ylim(len(rows) - 0.5, -0.5)
        quiet(axis)
    axes[0].set_yticks(range(len(rows)), [row["row"].replace("_", " ") for row in rows], fontsize=8, color=INK)
    return figure


def metric_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]], rules: Mapping[str, Mapping[str, float]],
    label: str,
) -> Figure:
    """One panel per metric: points (x, value, low, high), and dashed rules by name. Raises UsageError without any."""
    if not curves:
        raise UsageError("There is no curve to draw; run the study first.")
    figure = Figure(figsize=(0.8 + 2.6 * len(curves), 2.6), layout="constrained")
    figure.patch.set_alpha(0)
    for axis, (metric, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        x, value, low, high = zip(*sorted(points), strict=True)
        axis.plot(x, value, "o-", color=ACCENT, markersize=3.5)
        axis.fill_between(x, low, high, color=ACCENT, alpha=0.1, linewidth=0)
        for style, (name, height) in zip((":", "--", "-."), rules.get(metric, {}).items(), strict=False):
            axis.axhline(height, color=INK, linewidth=0.9, linestyle=style, label=name.replace("_", " "))
        axis.set_xticks(x)
        axis.set_title(metric, fontsize=9, color=INK, loc="left")
        quiet(axis)
        axis.tick_params(axis="y", colors=INK, labelsize=8)
        axis.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=8, frameon=False, labelcolor=INK, loc="outside upper right", ncols=3)
    figure.supxlabel(label, fontsize=9, color=INK)
    return figure


def fused_sheet(scenes: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """One line per scene, one column per picture of it (name -> uint8 [H,W] or [H,W,3], the same names in each)."""
    images = [picture for scene in scenes for picture in scene.values()]
    titles = [name.replace("_", " ") for scene in scenes for name in scene]
    return contact_sheet(images, titles, columns=len(scenes[0]) if scenes else 1)
