"""Scores of few-shot segmentation: counts per episode in, mIoU and FB-IoU with intervals out.

The field's mIoU (BAM, MSANet, GenFusion §4): intersections and unions of a novel class are *summed over all its
episodes*, IoU_c = ΣI / ΣU; mIoU is the mean over the fold's classes, then over folds. It is not the mean of the
IoU of single images, which is what `torchmetrics.segmentation.MeanIoU` computes.
FB-IoU = (IoU_foreground + IoU_background) / 2, both summed over all episodes whatever their class.

Intervals are 95 % percentile intervals of a cluster bootstrap: query *images* are drawn with replacement, because
the episodes that share a query share its difficulty. All streams see the same draws, so differences are paired.

Legend: U units drawn (query images), S streams, K = (fold, class) cells, M metrics, R resamples.
IoU is a fraction in [0, 1]; NaN (None in JSON) means that no episode of the class exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from models.errors import UsageError

IGNORE = 255
COUNTS = ("inter_fg", "union_fg", "inter_bg", "union_bg")
COLUMNS = ("episode", "fold", "label", "query", "stream", *COUNTS)
_BLOCK = 500  # resamples held at once: 500 x 4,000 queries of weights are 16 MB
_INTER_FG, _UNION_FG, _INTER_BG, _UNION_BG = range(4)


def episode_counts(prediction: Any, mask: Any) -> dict[str, int]:
    """Pixel counts of one episode at the mask's own size.

    `prediction` [H, W] of {0, 1} or bool, `mask` [H, W] of {0, 1, 255}; pixels of 255 count nowhere.
    Arrays or CPU tensors. Raises ValueError when the sizes differ.
    """
    prediction, mask = np.asarray(prediction), np.asarray(mask)
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction {prediction.shape} and mask {mask.shape} differ; restore the original size first")
    valid = mask != IGNORE
    said, is_there = (prediction != 0) & valid, mask == 1
    pixels, both, either = (int(np.count_nonzero(x)) for x in (valid, said & is_there, said | is_there))
    neither, not_both = pixels - either, pixels - both
    return dict(zip(COUNTS, (both, either, neither, not_both), strict=True))


@dataclass(frozen=True)
class Scores:
    """What `score` found.

    `table`: one row per stream and metric: stream, metric ("miou" | "fb_iou" | "iou"), fold (None: over all folds),
    label and name (None unless "iou"), value, low, high, episodes. `differences`: the same rows for each pair, with
    stream and reference; value = stream - reference. `missing`: (fold, label) of classes without any episode.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    missing: tuple[tuple[int, int], ...]
    queries: int
    resamples: int
    seed: int

    def value(self, stream: str, metric: str = "miou", fold: int | None = None, label: int | None = None) -> float:
        rows = [row for row in self.table.to_dict("records") if row["stream"] == stream and row["metric"] == metric
                and _same(row["fold"], fold) and _same(row["label"], label)]
        if len(rows) != 1:
            raise UsageError(f"There is no score {metric!r} of stream {stream!r} in fold {fold}, class {label}.")
        return float(rows[0]["value"])

    def as_dict(self) -> dict[str, Any]:
        """Nested and ready for JSON: streams -> miou, fb_iou, folds -> miou, fb_iou, classes; differences likewise."""
        return {
            "streams": {stream: _nested(rows) for stream, rows in self.table.groupby("stream", sort=False)},
            "differences": [
                {"stream": stream, "reference": reference, **_nested(rows)}
                for (stream, reference), rows in self.differences.groupby(["stream", "reference"], sort=False)
            ],
            "missing": [{"fold": fold, "label": label} for fold, label in self.missing],
            "queries": self.queries, "resamples": self.resamples, "seed": self.seed,
        }


