"""What a support says about a query without a single trained weight: similarity maps.

The pieces of BAM (arXiv 2203.07615) and MSANet (arXiv 2206.09667) that need no learning, batched over supports:
masked-average prototype, dense nearest-support similarity (the prior of PFENet and BAM, for foreground and
background), mean rectified similarity (MSANet's multi-similarity), and the Gram-matrix discrepancy ψ.

Legend: B episodes, K supports, c channels, N = h·w cells of a query, M support cells, E evidence maps.
`foreground` and `background` are soft masks [B, K, h, w] in 0..1; ignored pixels are in neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

EPSILON = 5e-4
NEAREST = 5
MOST = 256


class SoftMask(NamedTuple):
    """Support masks on the feature grid: foreground and background share of each cell, [B, K, h, w]."""

    foreground: Tensor
    background: Tensor


def soft_mask(mask: Tensor, grid: tuple[int, int]) -> SoftMask:
    """Masks [B, K, H, W] of {0, 1, 255} on the grid (h, w): area shares on a canvas of 8n.

    On one of 8n + 1 a cell looks at pixel 8i, which is what BAM's aligned bilinear resizing comes down to.
    """
    planes = torch.stack([mask == 1, mask == 0], 2).float()
    how = {"mode": "bilinear", "align_corners": True} if mask.shape[-1] % 8 == 1 else {"mode": "area"}
    shares = interpolate(planes.flatten(0, 1), grid, **how).unflatten(0, mask.shape[:2])
    return SoftMask(shares[:, :, 0], shares[:, :, 1])


def to_grid(features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Unit-length float maps [.., c, h, w] of all levels on one grid; native strides are stretched bilinearly."""
    maps = []
    for level in features:
        flat = level.float().flatten(0, -4) if level.dim() > 4 else level.float()
        maps.append(normalize(stretch(flat, grid), dim=1).reshape(*level.shape[:-2], *grid))
    return maps


