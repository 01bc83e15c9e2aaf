"""Scores of translations: known answers, what is worse scores worse, and no score depends on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from models.backbone import Features
from models.errors import UsageError
from models.generators import quality
from models.generators.quality import PrototypeSegmenter, agreement, edge_scores, fid, kid, mean_iou, same_share
from models.geometry import Canvas
from tests.models.drawn import tiny_encoder

CANVAS = Canvas((64, 96))


def normal(n, c=6, seed=0, shift=0.0, scale=1.0):
    draws = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, c, generator=draws)


class Mean(torch.nn.Module):
    """What torchmetrics needs of an encoder: the "pictures" of the test are their own descriptors."""

    num_features = 6

    def forward(self, x):
        return x.flatten(1)


# ---- two sets


def test_sets_of_one_distribution_are_at_distance_0_and_shifted_ones_are_not():
    same = [kid(normal(60, seed=s), normal(80, seed=100 + s)) for s in range(20)]
    assert np.mean([x.value for x in same]) == pytest.approx(0, abs=0.05), "unbiased: above 0 and below it"
    assert min(x.value for x in same) < 0 < max(x.value for x in same)
    far = [kid(normal(60), normal(60, seed=1, shift=shift)).value for shift in (0.0, 0.5, 1.0, 2.0)]
    assert far == sorted(far) and far[1] > 0.2
    copies = kid(normal(60), normal(60))
    assert copies.value < 0 and copies.low < copies.value < copies.high, "the diagonal within is left out, between not"


def test_kid_is_that_of_torchmetrics():
    made, real = normal(40), normal(40, seed=1, shift=0.3, scale=1.5)
    expected = poly_mmd(made.double(), real.double(), 3, None, 1.0)
    assert kid(made, real).value == pytest.approx(float(expected), rel=1e-9)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    truth = kid(normal(4000, seed=998), normal(4000, seed=999, shift=0.4)).value
    found = [kid(normal(40, seed=s), normal(50, seed=5000 + s, shift=0.4)) for s in range(300)]
    assert 0.89 < np.mean([x.low < truth < x.high for x in found]) <= 0.99
    wide, narrow = kid(normal(25), normal(25, seed=1, shift=1)), kid(normal(400), normal(400, seed=1, shift=1))
    assert (narrow.high - narrow.low) < 0.5 * (wide.high - wide.low)


def test_the_jackknife_is_what_leaving_out_gives():
    made, real = normal(7), normal(5, seed=1, shift=0.5)
    without = [torch.tensor([kid(made[torch.arange(7) != i], real).value for i in range(7)]),
               torch.tensor([kid(made, real[torch.arange(5) != j]).value for j in range(5)])]
    variance = sum((len(x) - 1) * float(x.double().var(unbiased=False)) for x in without)
    found = kid(made, real)
    assert (found.high - found.value) == pytest.approx(1.96 * variance**0.5, rel=1e-4)


def test_fid_is_that_of_torchmetrics():
    made, real = normal(50), normal(70, seed=1, shift=0.4, scale=2.0)
    metric = FrechetInceptionDistance(feature=Mean(), input_img_size=(6, 1, 1), normalize=True)
    metric.set_dtype(torch.float64)
    for batch, is_real in ((made, False), (real, True)):
        metric.update(batch.double()[..., None, None], real=is_real)
    assert fid(made, real) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_has_its_known_answers():
    x = normal(30)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
    assert fid(x, x + 3) == pytest.approx(6 * 9, rel=1e-6)
    spread = 6 * float(x.double().var(0).mean())
    assert fid(x, (x - x.mean(0)) * 2 + x.mean(0)) == pytest.approx(spread, rel=1e-5), "(2 - 1)² of the variance"
    wide = normal(10, c=200)
    assert fid(wide, wide.flip(0)) == pytest.approx(0, abs=1e-9), "more channels than pictures"


def test_few_pictures_are_refused():
    for measure in (kid, fid):
        with pytest.raises(UsageError, match="2 made and 9 real pictures; give at least 3"):
            measure(normal(2), normal(9))


# ---- pairs


def scene(seed=0):
    """Striped squares on a dark ground: uint8 picture and label [64,96] of 0..2."""
    rng = np.random.default_rng(seed)
    picture, label = rng.normal(40, 3, CANVAS.size), np.zeros(CANVAS.size, np.uint8)
    y, x = np.mgrid[: CANVAS.size[0], : CANVAS.size[1]]
    for k, left in ((1, rng.integers(2, 16)), (2, rng.integers(50, 64))):
        top = rng.integers(2, 30)
        square = (y >= top) & (y < top + 30) & (x >= left) & (x < left + 28)
        picture[square] = 240 - 180 * ((x if k == 1 else y)[square] // 3 % 2)
        label[square] = k
    return picture.clip(0, 255).astype(np.uint8), label


def test_edges_score_1_up_to_polarity_and_less_when_blurred_or_shuffled():
    pictures = [scene(n)[0] for n in range(3)]
    assert edge_scores(pictures, pictures) == pytest.approx(1, abs=1e-4)
    assert edge_scores(pictures, [255 - x for x in pictures]) == pytest.approx(1, abs=1e-4)
    blurred = edge_scores(pictures, [gaussian_filter(x, 1.5) for x in pictures])
    shuffled = edge_scores(pictures, pictures[1:] + pictures[:1])
    assert (blurred < 0.95).all() and (shuffled < blurred - 0.1).all()
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
    assert edge_scores([ramp], [ramp.T]) == 0 and edge_scores([ramp], [np.full_like(ramp, 8)]) == 0


def test_agreement_counts_and_their_scores():
    said = {"source": torch.tensor([[[0, 0, 1, 1, 255]]]), "output": torch.tensor([[[0, 1, 1, 1, 0]]])}
    counts = agreement(said.get, "source", "output", 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert mean_iou(counts) == pytest.approx((1 / 2 + 2 / 3) / 2) and same_share(counts) == pytest.approx(3 / 4)
    assert np.isnan(mean_iou(counts * 0)) and np.isnan(same_share(counts * 0))
    itself = agreement(said.get, "source", "source", 3)
    assert mean_iou(itself) == same_share(itself) == 1


@pytest.fixture(scope="module")
def segmenter():
    encoder = tiny_encoder()
    return encoder, PrototypeSegmenter.fit(encoder, CANVAS, [scene(n) for n in range(6)], 4, "low")


def test_the_segmenter_finds_what_it_was_shown(segmenter):
    encoder, segment = segmenter
    picture, label = scene(20)
    said = segment(quality.encode_pictures(encoder, CANVAS, [picture]))[0]
    truth = torch.from_numpy(label)[4::8, 4::8]
    assert said.shape == truth.shape and 3 not in said, "a class that no frame shows is never said"
    assert (said == truth).float().mean() > 0.7
    assert (said[truth == 1] == 1).float().mean() > 0.6 and (said[truth == 2] == 2).float().mean() > 0.6


def test_a_class_without_prototype_is_not_said_where_nothing_fits():
    features = torch.tensor([[[[1.0, -1.0]], [[0.0, 0.0]]]])
    said = PrototypeSegmenter(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "low")(Features(features, features, features))
    assert said.tolist() == [[[1, 1]]], "a cosine of -1 is still the best there is"


def test_ignored_pixels_teach_nothing():
    encoder = tiny_encoder()
    picture, label = scene(0)
    hidden = np.where(label == 2, 255, label).astype(np.uint8)
    segment = PrototypeSegmenter.fit(encoder, CANVAS, [(picture, hidden)], 3, "low")
    assert segment.prototypes.any(1).tolist() == [True, True, False]
    nothing = PrototypeSegmenter(segment.prototypes * 0, "low")(quality.encode_pictures(encoder, CANVAS, [picture]))
    assert (nothing == 255).all()


def test_a_redrawn_picture_agrees_less_than_a_toned_one(segmenter):
    encoder, segment = segmenter
    pictures = [scene(n)[0] for n in range(30, 34)]
    toned = [(30 + 0.7 * x).astype(np.uint8) for x in pictures]
    shuffled = pictures[1:] + pictures[:1]
    found = {}
    for name, outputs in (("same", pictures), ("toned", toned), ("shuffled", shuffled)):
        batches = (quality.encode_pictures(encoder, CANVAS, x) for x in (pictures, outputs))
        found[name] = mean_iou(agreement(segment, *batches, 4))
    assert found["same"] == 1 and found["toned"] > 0.7 and found["shuffled"] < found["toned"] - 0.2


def test_no_score_depends_on_the_batch(segmenter):
    encoder, segment = segmenter
    pictures, outputs = ([scene(n)[0] for n in range(start, start + 6)] for start in (0, 10))
    described, counts = {}, {}
    for size in (1, 2, 6):
        cut = range(0, 6, size)
        maps = [[quality.encode_pictures(encoder, CANVAS, x[i : i + size]) for i in cut] for x in (pictures, outputs)]
        described[size] = [torch.cat([quality.descriptors(m) for m in row]) for row in maps]
        counts[size] = sum(agreement(segment, *pair, 4) for pair in zip(*maps, strict=True))
    for size in (2, 6):
        for a, b in zip(described[1], described[size], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert kid(*described[size]).value == pytest.approx(kid(*described[1]).value, abs=1e-4)
        assert (counts[size] - counts[1]).abs().sum() <= 2, "a tie between two classes may fall either way"
    assert isinstance(maps[0][0], Features) and described[1][0].shape == (6, encoder.channels[2])