def score(
    table: pd.DataFrame, classes: Mapping[int, Sequence[int]], *, names: Mapping[int, str] | None = None,
    pairs: Sequence[tuple[str, str]] = (), resamples: int = 10_000, seed: int = 0, stratified: bool = False,
) -> Scores:
    """Scores of every stream of `table` (columns COLUMNS, one row per episode and stream).

    `classes`: the novel label ids of each fold; those without an episode are missing and enter no mean.
    `pairs`: (stream, reference) to subtract. An image that serves several folds is drawn for all of them together;
    with `stratified` it is drawn for each fold apart, which keeps the number of queries of each fold but treats the
    folds as independent: in simulated exams of 91 images its nominal 95 % fell to 84 %, where this one had 92 %.
    Raises UsageError when streams hold different episodes, or a row's class is not in its fold.
    """
    cells = [(int(fold), int(label)) for fold in classes for label in classes[fold]]
    streams = list(dict.fromkeys(table["stream"]))
    _check(table, cells, streams, pairs)
    sums, strata = _sums(table, cells, streams, stratified)
    kinds, values = _statistics(sums.sum(0), cells)
    draws = np.concatenate([_statistics(drawn, cells)[1] for drawn in _resampled(sums, strata, resamples, seed)])
    episodes = _episodes(table[table["stream"] == streams[0]], kinds)
    label_names = names or {}
    rows, differences = [], []
    for s, stream in enumerate(streams):
        rows += _rows({"stream": stream}, kinds, values[s], draws[:, s], episodes, label_names)
    for stream, reference in pairs:
        a, b = streams.index(stream), streams.index(reference)
        head = {"stream": stream, "reference": reference}
        differences += _rows(head, kinds, values[a] - values[b], draws[:, a] - draws[:, b], episodes, label_names)
    return Scores(
        _frame(rows, ["stream"]), _frame(differences, ["stream", "reference"]),
        tuple(cell for cell, n in zip(cells, episodes, strict=False) if n == 0),
        int(table["query"].nunique()), resamples, seed,
    )


def _check(table: pd.DataFrame, cells: list, streams: list[str], pairs: Sequence[tuple[str, str]]) -> None:
    if absent := [name for name in COLUMNS if name not in table.columns]:
        raise UsageError(f"The table of episodes lacks the columns {', '.join(absent)}; write one row per episode.")
    if table.empty:
        raise UsageError("There are no episodes to score; lower min_pixels or choose another fold.")
    if strange := sorted(set(zip(table["fold"], table["label"], strict=True)) - set(cells)):
        raise UsageError(f"Episodes of (fold, class) {strange[:3]} are not in the folds; score them with their own.")
    if unknown := {name for pair in pairs for name in pair} - set(streams):
        raise UsageError(f"No episodes of stream {sorted(unknown)[0]!r}; the table has {', '.join(streams)}.")
    keys = ["episode", "fold", "label", "query"]
    seen = table.groupby(keys, sort=False)["stream"].agg(["size", "nunique"])
    if not ((seen["size"] == len(streams)) & (seen["nunique"] == len(streams))).all():
        raise UsageError("The streams hold different episodes; evaluate all of them on the same frozen list.")


def _sums(table: pd.DataFrame, cells: list, streams: list[str], stratified: bool) -> tuple[np.ndarray, np.ndarray]:
    """Counts [U, S, K, 4] of each drawn unit, and the stratum [U] it is drawn from."""
    keys = ["fold", "query"] if stratified else ["query"]
    unit = table.groupby(keys).ngroup().to_numpy()  # sorted, so that the order of rows changes nothing
    units, first = np.unique(unit, return_index=True)
    stream = table["stream"].map({name: i for i, name in enumerate(streams)}).to_numpy()
    where = {cell: i for i, cell in enumerate(cells)}
    cell = np.array([where[pair] for pair in zip(table["fold"], table["label"], strict=True)])
    sums = np.zeros((len(units), len(streams), len(cells), 4))  # float64 holds counts below 2^53 exactly
    np.add.at(sums, (unit, stream, cell), table[list(COUNTS)].to_numpy(dtype=np.float64))
    strata = table["fold"].to_numpy()[first] if stratified else np.zeros(len(units), dtype=int)
    return sums, strata


