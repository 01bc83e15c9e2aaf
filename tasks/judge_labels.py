"""Judge labels: real frames with real masks, labelled as if they had none, and what each step makes better or worse.

Frames of the test split that show a novel class are asked for that class, as a prompt would ask for it, and go through
the steps of `models.labelling` with the study's supports. mIoU, precision and coverage (`label_quality`) are taken over
the classes asked for; an unknown pixel of a class counts as missed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.frames import Frames, read_png
from models.labelling import label_counts
from tasks import label as labelling
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.label import LabelStage, open_labeller
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref

KIND = "label_counts"
CODE = ("tasks.judge_labels", *labelling.CODE)
COUNTS = ("both", "either", "said", "seen", "there")
MEASURES = {"miou": ("both", "either"), "precision": ("both", "said"), "coverage": ("seen", "there")}


@stage("judge_labels")
def judge_labels(
    frames: Ref, encoder: Ref, base: Ref, foundation: Ref | None, supports: Mapping[int, Sequence[str]],
    queries: Sequence[str], settings: LabelStage, fold: int, compute: Compute,
) -> Ref:
    """Kind "label_counts"; a row per frame: id, and `counts`, JSON of [step, class id, *COUNTS] rows."""
    opened = open_frames(frames)
    asked = {id: sorted(set(opened.novel(fold)) & set(opened.pixels(id))) for id in queries}
    rows = [{"id": id, "classes": classes} for id, classes in asked.items() if classes]
    chosen = {"rule": settings.rule_for(opened), "sam": settings.sam,
              "supports": {str(k): list(v) for k, v in supports.items()}}
    inputs = [frames, encoder, base, *([foundation] if foundation else [])]
    return fan_out(Judge, rows, chosen, compute, kind=KIND, inputs=inputs, code=CODE)


class Judge:
    """The worker: a labeller; frames one by one, each asked for one class after the other."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, base, *foundation = inputs
        self.labeller, self.layer = open_labeller(settings, frames, encoder, base, *foundation)
        self.frames = Frames.open(frames)

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [{"id": row["id"], "counts": json.dumps(self.judge(row))} for row in shard]

    def judge(self, row: dict) -> list[list]:
        picture, truth = read_png(self.frames.path(row["id"], self.layer)), self.frames.label(row["id"])
        found = []
        for k in row["classes"]:
            (one,) = self.labeller.label([picture], [k])
            found += [[step, k, *label_counts(label, truth, k)] for step, label in one.steps.items()]
        return found


def counted(judged: Ref, **head: Any) -> pd.DataFrame:
    """One row per frame, step and class: frame, step, class_id, COUNTS, and what `head` says."""
    rows = [{"frame": row["id"], "step": step, "class_id": k, **dict(zip(COUNTS, counts, strict=True)), **head}
            for row in places.store().rows(judged).to_dict("records")
            for step, k, *counts in json.loads(row["counts"])]
    return pd.DataFrame(rows)


def label_scores(table: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One row per step: row, frames; of each of MEASURES its value in points with _low and _high; over_predict (mIoU)
    with _low and _high. Means over classes of all folds; 95 % intervals from resampling frames, the same draws for all.
    """
    steps, frames = list(dict.fromkeys(table["step"])), table["frame"].nunique()
    draws = np.random.default_rng(seed).multinomial(frames, [1 / frames] * frames, resamples)
    weights = np.concatenate([np.ones((1, frames)), draws])  # the first is the sample itself
    found = {step: _means(table[table["step"] == step], sorted(table["frame"].unique()), weights) for step in steps}
    rows = []
    for step in steps:
        row: dict[str, Any] = {"row": step, "frames": frames}
        for name in MEASURES:
            row |= _interval(name, found[step][name])
        gain = found[step]["miou"] - found[steps[0]]["miou"] if step != steps[0] else np.full(resamples + 1, np.nan)
        rows.append(row | _interval(f"over_{steps[0]}", gain))
    return pd.DataFrame(rows)


def _means(part: pd.DataFrame, frames: Sequence[str], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure [1 + resamples]: the mean over classes of ratios of weighted sums over frames."""
    per_class = part.groupby(["frame", "class_id"])[list(COUNTS)].sum().unstack(fill_value=0).reindex(frames)
    sums = {name: weights @ per_class[name].fillna(0).to_numpy(float) for name in COUNTS}
    ratios = {name: np.divide(sums[a], sums[b], out=np.full_like(sums[a], np.nan), where=sums[b] > 0)
              for name, (a, b) in MEASURES.items()}
    return {name: _mean_of_known(ratio) for name, ratio in ratios.items()}


def _mean_of_known(ratios: np.ndarray) -> np.ndarray:
    """The mean along the second axis of what is known; NaN where nothing is."""
    known = ~np.isnan(ratios)
    total = np.where(known, ratios, 0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(ratios), np.nan), where=known.any(1))


def _interval(name: str, values: np.ndarray) -> dict[str, float]:
    ends = np.nanpercentile(values[1:], (2.5, 97.5)) if not np.isnan(values[1:]).all() else (np.nan, np.nan)
    return {name + end: round(100 * float(x), 2) for end, x in zip(("", "_low", "_high"), (values[0], *ends),
                                                                   strict=True)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people: points, intervals in brackets."""
    head = ["label", "mIoU", "precision", "coverage", "mIoU over the prediction", "frames"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [_spread(row, name) for name in MEASURES] + [_spread(row, "over_predict", "+"), str(row["frames"])]
        lines.append("| " + " | ".join([row["row"], *cells]) + " |")
    return "\n".join([*lines, ""])


def _spread(row: Mapping[str, Any], name: str, sign: str = "") -> str:
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    return "–" if pd.isna(value) else f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
