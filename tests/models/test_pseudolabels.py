"""APF: exact pooling, an oracle picture with a spurious object, and what must never happen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cosine_similarity, interpolate, normalize

from models.errors import UsageError
from models.pseudolabels import (
    RefineSettings,
    calibrate,
    carry_freed,
    class_prototypes,
    find_regions,
    freed_counts,
    left_out_similarities,
    pool_regions,
    prototype_filter,
    unit_features,
)

CLASSES, CHANNELS = 3, 24
DIRECTIONS = normalize(torch.randn(CLASSES + 1, CHANNELS, generator=torch.Generator().manual_seed(8)), dim=1)
PLAIN = RefineSettings(min_area=0, centre=False)
QUICK = settings(max_examples=50)
LABELS = arrays(np.uint8, (11, 14), elements=st.sampled_from([0, 1, 2, 3, 255]))


def scene(seed=0, side=96):
    """A label of a few rectangles of classes 1..3 on background."""
    rng = np.random.default_rng(seed)
    label = np.zeros((side, side), dtype=np.uint8)
    for k in (1, 2, 3, 1):
        top, left = rng.integers(0, side - 32, 2)
        label[top : top + 24, left : left + 20] = k
    return label


def oracle(label, seed=0, shift=0.3, noise=0.05, stride=8):
    """Features [C, h, w] that know the truth: the class direction, a shift of the whole picture, and noise."""
    draws = torch.Generator().manual_seed(seed)
    cells = torch.from_numpy(label[stride // 2 :: stride, stride // 2 :: stride].astype(np.int64))
    features = DIRECTIONS[cells.clamp(max=CLASSES)].permute(2, 0, 1)
    offset = shift * normalize(torch.randn(CHANNELS, generator=draws), dim=0)[:, None, None]
    return features + offset + noise * torch.randn(features.shape, generator=draws)


def real_regions(frames=10, chosen=PLAIN):
    parts = []
    for n in range(frames):
        regions = find_regions(scene(n))
        vectors = pool_regions(regions.index, unit_features(oracle(scene(n), n), chosen))
        tables = map(torch.from_numpy, (regions.class_id, regions.area))
        parts.append((torch.full((len(vectors),), n), *tables, vectors))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def check(label, features, prototypes=DIRECTIONS, lam=0.5, chosen=PLAIN, mean=None):
    found = np.full(CLASSES + 1, lam)
    return prototype_filter(label, unit_features(features, chosen), prototypes, found, chosen, mean)


# ---- regions


def test_regions_are_eight_connected_and_of_one_class():
    label = np.array([[1, 0, 2], [0, 1, 2], [255, 255, 2]], dtype=np.uint8)
    found = find_regions(label)
    assert sorted(zip(found.class_id.tolist(), found.area.tolist(), strict=True)) == [(0, 2), (1, 2), (2, 3), (255, 2)]
    assert found.index[0, 0] == found.index[1, 1] and found.index[0, 1] == found.index[1, 0]
    box = found.box[found.index[0, 2]].tolist()
    assert box == [0, 2, 3, 3]


@QUICK
@given(LABELS)
def test_regions_partition_the_label(label):
    found = find_regions(label)
    assert (found.class_id[found.index] == label).all() and found.area.sum() == label.size
    for r, (top, left, bottom, right) in enumerate(found.box):
        assert (found.index[top:bottom, left:right] == r).sum() == found.area[r]


@pytest.mark.parametrize("size, grid", [
    ((96, 128), (12, 16)), ((240, 320), (45, 60)), ((37, 51), (5, 7)), ((9, 9), (20, 20)),
])
def test_pooling_is_exact(size, grid):
    """Equal to the mean over nearest-upsampled features, for regions smaller than a cell, too."""
    label = np.random.default_rng(1).integers(0, 3, size).astype(np.uint8)
    label[: size[0] // 2] = 1
    features = torch.randn(6, *grid, generator=torch.Generator().manual_seed(2))
    index = find_regions(label).index
    upsampled = interpolate(features[None].double(), size, mode="nearest-exact")[0].flatten(1)
    ids = torch.from_numpy(index.ravel())
    sums = torch.zeros(int(index.max()) + 1, 6, dtype=torch.float64).index_add_(0, ids, upsampled.T)
    expected = sums / torch.bincount(ids)[:, None]
    assert len(expected) > 10 and (pool_regions(index, features) - expected).abs().max() < 1e-6


# ---- prototypes and thresholds


def test_prototypes_are_masked_means():
    """Against the sum over pixels, written out; an absent class is a row of zeros."""
    _, class_id, area, vectors = real_regions(4)
    found = class_prototypes(class_id, area, vectors, CLASSES + 1, None)
    sums = torch.zeros(CLASSES + 1, CHANNELS)
    for n in range(4):
        pixels = interpolate(unit_features(oracle(scene(n), n), PLAIN)[None], (96, 96), mode="nearest-exact")[0]
        for k in range(CLASSES + 1):
            sums[k] += pixels[:, torch.from_numpy(scene(n) == k)].sum(1)
    assert torch.allclose(found[:-1], normalize(sums, dim=1), atol=1e-5)
    assert torch.equal(found[-1], torch.zeros(CHANNELS))


def test_leaving_out_takes_the_own_frame_out_of_the_prototype():
    frame, class_id, area, vectors = real_regions(5)
    found = left_out_similarities(frame, class_id, area, vectors, CLASSES, None)
    for r in range(0, len(frame), 7):
        others = frame != frame[r]
        prototype = class_prototypes(class_id[others], area[others], vectors[others], CLASSES, None)[class_id[r]]
        assert found[r] == pytest.approx(float(cosine_similarity(vectors[r], prototype, dim=0)), abs=1e-5)


def test_a_class_of_one_frame_and_ignored_pixels_have_no_left_out_similarity():
    frame, class_id = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 1, 255])
    found = left_out_similarities(frame, class_id, torch.ones(4).long(), torch.eye(4) + 1, 2, None)
    assert found.isnan().tolist() == [False, True, False, True]


def test_thresholds_follow_the_rule():
    similarity = np.concatenate([np.linspace(0.4, 0.8, 21), np.linspace(0.0, 0.4, 21), [0.9] * 9, [0.9] * 3, [np.nan]])
    class_id = np.array([1] * 21 + [2] * 21 + [3] * 9 + [4] * 4)
    found = calibrate(class_id, similarity, 4, RefineSettings())
    assert found == pytest.approx([0.3, 0.42 - 0.1, 0.2, 0.5, 0.3])  # unseen, rule, floor, ceiling, too few
    assert calibrate(class_id, similarity, 4, RefineSettings(lam=0.7)) == pytest.approx([0.7] * 5)


# ---- the filter


def test_the_oracle_frees_a_spurious_object_and_nothing_else():
    """Spec §2.2, behaviour check: a wrong component scores far below the true ones and is all that is freed."""
    truth = scene(3)
    claimed = truth.copy()
    claimed[2:20, 72:92] = 2
    assert (truth[2:20, 72:92] == 0).all()
    found = check(claimed, oracle(truth))
    spurious = found.regions.index[10, 80]
    objects = (found.regions.class_id > 0) & (np.arange(len(found.keep)) != spurious)
    assert found.similarity[spurious] < 0.45 and (found.similarity[objects] > 0.8).all()
    assert (found.label[2:20, 72:92] == 255).all() and (found.label == claimed)[claimed == truth].all()
    assert freed_counts(claimed, found.label)[2] == {"kept": int((truth == 2).sum()), "freed": 18 * 20}


def test_centring_cancels_a_shift_between_domains():
    """All pictures of the other domain are moved by one vector: uncentred, true objects fall below λ."""
    chosen = RefineSettings(min_area=0, centre=True)
    _, class_id, area, vectors = real_regions(10, chosen)
    mean = torch.stack([unit_features(oracle(scene(n), n), chosen).mean((1, 2)) for n in range(10)]).mean(0)
    moved = [oracle(scene(n), n) + 1.5 * DIRECTIONS[:1].T[..., None].roll(5, 0) for n in range(10)]
    there = torch.stack([unit_features(f, chosen).mean((1, 2)) for f in moved]).mean(0)
    kept = {}
    for name, here, elsewhere in (("centred", mean, there), ("plain", None, None)):
        prototypes = class_prototypes(class_id, area, vectors, CLASSES, here)
        found = [check(scene(n), moved[n], prototypes, 0.6, chosen, elsewhere) for n in range(10)]
        kept[name] = np.mean(np.concatenate([f.keep[f.regions.class_id > 0] for f in found]))
    assert kept["centred"] > 0.95 and kept["plain"] < 0.6


@QUICK
@given(LABELS, st.floats(-1, 1), st.sampled_from(["foreground", "all", (2,), (1, 3)]), st.integers(0, 200_000))
def test_kept_pixels_never_change_and_only_the_scope_is_freed(label, lam, scope, min_area):
    chosen = RefineSettings(scope=scope, min_area=min_area, centre=False)
    features = torch.randn(CHANNELS, 3, 4, generator=torch.Generator().manual_seed(int(label.sum())))
    found = check(label, features, lam=lam, chosen=chosen)
    freed = found.label != label
    assert (found.label[freed] == 255).all() and found.label.dtype == np.uint8
    allowed = {"foreground": (1, 2, 3), "all": (0, 1, 2, 3)}.get(scope, scope)
    assert set(np.unique(label[freed])) <= set(allowed)
    assert (found.keep[found.regions.index] == ~freed).all()


def test_the_lowest_threshold_is_the_identity_and_an_impossible_one_frees_the_scope():
    label = scene(1)
    assert (check(label, oracle(label), lam=-1.01).label == label).all()
    freed = check(label, oracle(label), lam=1.01).label
    assert (freed[label > 0] == 255).all() and (freed[label == 0] == 0).all()


def test_small_regions_are_freed_by_area_scaled_to_the_label():
    label = np.zeros((96, 96), dtype=np.uint8)
    label[10:12, 10:12], label[40:48, 40:50] = 1, 1
    chosen = RefineSettings(min_area=473 * 473 * 5 // (96 * 96), centre=False)
    found = check(label, oracle(label), lam=-1.01, chosen=chosen).label
    assert (found[10:12, 10:12] == 255).all() and (found[40:48, 40:50] == 1).all()


def test_a_region_below_a_cell_is_judged_by_its_own_cell():
    label = np.zeros((96, 96), dtype=np.uint8)
    label[41:43, 41:43] = 2
    truth = np.zeros_like(label)
    truth[40:48, 40:48] = 2
    assert check(label, oracle(truth), lam=0.7).label[41, 41] == 2
    assert check(label, oracle(np.zeros_like(label)), lam=0.7).label[41, 41] == 255


def test_a_class_without_a_prototype_is_not_judged():
    label = scene(2)
    prototypes = DIRECTIONS.clone()
    prototypes[1] = 0
    found = check(label, oracle(label), prototypes, lam=1.01).label
    assert (found[label == 1] == 1).all() and (found[label == 2] == 255).all()
    beyond = np.where(label == 3, 9, label).astype(np.uint8)
    assert (check(beyond, oracle(label), lam=1.01).label[beyond == 9] == 9).all()


def test_strong_cells_do_not_drown_the_rest_with_pixel_norm():
    label = np.ones((64, 64), dtype=np.uint8)
    features = oracle(label, shift=0, noise=0.0)
    features[:, 0, 0] = 500 * DIRECTIONS[2]
    kept = {norm: check(label, features, lam=0.6, chosen=RefineSettings(min_area=0, pixel_norm=norm)).keep[0]
            for norm in (True, False)}
    assert kept == {True: True, False: False}


# ---- what training makes of it


@pytest.mark.parametrize("policy_value", [0, 255])
def test_training_sees_what_was_freed_but_never_where_novel_objects_are(policy_value):
    label = np.array([[1, 1, 2, 2, 0, 255]], dtype=np.uint8)
    refined = np.array([[255, 1, 255, 2, 0, 255]], dtype=np.uint8)
    seen = np.where(label == 2, policy_value, label).astype(np.uint8)
    found = carry_freed(seen, label, refined, novel=(2,))
    assert found.tolist() == [[255, 1, policy_value, policy_value, 0, 255]]


@pytest.mark.parametrize("wrong", [dict(scope="novel classes"), dict(lam="automatic")])
def test_settings_that_cannot_be_say_what_can(wrong):
    with pytest.raises(UsageError, match=r"foreground|'auto'"):
        RefineSettings(**wrong)
