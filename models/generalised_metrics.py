"""Scores of generalised few-shot segmentation, each under the name of its convention.

Intersections and unions are summed over the whole test set, in one confusion matrix; an IoU is never averaged over
pictures. The literature then averages in three ways, which authors themselves call incomparable (Syn4Seg spec §4.2):

    capl   CAPL, POP           base with the background; third number "total", the mean over all 1 + K_b + K_n
    diam   DIaM, BCM, VP       base without it; third number "mean", (base + novel) / 2
    bam    BAM                 base without it; third number "total", the mean over the K_b + K_n classes; predictions
                               are made for one novel class at a time, so its confusion matrix is another one

All give H = 2 B N / (B + N) of their own base and novel numbers. Class ids are those of the dataset, 0 the background.
IoU is a fraction in [0, 1]; a class that is neither in the labels nor in the predictions has none (NaN) and enters no
mean. Legend: K = 1 + classes of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from models.errors import UsageError

IGNORE = 255
PROTOCOLS = {"capl": "total", "diam": "mean", "bam": "total"}


def confusion(prediction: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes + 1, classes + 1] pixel counts, truth by row, prediction by column; label 255 counts nowhere.

    Raises ValueError when the sizes differ or a prediction is no class.
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ; restore the original size")
    valid = label != IGNORE
    side = classes + 1
    said, true = prediction[valid].astype(np.int64), label[valid].astype(np.int64)
    if said.size and max(said.max(), true.max()) > classes:
        raise ValueError(f"ids beyond {classes} in prediction or label")
    return np.bincount(true * side + said, minlength=side * side).reshape(side, side)


def class_ious(matrix: np.ndarray) -> np.ndarray:
    """IoU [K] of each class of a confusion matrix [K, K]; NaN where it never occurs."""
    both = np.diag(matrix).astype(float)
    either = matrix.sum(0) + matrix.sum(1) - both
    return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)


def harmonic(base: float, novel: float) -> float:
    """2 B N / (B + N); 0 when either is 0, NaN when either is."""
    return 2 * base * novel / (base + novel) if base + novel else (0.0 if base + novel == 0 else float("nan"))


def generalised_scores(
    matrix: np.ndarray, base: Sequence[int], novel: Sequence[int], protocol: str,
) -> dict[str, float]:
    """"base", "novel", the protocol's third number under its own name, and "harmonic"."""
    _check(protocol)
    iou = class_ious(matrix)
    seen = [0, *base] if protocol == "capl" else list(base)
    scores = {"base": _mean(iou[seen]), "novel": _mean(iou[list(novel)])}
    third = _mean(iou[[*seen, *novel]]) if PROTOCOLS[protocol] == "total" else sum(scores.values()) / 2
    return scores | {PROTOCOLS[protocol]: third, "harmonic": harmonic(scores["base"], scores["novel"])}


def score_rows(
    matrix: np.ndarray, base: Sequence[int], novel: Sequence[int], protocols: Sequence[str] = ("capl", "diam"), **head,
) -> pd.DataFrame:
    """All numbers of one run as rows: protocol, metric, label (None unless "iou"), value, and what `head` says.

    "bam" belongs here only for a matrix of one-novel-class predictions, so it is not among the defaults.
    """
    rows = [head | {"protocol": protocol, "metric": metric, "label": None, "value": value}
            for protocol in protocols for metric, value in generalised_scores(matrix, base, novel, protocol).items()]
    iou = class_ious(matrix)
    rows += [head | {"protocol": "+".join(protocols), "metric": "iou", "label": k, "value": float(iou[k])}
             for k in (0, *base, *novel)]
    return pd.DataFrame(rows).astype({"label": "Int64"})


def summary(rows: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Rows of many (fold, seed) runs, averaged over seeds, then over folds: protocol, metric, value, low, high, runs.

    The interval is Student's over the seeds' means over folds, NaN with one seed. "harmonic" is that of the averaged
    base and novel numbers; "harmonic_of_folds" averages the folds' own.
    """
    table = rows[rows["metric"] != "iou"]
    per_seed = table.groupby(["protocol", "metric", "seed"])["value"].mean()
    over_folds = table.groupby(["protocol", "metric", "fold"])["value"].mean().groupby(["protocol", "metric"]).mean()
    runs, found = table.groupby(["protocol", "metric"]).size(), []
    for protocol, metric in over_folds.index:
        low, high = student(per_seed[protocol, metric].to_numpy(), confidence)
        found.append({"protocol": protocol, "metric": metric, "value": over_folds[protocol, metric], "low": low,
                      "high": high, "runs": int(runs[protocol, metric])})
    out = pd.DataFrame(found).replace({"metric": {"harmonic": "harmonic_of_folds"}})
    primary = [row | {"metric": "harmonic"} | {"value": harmonic(over_folds[row["protocol"], "base"],
                                                                over_folds[row["protocol"], "novel"])}
               for row in out[out["metric"] == "harmonic_of_folds"].to_dict("records")]
    return pd.concat([out, pd.DataFrame(primary)]).sort_values(["protocol", "metric"], ignore_index=True)


def gap_closed(floor: float, reached: float, ceiling: float) -> float:
    """How much of the way from a floor to a ceiling was made: 0 none, 1 all; NaN where there is no gap."""
    return (reached - floor) / (ceiling - floor) if ceiling > floor else float("nan")


def student(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The ends of Student's interval of the mean; NaN of fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _check(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UsageError(f"There is no protocol {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
