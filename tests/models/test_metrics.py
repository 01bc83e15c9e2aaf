"""Counts and scores against brute force, torchmetrics, and the trap of per-image means."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.classification import BinaryConfusionMatrix, MulticlassJaccardIndex

from models.errors import UsageError
from models.metrics import COUNTS, episode_counts, score

CLASSES = {0: (1, 2), 1: (3, 4)}


def masks(rng, n=1, size=(13, 17), ignore=0.2):
    prediction = rng.integers(0, 2, (n, *size))
    truth = rng.integers(0, 2, (n, *size))
    truth[rng.random(truth.shape) < ignore] = 255
    return prediction, truth


def episodes_table(rng, classes=CLASSES, queries=12, streams=("fusion",), extra=()):
    """Random masks as a table; every query holds every class of every fold."""
    rows, pixels = [], []
    for fold, labels in classes.items():
        for label in labels:
            for q in range(queries):
                for stream in streams:
                    prediction, truth = (x[0] for x in masks(rng))
                    rows.append({"episode": f"{fold}-{label}-{q}", "fold": fold, "label": label, "query": f"q{q}",
                                 "stream": stream, **episode_counts(prediction, truth)})
                    pixels.append((fold, label, stream, prediction, truth))
    return pd.DataFrame(rows + list(extra)), pixels


def brute_iou(pixels, value, keep):
    inter = union = 0
    for fold, label, stream, prediction, truth in pixels:
        if not keep(fold, label, stream):
            continue
        for p, t in zip(prediction.ravel(), truth.ravel(), strict=True):
            if t != 255:
                inter += p == value and t == value
                union += p == value or t == value
    return inter / union


def test_counts_of_one_episode_by_hand():
    prediction = np.array([[1, 1, 0], [0, 1, 0]])
    mask = np.array([[1, 0, 0], [1, 255, 0]])
    assert episode_counts(prediction, mask) == dict(inter_fg=1, union_fg=3, inter_bg=2, union_bg=4)
    assert episode_counts(torch.tensor(prediction) > 0, torch.tensor(mask, dtype=torch.uint8))["union_fg"] == 3


def test_counts_are_plain_integers_and_refuse_other_sizes():
    assert all(type(n) is int for n in episode_counts(np.zeros((2, 2)), np.zeros((2, 2))).values())
    with pytest.raises(ValueError, match="original size"):
        episode_counts(np.zeros((2, 2)), np.zeros((2, 3)))


def test_counts_equal_torchmetrics_with_ignore():
    prediction, truth = (torch.tensor(x) for x in masks(np.random.default_rng(0)))
    (tn, fp), (fn, tp) = BinaryConfusionMatrix(ignore_index=255)(prediction, truth).tolist()
    found = episode_counts(prediction[0], truth[0])
    assert tuple(found.values()) == (tp, tp + fp + fn, tn, tn + fp + fn)


def test_miou_and_fb_iou_equal_a_brute_force_count():
    table, pixels = episodes_table(np.random.default_rng(1))
    found = score(table, CLASSES, resamples=20)
    cells = [(f, c) for f in CLASSES for c in CLASSES[f]]
    per_class = {cell: brute_iou(pixels, 1, lambda f, c, _, cell=cell: cell == (f, c)) for cell in cells}
    for (fold, label), expected in per_class.items():
        assert found.value("fusion", "iou", fold, label) == pytest.approx(expected, abs=1e-12)
    folds = [np.mean([per_class[f, c] for c in CLASSES[f]]) for f in CLASSES]
    assert found.value("fusion", "miou", 1) == pytest.approx(folds[1], abs=1e-12)
    assert found.value("fusion") == pytest.approx(np.mean(folds), abs=1e-12)
    both = [brute_iou(pixels, v, lambda *_: True) for v in (1, 0)]
    assert found.value("fusion", "fb_iou") == pytest.approx(np.mean(both), abs=1e-12)
    only = [brute_iou(pixels, v, lambda f, *_: f == 0) for v in (1, 0)]
    assert found.value("fusion", "fb_iou", 0) == pytest.approx(np.mean(only), abs=1e-12)


def test_scores_equal_torchmetrics_jaccard():
    table, pixels = episodes_table(np.random.default_rng(2), {0: (1,)})
    jaccard = MulticlassJaccardIndex(num_classes=2, average="none", ignore_index=255)
    for *_, prediction, truth in pixels:
        jaccard.update(torch.tensor(prediction), torch.tensor(truth))
    background, foreground = jaccard.compute().tolist()
    found = score(table, {0: (1,)}, resamples=20)
    assert found.value("fusion", "iou", 0, 1) == pytest.approx(foreground, abs=1e-6)
    assert found.value("fusion", "fb_iou") == pytest.approx((foreground + background) / 2, abs=1e-6)


def counts(inter, union, pixels=1000):
    return dict(zip(COUNTS, (inter, union, pixels - union, pixels - inter), strict=True))


def test_mean_of_image_iou_would_differ():
    """The trap: a small object found badly weighs as much as a large one found well when images are averaged."""
    rows = [dict(episode="a", fold=0, label=1, query="a", stream="s", **counts(90, 100)),
            dict(episode="b", fold=0, label=1, query="b", stream="s", **counts(1, 10))]
    found = score(pd.DataFrame(rows), {0: (1,)}, resamples=10).value("s")
    assert found == pytest.approx(91 / 110)
    assert abs(found - np.mean([0.9, 0.1])) > 0.3


def test_missing_classes_are_said_and_enter_no_mean():
    rows = [dict(episode="a", fold=0, label=1, query="a", stream="s", **counts(50, 100))]
    found = score(pd.DataFrame(rows), {0: (1, 2), 1: (3,)}, names={1: "car", 2: "bump"}, resamples=10)
    assert found.missing == ((0, 2), (1, 3))
    assert found.value("s") == 0.5 and math.isnan(found.value("s", "iou", 0, 2))
    tree = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert tree["streams"]["s"]["folds"]["0"]["classes"]["bump"]["value"] is None
    assert tree["streams"]["s"]["folds"]["1"]["miou"]["value"] is None
    assert tree["missing"] == [{"fold": 0, "label": 2}, {"fold": 1, "label": 3}]


def test_an_interval_equals_a_plain_bootstrap_of_queries():
    """One class, several episodes a query: resample the queries by hand, with the same generator."""
    rng = np.random.default_rng(3)
    rows = [dict(episode=f"{q}{e}", fold=0, label=1, query=q, stream="s", **counts(int(i), 100))
            for q in range(8) for e, i in enumerate(rng.integers(0, 100, 3))]
    table = pd.DataFrame(rows)
    found = score(table, {0: (1,)}, resamples=300, seed=7)
    per_query = table.groupby("query")[["inter_fg", "union_fg"]].sum().to_numpy()
    draws = np.random.default_rng(7).integers(8, size=(300, 8))
    plain = [per_query[d, 0].sum() / per_query[d, 1].sum() for d in draws]
    row = found.table.query("metric == 'iou'").iloc[0]
    assert (row.low, row.high) == pytest.approx(tuple(np.percentile(plain, (2.5, 97.5))), abs=1e-12)


def test_episodes_of_one_query_move_together():
    """Copies of an episode under one query must not shrink the interval; under new queries they do."""
    base = [dict(episode=f"{q}", fold=0, label=1, query=q, stream="s", **counts(10 * q, 100)) for q in range(9)]
    copies = [{**row, "episode": f"{row['episode']}/{n}"} for row in base for n in range(16)]
    apart = [{**row, "query": row["episode"]} for row in copies]
    width = {}
    for name, rows in {"base": base, "copies": copies, "apart": apart}.items():
        row = score(pd.DataFrame(rows), {0: (1,)}, resamples=400).table.iloc[0]
        width[name] = row.high - row.low
    assert width["copies"] == pytest.approx(width["base"]) and width["apart"] < width["base"] / 2


def test_an_image_of_several_folds_is_drawn_for_all_of_them():
    """The folds agree on every query here, so drawing them together gives a wider interval than apart."""
    rows = [dict(episode=f"{f}{q}", fold=f, label=c, query=q, stream="s", **counts(4 * q, 100))
            for f, (c, _) in {0: (1, 0), 1: (2, 0), 2: (3, 0), 3: (4, 0)}.items() for q in range(24)]
    folds = {f: (f + 1,) for f in range(4)}
    apart = score(pd.DataFrame(rows), folds, resamples=500, stratified=True).table
    together = score(pd.DataFrame(rows), folds, resamples=500).table
    widths = [float((t.high - t.low)[t.metric.eq("miou") & t.fold.isna()].iloc[0]) for t in (apart, together)]
    assert widths[1] > 1.5 * widths[0]


def test_paired_differences_are_narrower_than_apart_and_signed():
    rng = np.random.default_rng(4)
    rows = []
    for q in range(30):
        easy = int(rng.integers(0, 90))
        for stream, bonus in (("fusion", 5), ("infrared", 0)):
            rows.append(dict(episode=q, fold=0, label=1, query=q, stream=stream, **counts(easy + bonus, 100)))
    found = score(pd.DataFrame(rows), {0: (1,)}, pairs=[("fusion", "infrared")], resamples=300)
    difference = found.differences.query("metric == 'miou'").iloc[-1]
    assert difference.value == pytest.approx(0.05) and (difference.low, difference.high) == pytest.approx((0.05, 0.05))
    alone = found.table.query("stream == 'fusion' and metric == 'miou'").iloc[-1]
    assert alone.low < alone.value < alone.high and alone.high - alone.low > 0.1
    leaf = found.as_dict()["differences"][0]
    assert (leaf["stream"], leaf["reference"]) == ("fusion", "infrared")
    assert leaf["miou"]["value"] == pytest.approx(0.05)


def test_the_seed_fixes_the_intervals_and_nothing_else():
    table, _ = episodes_table(np.random.default_rng(5))
    first, again, other = (score(table, CLASSES, resamples=100, seed=s).table for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert (first.value == other.value).all() and (first.low != other.low).any()
    shuffled = score(table.sample(frac=1, random_state=0), CLASSES, resamples=100, seed=1).table
    pd.testing.assert_frame_equal(shuffled, first)


def test_ten_thousand_resamples_agree_with_the_delta_method():
    rng = np.random.default_rng(6)
    inter, union = rng.integers(0, 50, 1000), rng.integers(60, 100, 1000)
    table = pd.DataFrame({"episode": np.arange(1000), "fold": 0, "query": np.arange(1000), "label": 1, "stream": "s",
                          **counts(inter, union)})
    row = score(table, {0: (1,)}, resamples=10_250).table.iloc[0]  # the last block is not full
    residual = (inter - row.value * union) / union.mean()
    assert row.high - row.low == pytest.approx(2 * 1.96 * residual.std() / np.sqrt(1000), rel=0.05)


@pytest.mark.parametrize("spoil, message", [
    (lambda t: t.drop(columns="query"), "lacks the columns query"),
    (lambda t: t.iloc[:0], "no episodes"),
    (lambda t: t.assign(label=9), "not in the folds"),
    (lambda t: t.iloc[1:], "different episodes"),
    (lambda t: pd.concat([t, t]), "different episodes"),
])
def test_tables_that_cannot_be_scored_say_why(spoil, message):
    table, _ = episodes_table(np.random.default_rng(7), queries=2, streams=("a", "b"))
    with pytest.raises(UsageError, match=message):
        score(spoil(table), CLASSES, pairs=[("a", "b")], resamples=5)


def test_an_unknown_stream_names_the_known_ones():
    table, _ = episodes_table(np.random.default_rng(8), queries=2)
    with pytest.raises(UsageError, match="the table has fusion"):
        score(table, CLASSES, pairs=[("fusion", "visible")], resamples=5)
    with pytest.raises(UsageError, match="no score 'miou' of stream 'visible'"):
        score(table, CLASSES, resamples=5).value("visible")