def _resampled(sums: np.ndarray, strata: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks [_BLOCK, S, K, 4] of summed counts, each row one draw of the units with replacement within strata."""
    rng = np.random.default_rng(seed)
    flat = sums.reshape(len(sums), -1)
    members = [np.flatnonzero(strata == s) for s in np.unique(strata)]
    for start in range(0, resamples, _BLOCK):
        n = min(_BLOCK, resamples - start)
        total = np.zeros((n, flat.shape[1]))
        for rows in members:
            size = len(rows)
            picks = rng.integers(size, size=(n, size)) + size * np.arange(n)[:, None]
            weights = np.bincount(picks.ravel(), minlength=n * size).reshape(n, size)
            total += weights.astype(np.float64) @ flat[rows]
        yield total.reshape(n, *sums.shape[1:])


def _statistics(sums: np.ndarray, cells: list[tuple[int, int]]) -> tuple[list[tuple], np.ndarray]:
    """Every metric of counts [..., S, K, 4]: its kind (metric, fold, label) and values [..., S, M].

    The first K metrics are the IoU of the cells; then miou and fb_iou of each fold; then both over all folds.
    """
    iou = _ratio(sums[..., _INTER_FG], sums[..., _UNION_FG])
    kinds: list[tuple] = [("iou", fold, label) for fold, label in cells]
    columns, fold_means = [iou], []
    for fold in dict.fromkeys(fold for fold, _ in cells):
        of_fold = np.array([f == fold for f, _ in cells])
        fold_means.append(_mean(iou[..., of_fold]))
        kinds += [("miou", fold, None), ("fb_iou", fold, None)]
        columns += [fold_means[-1][..., None], _fb(sums[..., of_fold, :])[..., None]]
    kinds += [("miou", None, None), ("fb_iou", None, None)]
    columns += [_mean(np.stack(fold_means, -1))[..., None], _fb(sums)[..., None]]
    return kinds, np.concatenate(columns, -1)


def _fb(sums: np.ndarray) -> np.ndarray:
    all_classes = sums.sum(-2)
    foreground = _ratio(all_classes[..., _INTER_FG], all_classes[..., _UNION_FG])
    background = _ratio(all_classes[..., _INTER_BG], all_classes[..., _UNION_BG])
    return (foreground + background) / 2


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    present = ~np.isnan(values)
    return _ratio(np.where(present, values, 0.0).sum(-1), present.sum(-1))


def _interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5 and 97.5 percentiles [M] of draws [R, M]; draws without the class are left out."""
    low, high = np.full((2, draws.shape[1]), np.nan)
    for m, column in enumerate(draws.T):
        present = column[~np.isnan(column)]
        if len(present):
            low[m], high[m] = np.percentile(present, (2.5, 97.5))
    return low, high


def _episodes(table: pd.DataFrame, kinds: list[tuple]) -> list[int]:
    per_cell = table.groupby(["fold", "label"]).size().to_dict()
    return [
        sum(n for (f, c), n in per_cell.items() if fold in (None, f) and label in (None, c))
        for _, fold, label in kinds
    ]


def _rows(head: dict, kinds: list, values: np.ndarray, draws: np.ndarray, episodes: list[int], names: Mapping) -> list:
    low, high = _interval(draws)
    return [
        {**head, "metric": metric, "fold": fold, "label": label,
         "name": None if label is None else names.get(label, str(label)),
         "value": float(values[m]), "low": float(low[m]), "high": float(high[m]), "episodes": episodes[m]}
        for m, (metric, fold, label) in enumerate(kinds)
    ]


def _frame(rows: list[dict], head: list[str]) -> pd.DataFrame:
    columns = [*head, "metric", "fold", "label", "name", "value", "low", "high", "episodes"]
    return pd.DataFrame(rows, columns=columns).astype({"fold": "Int64", "label": "Int64"})


def _nested(rows: pd.DataFrame) -> dict[str, Any]:
    tree: dict[str, Any] = {"folds": {}}
    for row in rows.to_dict("records"):
        whole = pd.isna(row["fold"])
        place = tree if whole else tree["folds"].setdefault(str(row["fold"]), {"classes": {}})
        leaf = {key: None if np.isnan(row[key]) else row[key] for key in ("value", "low", "high")}
        leaf["episodes"] = int(row["episodes"])
        if row["metric"] == "iou":
            place["classes"][row["name"]] = {"label": int(row["label"]), **leaf}
        else:
            place[row["metric"]] = leaf
    return tree


def _same(found: Any, wanted: int | None) -> bool:
    return pd.isna(found) if wanted is None else (not pd.isna(found) and int(found) == wanted)
