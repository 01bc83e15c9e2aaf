"""Tabulate the steps of a generalised night: base, novel and harmonic mIoU, and what each step adds to novel mIoU.

Points, in DIaM's convention (`models.generalised_metrics`): base without background, averages over seeds, then folds.
Intervals are 95 %, Student's over the seeds; gains are paired by seed. With one seed there is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from models.generalised_metrics import gap_closed, student, summary
from tasks.compare_generalised import Course

PROTOCOL = "diam"
METRICS = ("base", "novel", "harmonic")
REFERENCES = ("supports", "previous")
"""What a step is measured against: the first row, and the step before it, which controls are not."""


def tabulate_generalised(scores: pd.DataFrame, steps: Sequence[Course]) -> pd.DataFrame:
    """One row per step: row, about; each of METRICS with _low and _high; over_<r> of each reference r with _low and
    _high (novel mIoU); closed (%: how much of the way from the first row's novel mIoU to that of real masks); runs.

    scores: `tasks.compare_generalised.graded_cells` of all folds and seeds.
    """
    novel = {step.name: _novel(scores, step.name) for step in steps}
    ceiling = next((novel[step.name].mean() for step in steps if step.truth), float("nan"))
    rows, previous = [], None
    for step in steps:
        row = {"row": step.name, "about": step.about} | _metrics(scores, step.name)
        references = {"supports": steps[0].name, "previous": None if step.truth or step.control else previous}
        previous = previous if step.control else step.name
        for name, reference in references.items():
            row |= _gain(name, novel[step.name] - novel[reference] if reference not in (None, step.name) else None)
        closed = 100 * gap_closed(novel[steps[0].name].mean(), novel[step.name].mean(), ceiling)
        rows.append(row | {"closed": round(closed, 1), "runs": len(scores[scores["step"] == step.name]
                                                                  .groupby(["seed", "fold"]))})
    return pd.DataFrame(rows)


def _metrics(scores: pd.DataFrame, step: str) -> dict[str, float]:
    found = summary(scores[scores["step"] == step])
    found = found[found["protocol"] == PROTOCOL].set_index("metric")
    return {name + end: round(100 * float(found.loc[name, column]), 2)
            for name in METRICS for end, column in (("", "value"), ("_low", "low"), ("_high", "high"))}


def _novel(scores: pd.DataFrame, step: str) -> pd.Series:
    """Novel mIoU of a step by seed, the mean over its folds."""
    kept = scores[(scores["step"] == step) & (scores["protocol"] == PROTOCOL) & (scores["metric"] == "novel")]
    return kept.groupby("seed")["value"].mean()


def _gain(name: str, difference: pd.Series | None) -> dict[str, float]:
    values = [float("nan")] * 3
    if difference is not None:
        values = [float(difference.mean()), *student(difference.to_numpy(), 0.95)]
    return {f"over_{name}{end}": round(100 * x, 2) for end, x in zip(("", "_low", "_high"), values, strict=True)}


def step_scores(scores: pd.DataFrame, steps: Sequence[Course], model: pd.DataFrame | None = None) -> dict[str, Any]:
    """For an outcome: "protocol" of the table, its "rows"; "conventions": every number of every step, with the name of
    its convention, as fractions; and "model": those of the model that was kept, where there is one."""
    every = [summary(part).assign(step=step) for step, part in scores.groupby("step", sort=False)]
    kept = summary(model).to_dict("records") if model is not None else []
    return {"protocol": PROTOCOL, "rows": tabulate_generalised(scores, steps).to_dict("records"),
            "conventions": pd.concat(every, ignore_index=True).to_dict("records"), "model": kept}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people: points, intervals in brackets."""
    titles = [f"{name} mIoU ({PROTOCOL})" for name in METRICS] + [f"novel over {name}" for name in REFERENCES]
    head = ["row", *titles, "gap closed", "what it is"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for row in rows:
        cells = [row["row"], *(spread(row, name) for name in METRICS)]
        cells += [spread(row, f"over_{name}", "+") for name in REFERENCES]
        closed = row["closed"]
        lines.append("| " + " | ".join([*cells, "–" if pd.isna(closed) else f"{closed:.0f} %", row["about"]]) + " |")
    return "\n".join([*lines, ""])


def spread(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    """A value with its interval, where it has one."""
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return "–"
    return f"{value:{sign}.1f}" + ("" if pd.isna(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")
