"""APR on an oracle picture, its limits, and what must never happen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate, normalize

from models.errors import UsageError
from models.pseudolabels import IGNORE
from models.relabel import Grid, RelabelSettings, accept, mixed_prototypes, relabel
from tests.models.test_pseudolabels import CHANNELS, CLASSES, DIRECTIONS, LABELS, oracle, scene

QUICK = settings(max_examples=40)
PLAIN = RelabelSettings()


def features(truth, seed=0, shift=0.3, noise=0.02):
    return normalize(oracle(truth, seed, shift, noise), dim=0)


def holed(label, seed=0):
    """A label with a third of its 8 x 8 blocks freed."""
    rng = np.random.default_rng(seed)
    blocks = rng.random((label.shape[0] // 8, label.shape[1] // 8)) < 0.35
    return np.where(blocks.repeat(8, 0).repeat(8, 1), IGNORE, label).astype(np.uint8)


def random_features(label):
    return normalize(torch.randn(CHANNELS, 3, 4, generator=torch.Generator().manual_seed(int(label.sum()))), dim=0)


# ---- the grid


@pytest.mark.parametrize("size, grid", [
    ((96, 128), (12, 16)), ((37, 51), (5, 7)), ((9, 9), (20, 20)), ((16, 16), (1, 1)),
])
def test_upsampling_is_torchs_bilinear(size, grid):
    values = torch.randn(5, *grid, generator=torch.Generator().manual_seed(0))
    expected = interpolate(values[None], size, mode="bilinear", align_corners=False)[0]
    everywhere = np.ones(size, bool)
    found = Grid(size, grid).upsample(values.flatten(1).T.numpy(), everywhere)
    assert np.allclose(found, expected.flatten(1).T, atol=1e-5)


def test_what_is_collected_is_the_sum_over_upsampled_features():
    label = scene(0)
    values = torch.randn(6, 12, 12, generator=torch.Generator().manual_seed(0))
    weights = Grid((96, 96), (12, 12)).collect(label.astype(np.int64), CLASSES + 1)
    pixels = interpolate(values[None], (96, 96), mode="bilinear", align_corners=False)[0]
    for k in range(CLASSES + 1):
        expected = pixels[:, torch.from_numpy(label == k)].sum(1)
        assert np.allclose(weights[k] @ values.flatten(1).T.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert weights.sum() == pytest.approx(96 * 96, rel=1e-5)


# ---- the rule


def test_the_oracle_fills_what_was_freed_and_fills_it_right():
    """Spec §2.2, behaviour check: what the filter freed, the prototypes bring back."""
    truth = scene(3)
    label = holed(truth)
    found = relabel(label, features(truth), DIRECTIONS, PLAIN).label
    freed = label == IGNORE
    filled = freed & (found != IGNORE)
    assert filled.sum() > 0.8 * freed.sum()
    assert (found == truth)[filled].mean() > 0.95


def test_against_the_rule_written_out_pixel_by_pixel():
    truth = scene(5)
    label, seen = holed(truth, 5), features(truth, noise=0.2)
    chosen = RelabelSettings(background="mixed", temperature=0.2, tau=0.5)
    pixels = interpolate(seen[None], truth.shape, mode="bilinear", align_corners=False)[0]
    mixed = []
    for k in range(CLASSES + 1):
        inside = torch.from_numpy(label == k)
        local = normalize(pixels[:, inside].sum(1), dim=0)
        mixed.append(normalize(0.5 * DIRECTIONS[k] + 0.5 * local, dim=0) if inside.sum() >= 16 else DIRECTIONS[k])
    shares = (torch.stack(mixed) @ pixels.flatten(1) / 0.2).softmax(0).reshape(CLASSES + 1, *truth.shape)
    best, second = shares.topk(2, dim=0).values
    expected = torch.where((best >= 0.5) & (best - second >= 0.1), shares.argmax(0), IGNORE).numpy()
    expected = np.where(label == IGNORE, expected, label)
    found = relabel(label, seen, DIRECTIONS, chosen).label
    assert (found == expected).mean() > 0.999 and 0 < (found == IGNORE).sum() < (label == IGNORE).sum()


@QUICK
@given(LABELS, st.floats(0, 1), st.floats(0, 1), st.sampled_from([(), (2,), (1, 3)]))
def test_kept_labels_never_change_and_nothing_but_candidates_comes_in(label, beta, tau, prompted):
    chosen = RelabelSettings(beta=beta, tau=tau, min_pixels=4)
    found = relabel(label, random_features(label), DIRECTIONS, chosen, prompted)
    kept = label != IGNORE
    assert (found.label[kept] == label[kept]).all() and found.label.dtype == np.uint8
    assert set(np.unique(found.label)) <= {0, IGNORE, *np.unique(label).tolist(), *prompted}


@QUICK
@given(LABELS)
def test_a_share_above_one_is_the_identity(label):
    assert (relabel(label, random_features(label), DIRECTIONS, RelabelSettings(tau=1.0001)).label == label).all()


def test_with_beta_one_other_pixels_do_not_matter():
    truth = scene(2)
    chosen = RelabelSettings(beta=1.0, background="mixed", tau=0.5, margin=0)
    seen, label = features(truth, noise=0.2), holed(truth, 2)
    twisted = label.copy()
    twisted[label == 1], twisted[label == 2] = 2, 1
    first, second = (relabel(x, seen, DIRECTIONS, chosen, (1, 2, 3)).label for x in (label, twisted))
    free = label == IGNORE
    assert (first[free] == second[free]).all()
    local = RelabelSettings(beta=0.0, background="mixed", tau=0.5, margin=0)
    first, second = (relabel(x, seen, DIRECTIONS, local, (1, 2, 3)).label for x in (label, twisted))
    assert (first[free] != second[free]).any()


def test_the_margin_leaves_near_ties_free():
    truth = np.zeros((64, 64), np.uint8)
    truth[:, 32:] = 1
    between = normalize(DIRECTIONS[0] + DIRECTIONS[1], dim=0)
    seen = between[:, None, None].expand(-1, 8, 8).clone()
    seen[:, :, 0], seen[:, :, -1] = DIRECTIONS[0][:, None], DIRECTIONS[1][:, None]
    label = np.full((64, 64), IGNORE, np.uint8)
    label[:, :4], label[:, -4:] = 0, 1
    loose = relabel(label, seen, DIRECTIONS, RelabelSettings(tau=0.0, margin=0.0)).label
    firm = relabel(label, seen, DIRECTIONS, RelabelSettings(tau=0.0, margin=0.1)).label
    assert (loose != IGNORE).all() and (firm[:, 28:36] == IGNORE).all()


def test_the_background_speaks_for_itself_and_small_classes_do_not():
    truth = scene(1)
    label = holed(truth)
    label[label == 3] = IGNORE
    label[0, :5] = 3
    grid, rows = Grid(label.shape, (12, 12)), features(truth).flatten(1).T
    local, _ = mixed_prototypes(label, rows, DIRECTIONS, RelabelSettings(), (), grid)
    mixed, _ = mixed_prototypes(label, rows, DIRECTIONS, RelabelSettings(background="mixed"), (), grid)
    assert torch.equal(local[3], DIRECTIONS[3]) and torch.equal(mixed[3], DIRECTIONS[3])
    assert (local[0] @ DIRECTIONS[0]) < (mixed[0] @ DIRECTIONS[0]) and torch.allclose(local[1], mixed[1])


def test_a_class_without_a_prototype_takes_its_local_one_or_none():
    truth = scene(1)
    prototypes = DIRECTIONS.clone()
    prototypes[2] = prototypes[3] = 0
    label = holed(truth)
    label[label == 3] = IGNORE
    found = relabel(label, features(truth), prototypes, PLAIN, prompted=(3,))
    assert found.candidates.tolist() == [True, True, True, False]
    assert found.prototypes[2].norm() == pytest.approx(1, abs=1e-5) and (found.label != 3).all()


def test_a_prompted_class_may_come_in_though_nothing_of_it_was_kept():
    truth = scene(1)
    label = np.where(truth == 3, IGNORE, truth).astype(np.uint8)
    asked, unasked = (relabel(label, features(truth), DIRECTIONS, PLAIN, prompted).label for prompted in ((3,), ()))
    assert (asked[truth == 3] == 3).mean() > 0.5 and (unasked != 3).all()


def test_a_second_pass_uses_what_the_first_one_filled():
    truth = scene(4)
    label = holed(truth, 4)
    seen = features(truth, shift=1.0, noise=0.15)
    counts = [(relabel(label, seen, DIRECTIONS, RelabelSettings(passes=n)).label != IGNORE).sum() for n in (1, 2)]
    assert counts[0] <= counts[1]
    once, twice = (relabel(label, seen, DIRECTIONS, RelabelSettings(passes=n)).prototypes for n in (1, 2))
    assert not torch.equal(once, twice)


def test_centring_takes_the_domains_mean_off():
    truth = scene(3)
    label, offset = holed(truth), 2 * DIRECTIONS[2]
    plain = oracle(truth, shift=0, noise=0.02)
    moved, chosen = plain + offset[:, None, None], RelabelSettings(beta=1.0, background="mixed")
    unmoved = relabel(label, normalize(plain, dim=0), DIRECTIONS, chosen).label
    assert (relabel(label, moved, DIRECTIONS, chosen, mean=offset).label == unmoved).mean() > 0.999
    assert (relabel(label, normalize(moved, dim=0), DIRECTIONS, chosen).label == unmoved).mean() < 0.95


def test_a_label_without_free_pixels_is_left_alone():
    assert relabel(scene(0), features(scene(0)), DIRECTIONS, PLAIN).label is not None
    assert (relabel(scene(0), features(scene(0)), DIRECTIONS, PLAIN).label == scene(0)).all()


@pytest.mark.parametrize("pixels, ignored, verdict", [
    (100, 0, "ok"), (10, 0, "no_target"), (100, 7000, "mostly_ignored"),
])
def test_a_picture_is_fit_when_its_class_is_there(pixels, ignored, verdict):
    label = np.zeros(10_000, np.uint8)
    label[:pixels], label[pixels : pixels + ignored] = 2, IGNORE
    assert accept(label.reshape(100, 100), 2, PLAIN) == verdict


@pytest.mark.parametrize("wrong", [dict(background="global"), dict(beta=1.5), dict(temperature=0.0), dict(passes=0)])
def test_settings_that_cannot_be_say_what_can(wrong):
    with pytest.raises(UsageError, match=r"local|beta lies"):
        RelabelSettings(**wrong)
