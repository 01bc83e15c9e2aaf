"""Tabulate fused pictures: one row per fuser with the mean of every metric, and what it gains over the best control.

Intervals are 95 %, of a bootstrap over test frames; gains are paired, frame by frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from models.fusers.metrics import METRICS

GOALS = ("Qabf", "VIF", "SCD")


@dataclass(frozen=True)
class FusedRow:
    """One line: its name, what it is, and whether it is a control."""

    name: str
    about: str
    control: bool = False


def tabulate_metrics(
    pictures: Mapping[str, pd.DataFrame], rows: Sequence[FusedRow], resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Columns row, about, pictures, METRICS; for each of GOALS g also g_low, g_high, and over_g, over_g_low,
    over_g_high: the gain over the control that is best in g (None for controls, or without any).

    pictures: row name -> what `tasks.fuse` made, the same frames for all rows.
    """
    values = {row.name: pictures[row.name].sort_values("id")[list(METRICS)].to_numpy(float) for row in rows}
    count = len(next(iter(values.values())))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
    controls = [row.name for row in rows if row.control]
    lines = []
    for row in rows:
        mine = values[row.name]
        line = {"row": row.name, "about": row.about, "pictures": count}
        line |= {name: _round(value) for name, value in zip(METRICS, mine.mean(0), strict=True)}
        for goal in GOALS:
            n = list(METRICS).index(goal)
            line |= dict(zip((f"{goal}_low", f"{goal}_high"), _bounds(draws @ mine[:, n]), strict=True))
            best = max(controls, key=lambda name: values[name][:, n].mean()) if controls and not row.control else None
            line |= _gain(goal, draws, None if best is None else mine[:, n] - values[best][:, n])
        lines.append(line)
    return pd.DataFrame(lines)


def _gain(goal: str, draws: np.ndarray, difference: np.ndarray | None) -> dict[str, float | None]:
    names = (f"over_{goal}", f"over_{goal}_low", f"over_{goal}_high")
    if difference is None:
        return dict.fromkeys(names)
    return dict(zip(names, (_round(difference.mean()), *_bounds(draws @ difference)), strict=True))


def _bounds(drawn: np.ndarray) -> tuple[float, float]:
    return tuple(_round(value) for value in np.percentile(drawn, (2.5, 97.5)))


def _round(value: float) -> float:
    return round(float(value), 4)


def metrics_markdown(table: pd.DataFrame) -> str:
    """The table for people: means of all metrics, gains over the best control with their intervals in brackets."""
    head = ["row", *METRICS, *(f"{goal} over best control" for goal in GOALS), "what it is"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in table.to_dict("records"):
        cells = [row["row"], *(f"{row[name]:.3f}" for name in METRICS), *(_over(row, goal) for goal in GOALS)]
        lines.append("| " + " | ".join([*cells, row["about"]]) + " |")
    return "\n".join([*lines, ""])


def _over(row: Mapping[str, Any], goal: str) -> str:
    value, low, high = (row[f"over_{goal}{end}"] for end in ("", "_low", "_high"))
    return "–" if pd.isna(value) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
