"""Multiply-accumulates of both fusers at 480 x 640, counted on tensors without memory: the same on every machine."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.fusers.segmif import SegMiF
from models.fusers.sgdfuse import SGDFuse

pytestmark = pytest.mark.bench
HEIGHT, WIDTH = 480, 640
RELEASED_SEGMIF = 413.6e9  # as specified; rebuilt below from the same parts
NAIVE_SGDFUSE = 60e12


def macs(function, *arguments) -> float:
    """Half of the floating point operations of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments)
    return counter.get_total_flops() / 2


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, 1, HEIGHT, WIDTH, device="meta"), torch.empty(1, 3, HEIGHT, WIDTH, device="meta")


def segmif(**changes) -> SegMiF:
    with torch.device("meta"):
        return SegMiF(**changes).eval()


def fuse_and_segment(fuser: SegMiF) -> float:
    """Semantics, fusion and segmentation of one pair. The saliency table, some thousand additions, is left out."""
    infrared, visible = pair()
    blend = torch.empty_like(infrared)

    def work():
        semantics = fuser.semantic_features(infrared, visible, blend)
        fuser.fusion(infrared, visible[:, :1], semantics)
        fuser.segment(visible)

    return macs(work)


def released() -> float:
    """The released network: full resolution, semantics upsampled first, and the whole encoder for two stages of it."""
    fuser = segmif(fold=1, norm="sum", native=False)
    infrared, visible = pair()
    grids = [torch.empty(1, c, HEIGHT, WIDTH, device="meta") for c in fuser.segmentation.channels[:2]]
    semantics = macs(lambda: fuser.features(visible))
    return semantics + macs(fuser.fusion, infrared, visible[:, :1], grids) + macs(fuser.segment, visible)


def test_segmif_needs_a_third_of_the_released_work(benchmark):
    before, after = released(), benchmark.pedantic(fuse_and_segment, args=(segmif(),), rounds=1)
    benchmark.extra_info.update(released_gmac=before / 1e9, gmac=after / 1e9, ratio=before / after)
    print(f"\nSegMiF {after / 1e9:.1f} GMAC, released {before / 1e9:.1f} GMAC, ratio {before / after:.2f}")
    assert before == pytest.approx(RELEASED_SEGMIF, rel=0.01)
    assert RELEASED_SEGMIF / after >= 3


@pytest.mark.parametrize("configuration", ["paper5", "full", "fast", "refine1"])
def test_sgdfuse_by_configuration(benchmark, configuration):
    with torch.device("meta"):
        fuser = SGDFuse(configuration).eval()
    spent = benchmark.pedantic(lambda: macs(fuser.fuse, *pair()), rounds=1)
    benchmark.extra_info.update(tmac=spent / 1e12)
    print(f"\nSGDFuse {configuration} {spent / 1e12:.3f} TMAC")
    if configuration in ("fast", "refine1"):
        assert spent <= 1e12
    assert spent < NAIVE_SGDFUSE / 10