def stretch(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear [.., h', w'] -> [.., h, w] (align_corners=False), one side after the other as matrix products: on a CPU
    several times as fast as `interpolate` where there are many maps."""
    for side in (-1, -2):
        size = maps.shape[side]
        if size != grid[side]:
            eye = torch.eye(size, dtype=maps.dtype, device=maps.device)[None]
            weight = interpolate(eye, grid[side], mode="linear", align_corners=False)[0]
            maps = maps @ weight if side == -1 else weight.T @ maps
    return maps


def prototype(support: Tensor, weight: Tensor) -> Tensor:
    """Masked average [B, c] over all cells and shots: Σ f·m / (Σ m + 5e-4) (BAM §3.2). Empty mask gives 0.

    support [B, K, c, h, w], weight [B, K, h, w].
    """
    return torch.einsum("bkchw,bkhw->bc", support, weight) / (weight.sum((1, 2, 3))[:, None] + EPSILON)


def style_discrepancy(query: Tensor, support: Tensor) -> Tensor:
    """ψ [B, K] in 0..1: distance of the channel-similarity matrices of low-level features (BAM eq. 6-8).

    A = XXᵀ ⊘ ‖X_i‖‖X_j‖ of X = [c, N]; ψ = ‖A_q - A_s‖_F / c. query [B, c, h, w], support [B, K, c, h, w].
    """
    gram_query, gram_support = _gram(query)[:, None], _gram(support)
    return torch.linalg.matrix_norm(gram_query - gram_support) / query.shape[1]


def _gram(maps: Tensor) -> Tensor:
    """The products are scaled, not the maps: there are fewer of them."""
    cells = maps.float().flatten(-2)
    products = cells @ cells.transpose(-1, -2)
    length = products.diagonal(dim1=-2, dim2=-1).clamp(min=1e-24).sqrt()
    return products / length[..., None] / length[..., None, :]


class Cells(NamedTuple):
    """Support cells to compare with: unit vectors of each level [B, c, M], and which places are taken, bool [B, M]."""

    levels: list[Tensor]
    there: Tensor


def foreground_cells(support: list[Tensor], foreground: Tensor, most: int = MOST) -> Cells:
    """Up to `most` cells of each shot that clearly belong to the object; a fixed shape, so nothing syncs.

    A cell belongs when its share is at least 0.5, or at least 0.9 of the largest share where objects are small. Every
    shot may give `most` of them, so that neither their order nor a copy is of any account; when it has more, the ones
    kept are spread evenly by a fixed pseudo-random order.
    """
    share = foreground.flatten(2)
    highest = share.amax((1, 2), keepdim=True)
    inside = (share >= (0.9 * highest).clamp(max=0.5)) & (highest > 0)
    order = torch.rand(share.shape[2], generator=torch.Generator().manual_seed(0)).to(share)
    count = min(most, share.shape[2])
    best = torch.where(inside, 1 + order, order).topk(count, dim=2).indices
    levels = [torch.gather(x.flatten(3), 3, best[:, :, None].expand(-1, -1, x.shape[2], -1)) for x in support]
    return Cells([_cells(level) for level in levels], inside.gather(2, best).flatten(1))


def background_cells(support: list[Tensor], background: Tensor, pool: int = 2) -> Cells:
    """Background in blocks of pool x pool cells, masked mean of each block scaled to unit length, of all shots."""
    weight = background.flatten(0, 1)[:, None]
    share = avg_pool2d(weight, pool, ceil_mode=True, count_include_pad=False)
    levels = []
    for x in support:
        mean = avg_pool2d(x.flatten(0, 1) * weight, pool, ceil_mode=True, count_include_pad=False)
        levels.append(_cells(normalize(mean, dim=1).unflatten(0, x.shape[:2])))
    return Cells(levels, (share > 0.9).unflatten(0, background.shape[:2]).flatten(1))


def _cells(maps: Tensor) -> Tensor:
    """[B, K, c, ...] -> [B, c, K·...]."""
    return maps.transpose(1, 2).flatten(2)


def nearest(similarity: Tensor, there: Tensor, count: int) -> Tensor:
    """Mean of the `count` largest similarities [B, N, M] to the cells that are there: [B, N], 0 where there are none.

    With count=1 this is the prior map of PFENet and BAM before its min-max scaling.
    """
    masked = similarity.masked_fill(~there[:, None], -2.0)
    best = masked.amax(-1, keepdim=True) if count == 1 else masked.topk(min(count, masked.shape[-1]), dim=-1).values
    real = best > -1.5
    return (best * real).sum(-1) / real.sum(-1).clamp(min=1)


def rectified_mean(similarity: Tensor, there: Tensor) -> Tensor:
    """Mean over the support cells that are there of ReLU(similarity): [B, N] (MSANet §3.2). None gives 0."""
    weight = there.to(similarity.dtype)
    return torch.einsum("bnm,bm->bn", similarity.relu(), weight) / weight.sum(-1, keepdim=True).clamp(min=1)


def evidence(query: Sequence[Tensor], support: list[Tensor], mask: SoftMask, every_level: bool = True) -> Tensor:
    """Maps [B, E, h, w], all in -1..1: five for each level, then five for all levels together (the last E = 5).

    In this order: cosine to the foreground and to the background prototype; similarity to the nearest foreground cells
    and to the nearest background block; rectified mean similarity to the foreground. `query` [B, c, h', w'] at any
    stride and length, `support` [B, K, c, h, w] from `to_grid`. "All" takes the unit-length levels side by side, so
    that each counts the same. every_level: False leaves the single levels out (E = 5 instead of 5·(levels + 1)).
    """
    grid, shots = support[0].shape[-2:], support[0].shape[1]
    inside = _present(foreground_cells(support, mask.foreground))
    outside = _present(background_cells(support, mask.background))
    averages = [torch.stack([prototype(shown, weight) for weight in mask], 2) for shown in support]
    lengths = torch.stack([average.norm(dim=1) for average in averages])
    joint = len(support) ** -0.5 * lengths.norm(dim=0)
    maps, total = [], None
    for n, asked in enumerate(query):
        scaled = averages[n] / joint[:, None].clamp(min=1e-12)
        similarity = cosines(asked, torch.cat([inside.levels[n], outside.levels[n], scaled], 2), grid)
        if every_level:
            alone = joint / lengths[n].clamp(min=1e-12)
            maps += _five(similarity, alone[..., None], inside.there, outside.there, shots)
        total = similarity if total is None else total.add_(similarity)
    maps += _five(total.div_(len(support)), 1.0, inside.there, outside.there, shots)
    return torch.stack(maps, 1).unflatten(2, grid)


def cosines(query: Tensor, cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, M, N]: cells [B, c, M] times the unit-length query of the grid, for a query [B, c, h', w'] of any stride.

    Stretching is linear and so are products: at a fourth of the sides that is a sixteenth of the products.
    """
    products = stretch(torch.bmm(cells.transpose(1, 2), query.flatten(2)).unflatten(2, query.shape[-2:]), grid)
    length = stretch(query, grid).flatten(2).norm(dim=1, keepdim=True)
    return products.flatten(2).div_(length.clamp_(min=1e-12))


def _present(cells: Cells) -> Cells:
    """Of a single episode only the cells that are there (at least one place); on a GPU that would be a sync."""
    if len(cells.there) > 1 or cells.there.device.type != "cpu":
        return cells
    kept = cells.there[0].nonzero()[:, 0]
    kept = kept if len(kept) else kept.new_zeros(1)
    return Cells([level[..., kept] for level in cells.levels], cells.there[:, kept])


def _five(similarity: Tensor, scale: Tensor | float, inside: Tensor, outside: Tensor, shots: int) -> list[Tensor]:
    """The maps of one view [B, M, N] (objects, blocks, two prototypes). The nearest NEAREST cells per shot, so that
    copies of one support say what one says. scale: of the prototypes."""
    parts = similarity.split([inside.shape[1], outside.shape[1], 2], 1)
    front, back = (part.transpose(1, 2) for part in parts[:2])
    near = [nearest(front, inside, NEAREST * shots), nearest(back, outside, 1), rectified_mean(front, inside)]
    return [*(parts[2] * scale).unbind(1), *near]


def control_maps(query: Sequence[Tensor], support: Sequence[Tensor], mask: SoftMask) -> Tensor:
    """[B, 2, h, w]: cosine to the foreground and to the background prototype over all levels, as in `evidence`.

    query [B, c, h', w'] and support [B, K, c, h', w'] at any stride and length; h x w is the masks' grid.
    """
    grid = tuple(mask.foreground.shape[-2:])
    averages = [_unit_average(shown, mask) for shown in support]
    joint = torch.cat(averages, 1).norm(dim=1, keepdim=True).clamp(min=1e-12)
    maps = [cosines(asked, average / joint, grid) for asked, average in zip(query, averages, strict=True)]
    return (sum(maps) * len(maps) ** -0.5).unflatten(2, grid)


def _unit_average(support: Tensor, mask: SoftMask) -> Tensor:
    """Prototypes [B, c, 2] of the unit-length cells of [B, K, c, h', w']: the masks are scaled, not the cells."""
    weight = torch.stack(mask, 2)
    cells = stretch(support.float(), weight.shape[-2:]).flatten(3)
    scaled = weight.flatten(3) / cells.norm(dim=2, keepdim=True).clamp(min=1e-12)
    total = weight.sum((1, 3, 4))[:, None] + EPSILON
    return torch.einsum("bkcn,bkmn->bcm", cells, scaled) / total


# ---- dense similarity to every cell of the object, for MSANet


class Places(NamedTuple):
    """Which support cells to compare with. index [B, K, M] into the N cells; there: bool [B, K, M], the cell is marked
    at all; weight [B, K, M]: 1 / how many, where a cell is marked as much as marked cells are on average, else 0."""

    index: Tensor
    there: Tensor
    weight: Tensor


def object_places(foreground: Tensor) -> Places:
    """All cells with a share of the object [B, K, h, w]; M is the largest count of the batch.

    Cells outside the object can be left out: masked features there are 0, which no maximum of rectified features and
    no masked mean sees. The mean over positive shares as a threshold is MSANet's.
    """
    share = foreground.flatten(2)
    inside = share > 0
    count = inside.sum(2, keepdim=True)
    most = max(int(count.max()), 1)
    index = inside.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :most]
    core = inside & (share >= share.sum(2, keepdim=True) / count.clamp(min=1) - 1e-6)
    weight = core / core.sum(2, keepdim=True).clamp(min=1)
    return Places(index, inside.gather(2, index), weight.gather(2, index))


