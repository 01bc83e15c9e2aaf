"""Similarity maps against loops that follow the equations word by word (GenFusion spec §10, tests 3 to 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from models.backbone import Features
from models.segmenters.similarity import (
    EPSILON,
    MOST,
    NEAREST,
    SoftMask,
    background_cells,
    evidence,
    foreground_cells,
    nearest,
    prototype,
    rectified_mean,
    soft_mask,
    stretch,
    style_discrepancy,
    to_grid,
)

GRID = (5, 7)
WIDTHS = (6, 9, 4)
FOREGROUND, BACKGROUND, NEAR_FOREGROUND, NEAR_BACKGROUND, RECTIFIED = range(5)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(*lead, seed=0, grid=GRID):
    """Unit-length levels [*lead, c, h, w] of what a ReLU leaves."""
    raw = Features(*(rand(*lead, c, *grid, seed=seed + n).relu() + 0.01 for n, c in enumerate(WIDTHS)))
    return to_grid(raw, grid)


def masks(batch=2, shots=1, objects=((1, 4), (2, 5)), grid=GRID):
    """Hard masks uint8 [B, K, h, w]: a box of the object, ignored cells in the last column."""
    mask = torch.zeros(batch, shots, *grid, dtype=torch.uint8)
    for k in range(shots):
        mask[:, k, objects[0][0] : objects[0][1], objects[1][0] + k % 2 : objects[1][1] + k % 2] = 1
    mask[..., -1] = 255
    return mask


def split(mask):
    return SoftMask((mask == 1).float(), (mask == 0).float())


def cosine(a, b):
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


# ---- masks and grids


def test_soft_masks_are_area_shares_and_ignored_pixels_are_in_neither():
    mask = torch.zeros(1, 2, 8, 16, dtype=torch.uint8)
    mask[0, 0, :4, :8], mask[0, 1, :, 8:], mask[0, 1, :2, 8:] = 1, 255, 1
    foreground, background = soft_mask(mask, (1, 2))
    assert foreground.tolist() == [[[[0.5, 0.0]], [[0.0, 0.25]]]]
    assert background.tolist() == [[[[0.5, 1.0]], [[1.0, 0.0]]]]


def test_on_a_canvas_of_8n_plus_1_a_cell_looks_at_its_pixel():
    mask = torch.zeros(1, 1, 17, 25, dtype=torch.uint8)
    mask[0, 0, 8, 16], mask[0, 0, 0, 0] = 1, 255
    foreground, background = soft_mask(mask, (3, 4))
    assert foreground.nonzero().tolist() == [[0, 0, 1, 2]] and foreground.max() == 1
    assert (background + foreground).flatten().tolist() == [0.0] + [1.0] * 11


def test_levels_of_all_strides_join_one_grid_at_unit_length():
    strides = Features(rand(2, 6, 8, 12), rand(2, 9, 4, 6), rand(2, 4, 2, 3))
    supports = Features(*(torch.stack([level, level], 1) for level in strides))
    for level, shown, c in zip(to_grid(strides, (8, 12)), to_grid(supports, (8, 12)), WIDTHS, strict=True):
        assert level.shape == (2, c, 8, 12) and shown.shape == (2, 2, c, 8, 12)
        assert torch.allclose(level.norm(dim=1), torch.ones(2, 8, 12), atol=1e-5)
        assert torch.allclose(shown[:, 0], level) and torch.allclose(shown[:, 1], level)
    assert torch.allclose(to_grid(strides, (8, 12))[0] * strides.low.norm(dim=1, keepdim=True), strides.low, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 12), (7, 9), (3, 20), (4, 6)])
def test_stretching_is_bilinear(grid):
    level = rand(2, 3, 5, 4, 6)
    expected = interpolate(level.flatten(0, 1), grid, mode="bilinear", align_corners=False).unflatten(0, (2, 3))
    assert torch.allclose(stretch(level, grid), expected, atol=1e-6)


# ---- prototypes


def test_the_prototype_of_a_constant_is_that_constant():
    constant = rand(2, 6)
    weight = torch.rand(2, 3, *GRID, generator=torch.Generator().manual_seed(1))
    total = weight.sum((1, 2, 3))[:, None]
    found = prototype(constant[:, None, :, None, None].expand(-1, 3, -1, *GRID), weight)
    assert torch.allclose(found, constant * total / (total + EPSILON), atol=1e-6)


def test_the_prototype_is_the_mean_over_the_cells_of_all_shots():
    support, mask = rand(1, 2, 6, *GRID), split(masks(1, 2)).foreground
    taken = [support[0, k, :, y, x] for k in range(2) for y in range(5) for x in range(7) if mask[0, k, y, x]]
    assert torch.allclose(prototype(support, mask)[0], sum(taken) / (len(taken) + EPSILON), atol=1e-6)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_a_mask_of_one_kind_leaves_zeros_and_no_nan(value):
    """Nothing marked, nothing else, or nothing known: what is missing says 0."""
    query, support = maps(2), maps(2, 2, seed=5)
    mask = split(torch.full((2, 2, *GRID), value, dtype=torch.uint8))
    found = evidence(query, support, mask).unflatten(1, (len(WIDTHS) + 1, 5))
    assert found.isfinite().all()
    empty = {0: [FOREGROUND, NEAR_FOREGROUND, RECTIFIED], 1: [BACKGROUND, NEAR_BACKGROUND], 255: range(5)}[value]
    for place in range(5):
        assert (found[:, :, place] == 0).all() == (place in empty)
    assert prototype(support[0], mask.foreground).isfinite().all()


# ---- style


def test_style_discrepancy_is_zero_of_itself_symmetric_and_in_0_1():
    first, second = rand(3, 6, *GRID).relu(), rand(3, 6, *GRID, seed=1).relu()
    assert style_discrepancy(first, torch.stack([first, first], 1)).abs().max() < 1e-6
    forth, back = style_discrepancy(first, second[:, None]), style_discrepancy(second, first[:, None])
    assert torch.allclose(forth, back) and (forth > 0.01).all() and (forth < 1).all()
    apart = torch.zeros(1, 2, 1, 2)
    apart[0, 0, 0, 0] = apart[0, 1, 0, 1] = 1
    assert style_discrepancy(apart, torch.ones(1, 1, 2, 1, 2)).item() == pytest.approx(2**0.5 / 2)


def test_style_discrepancy_as_written():
    query, support = rand(1, 3, *GRID).relu().numpy(), rand(1, 2, 3, *GRID, seed=1).relu().numpy()

    def gram(x):
        rows = x.reshape(3, -1)
        return np.array([[cosine(a, b) for a in rows] for b in rows])

    expected = [np.linalg.norm(gram(query[0]) - gram(support[0, k])) / 3 for k in range(2)]
    found = style_discrepancy(torch.from_numpy(query), torch.from_numpy(support))
    assert np.allclose(found[0], expected, atol=1e-6)


# ---- cells


def test_all_cells_of_the_object_are_there_when_they_are_few():
    support, mask = maps(2, 2), split(masks(2, 2)).foreground
    cells = foreground_cells(support, mask)
    for b in range(2):
        for level, found in zip(support, cells.levels, strict=True):
            wanted = level[b].movedim(1, -1)[mask[b] == 1]
            taken = found[b, :, cells.there[b]].T
            assert sorted(map(tuple, taken.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_a_large_object_is_capped_and_its_cells_spread():
    support = [torch.arange(48.0 * 64).view(1, 1, 1, 48, 64)]
    mask = torch.zeros(1, 1, 48, 64)
    mask[..., 8:40, :] = 1
    cells = foreground_cells(support, mask)
    place = cells.levels[0][0, 0]
    assert cells.there.all() and len(place.unique()) == len(place) == MOST
    assert ((place >= 8 * 64) & (place < 40 * 64)).all()
    quarters = torch.bincount(((place - 8 * 64) / (8 * 64)).long(), minlength=4)
    assert quarters.min() > MOST / 8, "not spread over the object"
    assert torch.equal(foreground_cells(support, mask).levels[0], cells.levels[0])


def test_capped_maps_stay_close_to_uncapped_ones():
    grid = (24, 32)
    query, support = maps(1, grid=grid), maps(1, 1, seed=5, grid=grid)
    mask = torch.zeros(1, 1, *grid)
    mask[..., 4:22, 3:30] = 1
    few, all_cells = (foreground_cells(support, mask, most) for most in (MOST, 24 * 32))
    assert few.there.sum() == MOST and all_cells.there.sum() == 18 * 27
    means = [
        rectified_mean(query[1].flatten(2).transpose(1, 2) @ cells.levels[1], cells.there) for cells in (few, all_cells)
    ]
    assert (means[0] - means[1]).abs().max() < 0.05


def test_a_small_object_lends_the_cells_that_it_fills_most():
    mask = torch.zeros(2, 1, *GRID)
    mask[0, 0, 1, 1:4] = torch.tensor([0.2, 0.19, 0.1])
    mask[1, 0, 1, 1:4] = torch.tensor([0.9, 0.5, 0.49])
    cells = foreground_cells([torch.arange(35.0).view(1, 1, 1, *GRID).expand(2, -1, -1, -1, -1)], mask)
    assert [sorted(cells.levels[0][b, 0, cells.there[b]].tolist()) for b in range(2)] == [[8, 9], [8, 9]]


def test_background_blocks_are_means_of_background_alone():
    support = maps(1, 2)
    mask = masks(1, 2)
    cells = background_cells(support, split(mask).background)
    expected = []
    for k in range(2):
        for top in range(0, 5, 2):
            for left in range(0, 7, 2):
                block = mask[0, k, top : top + 2, left : left + 2]
                if (block == 0).all():
                    mean = support[1][0, k, :, top : top + 2, left : left + 2].flatten(1).mean(1)
                    expected.append(mean / mean.norm())
    found = cells.levels[1][0, :, cells.there[0]].T
    assert len(expected) > 4 and torch.allclose(found, torch.stack(expected), atol=1e-6)


# ---- similarity to cells


def test_the_prior_over_foreground_equals_the_full_one():
    """BAM multiplies background cells by 0 and takes the maximum over all; features of a ReLU are not negative."""
    query, support, mask = maps(2)[2], maps(2, 2, seed=5), masks(2, 2)
    cells = foreground_cells(support, split(mask).foreground)
    found = nearest(query.flatten(2).transpose(1, 2) @ cells.levels[2], cells.there, 1)
    for b in range(2):
        for cell, vector in enumerate(query[b].flatten(1).T.numpy()):
            everything = [
                cosine(vector, support[2][b, k, :, y, x].numpy()) * float(mask[b, k, y, x] == 1)
                for k in range(2) for y in range(5) for x in range(7)
            ]
            assert found[b, cell].item() == pytest.approx(max(everything), abs=1e-5)


@pytest.mark.parametrize("count", [1, 3, 50])
def test_nearest_is_the_mean_of_the_largest_that_are_there(count):
    similarity, there = rand(3, 4, 9).clamp(-1, 1), torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    there[2] = False
    there[1] = torch.arange(9) == 4
    found = nearest(similarity, there, count)
    for b in range(3):
        for n in range(4):
            best = sorted(similarity[b, n][there[b]].tolist(), reverse=True)[:count]
            assert found[b, n].item() == pytest.approx(sum(best) / len(best) if best else 0.0, abs=1e-6)


def test_rectified_mean_equals_loops():
    similarity, there = rand(3, 4, 9), torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    there[2] = False
    found = rectified_mean(similarity, there)
    for b in range(3):
        for n in range(4):
            values = [max(s, 0.0) for s, t in zip(similarity[b, n].tolist(), there[b].tolist(), strict=True) if t]
            assert found[b, n].item() == pytest.approx(sum(values) / len(values) if values else 0.0, abs=1e-6)


# ---- all of it


def reference(query, support, mask):
    """evidence(...) of one episode by loops over cells, for hard masks: [E, N]."""
    shots, (height, width) = mask.shape[0], mask.shape[-2:]
    inside = [(k, y, x) for k in range(shots) for y in range(height) for x in range(width) if mask[k, y, x] == 1]
    outside = [(k, y, x) for k in range(shots) for y in range(height) for x in range(width) if mask[k, y, x] == 0]
    corners = [(k, y, x) for k in range(shots) for y in range(0, height, 2) for x in range(0, width, 2)]
    blocks = [c for c in corners if (mask[c[0], c[1] : c[1] + 2, c[2] : c[2] + 2] == 0).all()]

    def similarities(levels, shown, cell):
        y, x = divmod(cell, width)
        front = [float(np.mean([q[:, y, x] @ s[k][:, v, u] for q, s in zip(levels, shown, strict=True)]))
                 for k, v, u in inside]
        back = []
        for k, v, u in blocks:
            means = [s[k][:, v : v + 2, u : u + 2].reshape(len(q), -1).mean(1)
                     for q, s in zip(levels, shown, strict=True)]
            back.append(np.mean([cosine(q[:, y, x], m) for q, m in zip(levels, means, strict=True)]))
        return front, back

    rows = []
    for levels, shown in [*(([q], [s]) for q, s in zip(query, support, strict=True)), (query, support)]:
        joined, together = np.concatenate(levels), np.concatenate(shown, 1)
        towards = [np.mean([together[k][:, y, x] for k, y, x in side], 0) for side in (inside, outside)]
        table = []
        for cell in range(height * width):
            front, back = similarities(levels, shown, cell)
            vector = joined[:, cell // width, cell % width]
            close = np.mean(sorted(front)[-NEAREST * shots :])
            table.append([cosine(vector, towards[0]), cosine(vector, towards[1]), close, max(back),
                          np.mean(np.maximum(front, 0))])
        rows += list(np.array(table).T)
    return np.array(rows)


@pytest.mark.parametrize("shots", [1, 3])
def test_evidence_equals_loops(shots):
    query, support, mask = maps(2), maps(2, shots, seed=5), masks(2, shots)
    found = evidence(query, support, split(mask))
    assert found.shape == (2, 20, *GRID) and found.abs().max() <= 1 + 1e-5
    for b in range(2):
        expected = reference([x[b].numpy() for x in query], [x[b].numpy() for x in support], mask[b].numpy())
        assert np.allclose(found[b].flatten(1).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("every_level", [True, False])
@pytest.mark.parametrize("episodes", [1, 2])
def test_a_query_at_its_own_strides_says_what_the_stretched_one_says(episodes, every_level):
    strides = Features(rand(episodes, 6, 8, 12), rand(episodes, 9, 4, 6), rand(episodes, 4, 2, 3))
    support, mask = maps(episodes, 2, seed=5, grid=(8, 12)), masks(episodes, 2, grid=(8, 12))
    found = evidence(strides, support, split(mask), every_level)
    expected = evidence(to_grid(strides, (8, 12)), support, split(mask), every_level)
    assert found.shape == (episodes, 20 if every_level else 5, 8, 12)
    assert torch.allclose(found, expected, atol=1e-5)
    if not every_level:
        assert torch.allclose(found, evidence(strides, support, split(mask))[:, -5:], atol=1e-6)


def test_the_order_of_supports_changes_nothing():
    query, support, mask = maps(2), maps(2, 3, seed=5), masks(2, 3)
    order = [2, 0, 1]
    turned = evidence(query, [x[:, order] for x in support], split(mask[:, order]))
    assert torch.allclose(turned, evidence(query, support, split(mask)), atol=1e-6)
    psi = style_discrepancy(query[0], support[0])
    assert torch.allclose(style_discrepancy(query[0], support[0][:, order]), psi[:, order])


def test_the_order_of_large_supports_changes_nothing_either():
    """They give more cells than are kept; which ones are kept must not depend on the place of their support."""
    grid = (16, 24)
    query, support = maps(1, grid=grid), maps(1, 3, seed=5, grid=grid)
    mask = torch.zeros(1, 3, *grid, dtype=torch.uint8)
    for k, width in enumerate((20, 14, 3)):
        mask[:, k, 2:14, 2 : 2 + width] = 1
    assert (mask == 1).sum() > MOST
    order = [2, 0, 1]
    turned = evidence(query, [x[:, order] for x in support], split(mask[:, order]))
    assert torch.allclose(turned, evidence(query, support, split(mask)), atol=1e-5)


def test_five_copies_of_a_support_say_what_one_says():
    """Prototypes differ by their epsilon alone; objects larger than MOST cells are no exception."""
    grid = (20, 24)
    query, support = maps(2, grid=grid), maps(2, 1, seed=5, grid=grid)
    mask = masks(2, 1, ((1, 19), (2, 22)), grid)
    assert (mask[0] == 1).sum() > MOST
    one = evidence(query, support, split(mask)).unflatten(1, (4, 5))
    five = evidence(query, [x.expand(-1, 5, -1, -1, -1) for x in support], split(mask.expand(-1, 5, -1, -1)))
    five = five.unflatten(1, (4, 5))
    for place in range(5):
        assert torch.allclose(five[:, :, place], one[:, :, place], atol=1e-4 if place < NEAR_FOREGROUND else 1e-6)


def test_an_episode_does_not_depend_on_its_neighbours():
    query, support, mask = maps(3), maps(3, 2, seed=5), masks(3, 2)
    mask[1] = 0
    together = evidence(query, support, split(mask))
    for b in range(3):
        alone = evidence([x[b : b + 1] for x in query], [x[b : b + 1] for x in support], split(mask[b : b + 1]))
        assert torch.allclose(together[b], alone[0], atol=1e-6)
