"""Tabulate a study: one row per variant with its interval and what it gains over the references, on the same episodes.

Written to `home/studies/<key>/` as `table.parquet`, `table.md` and `chart.png`, and to MLflow: a parent run for the
study, a child run for each row. mIoU and FB-IoU are in points; intervals are 95 %, of a cluster bootstrap over query
images (`models.metrics`), paired where a difference is meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from models.metrics import Scores, score
from tasks import places
from tasks.blobs import write_file
from tasks.stage import StageReport, stage
from tasks.store import table_bytes
from tasks.tracking import Run, night_run

COLUMNS = ("row", "about", "miou", "low", "high", "fb_iou", "seed_low", "seed_high", "episodes")


@dataclass(frozen=True)
class Row:
    """One line of a study. stream: what it is called in the table of episodes."""

    name: str
    about: str
    stream: str


@dataclass(frozen=True)
class StudyOutcome:
    """What a study found. references: the rows that others are measured against. rows: the table as records; report:
    what -> path on this machine."""

    study: str
    recipe: str
    key: str
    references: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    stages: tuple[StageReport, ...]
    report: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tabulate(
    episodes: pd.DataFrame, rows: Sequence[Row], references: Sequence[str], classes: Mapping[int, Sequence[int]],
    resamples: int = 10_000, held_out: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """COLUMNS, and for each reference row r: `over_<r>`, `over_<r>_low`, `over_<r>_high`.

    episodes: `models.metrics.COLUMNS` and seed; the same episodes for every stream. references: names of rows.
    held_out: row -> points on base classes that it did not learn, a column of their own; rows may be chosen by it.
    """
    named = {row.name: row.stream for row in rows}
    kept = episodes[episodes["stream"].isin(named.values())]
    pairs = [(row.stream, named[r]) for row in rows for r in references if row.stream != named[r]]
    scores = score(kept, classes, pairs=pairs, resamples=resamples)
    spread = _per_seed(kept)
    lines = [_line(row, references, named, scores, spread[row.stream]) for row in rows]
    return pd.DataFrame([line | {"held_out": held_out.get(line["row"])} for line in lines] if held_out else lines)


def _line(row: Row, references: Sequence[str], named: Mapping[str, str], scores: Scores, seeds: list[float]) -> dict:
    own, background = (_points(scores.table, metric, stream=row.stream) for metric in ("miou", "fb_iou"))
    line = {
        "row": row.name, "about": row.about, "miou": own[0], "low": own[1], "high": own[2], "fb_iou": background[0],
        "seed_low": min(seeds), "seed_high": max(seeds), "episodes": own[3],
    }
    for name in references:
        differs = named[name] != row.stream
        over = _points(scores.differences, "miou", stream=row.stream, reference=named[name]) if differs else [None] * 3
        line |= {f"over_{name}": over[0], f"over_{name}_low": over[1], f"over_{name}_high": over[2]}
    return line


def _points(table: pd.DataFrame, metric: str, **of: str) -> list:
    """Value, low and high in points over all folds, and the number of episodes."""
    found = table[(table["metric"] == metric) & table["fold"].isna()]
    for column, value in of.items():
        found = found[found[column] == value]
    leaf = found.iloc[0]
    return [round(100 * float(leaf[name]), 2) for name in ("value", "low", "high")] + [int(leaf["episodes"])]


def _per_seed(episodes: pd.DataFrame) -> dict[str, list[float]]:
    """mIoU of each stream on the episodes of each seed, in points; a class that no pixel is or is called enters no
    mean, as in `models.metrics`."""
    found: dict[str, list[float]] = {}
    sums = episodes.groupby(["stream", "seed", "fold", "label"])[["inter_fg", "union_fg"]].sum()
    iou = sums["inter_fg"] / sums["union_fg"].where(sums["union_fg"] > 0)
    ratio = iou.groupby(["stream", "seed", "fold"]).mean()
    for (stream, _), value in ratio.groupby(["stream", "seed"]).mean().items():
        found.setdefault(stream, []).append(round(100 * float(value), 2))
    return found


def markdown(table: pd.DataFrame, references: Sequence[str]) -> str:
    """The table for people: points, intervals in brackets."""
    base = ["held-out base classes"] if "held_out" in table else []
    head = ["row", "mIoU", "FB-IoU", "seeds", *base, *(f"over {name}" for name in references), "what it is"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in table.to_dict("records"):
        cells = [row["row"], _spread(row, "miou", "low", "high"), f"{row['fb_iou']:.2f}"]
        cells.append(f"{row['seed_low']:.1f} to {row['seed_high']:.1f}")
        cells += ["–" if pd.isna(row["held_out"]) else f"{row['held_out']:.1f}" for _ in base]
        cells += [_spread(row, f"over_{n}", f"over_{n}_low", f"over_{n}_high", "+") for n in references]
        lines.append("| " + " | ".join([*cells, row["about"]]) + " |")
    return "\n".join([*lines, ""])


def _spread(row: Mapping[str, Any], value: str, low: str, high: str, sign: str = "") -> str:
    if pd.isna(row[value]):
        return "–"
    return f"{row[value]:{sign}.2f} [{row[low]:{sign}.2f}, {row[high]:{sign}.2f}]"


@stage("write_study")
def write_study(
    study: str, recipe: Any, key: str, table: pd.DataFrame, references: Sequence[str], chart: bytes, run: Run,
    text: str | None = None, pictures: Mapping[str, bytes] | None = None,
) -> dict[str, str]:
    """The study's folder and its MLflow runs; returns what -> path. text: in place of `markdown`. pictures: PNG bytes
    by name, beside the chart."""
    folder = places.home() / "studies" / key
    text = markdown(table, references) if text is None else text
    files = {"table.parquet": table_bytes(table), "table.md": text.encode(), "chart.png": chart}
    files |= {f"{name}.png": data for name, data in (pictures or {}).items()}
    for name, data in files.items():
        write_file(folder / name, data)
        run.file(f"study/{name}", data)
    for row in table.to_dict("records"):
        _child(study, recipe, key, row, run)
    return {Path(name).stem if name.endswith("png") else name: str(folder / name) for name in files}


def _child(study: str, recipe: Any, key: str, row: dict[str, Any], parent: Run) -> None:
    tags = {"study": study, "row": row["row"], "mlflow.parentRunId": parent.id or ""}
    numbers = {name: value for name, value in row.items() if name not in ("row", "about") and value is not None}
    with night_run(f"{study}-{row['row']}", f"{key}-{row['row']}", {"about": row["about"]}, tags) as child:
        child.metrics(numbers)