def _taken(cells: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [B, K, M] of cells [B, K, N, c]: [B, K·M, c]."""
    episode, shot = (torch.arange(n, device=index.device) for n in index.shape[:2])
    return cells[episode[:, None, None], shot[:, None], index].flatten(1, 2)


def prior_maps(query: Tensor, support: Tensor, places: Places) -> Tensor:
    """[B, K, h, w] in 0..1: each query cell's largest cosine to the object, min-max scaled per shot (PFENet; BAM §3.2).

    query [B, c, h, w], support [B, K, c, h, w]: high-level features. Without an object 0.
    """
    shown = normalize(_taken(support.flatten(3).transpose(2, 3), places.index), dim=2)
    similarity = cosines(query, shown.transpose(1, 2), query.shape[-2:]).unflatten(1, places.there.shape[1:])
    best = similarity.masked_fill(~places.there[..., None], 0.0).amax(2).clamp(min=0)
    low, high = best.amin(2, keepdim=True), best.amax(2, keepdim=True)
    return ((best - low) / (high - low + 1e-7)).unflatten(2, query.shape[-2:])


def multi_similarity(
    query: Sequence[Tensor], support: Sequence[Sequence[Tensor]], widths: Sequence[int], places: Places
) -> Tensor:
    """[B, blocks, N]: for each block the mean over the object of ReLU(cosine), averaged over shots (MSANet §3.2).

    query: B of [N, Σ c]; support: B of K of [N, Σ c]: unit vectors of each block side by side; widths: their channels.
    One episode after the other, as maps of so many blocks are too large to be copied side by side.
    """
    weight = (places.weight / places.weight.shape[1]).flatten(1)[..., None]
    widths, found = list(widths), []
    for b, (asked, shots) in enumerate(zip(query, support, strict=True)):
        shown = torch.cat([cells[index] for cells, index in zip(shots, places.index[b], strict=True)])
        pairs = zip(*(_exact(x).split(widths, 1) for x in (asked, shown)), strict=True)
        found.append(torch.stack([((a @ s.T).relu_().float() @ weight[b])[:, 0] for a, s in pairs]))
    return torch.stack(found)


def _exact(cells: Tensor) -> Tensor:
    """In float32 on a CPU, which has no faster products for halves."""
    return cells.float() if cells.device.type == "cpu" else cells
