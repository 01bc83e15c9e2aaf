"""The cascade at rest: what reaches which network, and on which channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.fusers.colour import luminance
from models.fusers.saliency import saliency_blend
from models.fusers.segmif import SegMiF
from tests.models.fusers.small import pair, small


@torch.no_grad()
def test_it_fuses_segments_and_describes():
    fuser = small("segmif")
    infrared, visible = pair(2, 64, 96)
    out = fuser.fuse(infrared, visible)
    assert fuser.segment(out.image).shape == (2, 3, 64, 96)
    assert [tuple(x.shape[2:]) for x in fuser.features(out.image)] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert len(fuser.features(out.image, 2)) == 2


@torch.no_grad()
def test_the_fusion_network_sees_luminance_and_not_red():
    fuser, seen = small("segmif"), []
    fuser.fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    infrared, visible = pair(1)
    fuser.fuse(infrared, visible)
    torch.testing.assert_close(seen[0][0], infrared)
    torch.testing.assert_close(seen[0][1], luminance(visible))


@torch.no_grad()
def test_the_semantic_branch_looks_at_what_it_is_told_to():
    infrared, visible = pair(1)
    for semantics, expected in (("saliency", saliency_blend(infrared, luminance(visible)).expand(-1, 3, -1, -1)),
                                ("visible", visible)):  # fmt: skip
        fuser = small("segmif", semantics=semantics)
        found = fuser.semantic_features(infrared, visible)
        assert all(torch.equal(a, b) for a, b in zip(found, fuser.features(expected, 2), strict=True))
    assert small("segmif", semantics="none").semantic_features(infrared, visible) is None
    given = torch.rand_like(infrared)
    fuser = small("segmif")
    found, own = (fuser.fuse(infrared, visible, aux).luminance for aux in ({"saliency": given}, {}))
    assert not torch.allclose(found, own, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {"fold": 1, "norm": "sum", "native": False}, {"paths": ("semantic",)}, {"paths": ("modal",)}, {"semantics": "none"},
    {"encoder": "test_resnet"}, {"anchor": "mean"}, {"anchor": "brightest"},
])  # fmt: skip
@torch.no_grad()
def test_every_variant_fuses_and_is_saved_whole(changes, tmp_path):
    fuser = small("segmif", **changes)
    fuser.save(tmp_path)
    again = type(fuser).load(tmp_path)
    infrared, visible = pair(1, 33, 41)
    assert torch.equal(again.fuse(infrared, visible).image, fuser.fuse(infrared, visible).image)


def test_a_saved_one_needs_no_weights_file(tmp_path):
    fuser = small("segmif")
    torch.save(fuser.segmentation.encoder.state_dict(), tmp_path / "mit.pth")
    trained = small("segmif", weights=str(tmp_path / "mit.pth"))
    trained.save(tmp_path / "fuser")
    (tmp_path / "mit.pth").unlink()
    assert type(trained).load(tmp_path / "fuser").config["weights"] == "random"


@torch.inference_mode()
def test_half_precision_is_finite_at_the_sizes_of_use():
    fuser = small("segmif").bfloat16()
    for size in ((320, 320), (240, 320), (161, 203)):
        infrared, visible = (x.bfloat16() for x in pair(1, *size))
        out = fuser.fuse(infrared, visible)
        assert out.image.shape == (1, 3, *size) and torch.isfinite(out.image).all()


def test_export_rounds_once_and_does_not_stretch():
    fuser = small("segmif", anchor="mean")  # says the mean of the pair
    grey = np.full((40, 40), 101, np.uint8)
    colour = np.full((40, 40, 3), 120, np.uint8)
    (picture,) = fuser.pictures([grey], [colour])
    assert set(np.unique(picture)) <= {110, 111}


def test_unknown_anchors_are_told():
    with pytest.raises(UsageError, match="no anchor 'median'; choose one of none, mean, brightest, two_scale"):
        small("segmif", anchor="median")


def test_unknown_semantics_are_told():
    with pytest.raises(UsageError, match="saliency, visible, none"):
        small("segmif", semantics="labels")


@pytest.mark.parametrize("size", [(2, 320, 320), (1, 480, 640), (1, 600, 800), (1, 479, 641)])
def test_the_published_sizes_fit_the_full_network(size):
    with torch.device("meta"):
        fuser, batch = SegMiF(classes=15).eval(), size[0]
        infrared, visible, blend = (torch.empty(batch, c, *size[1:]) for c in (1, 3, 1))
        with torch.no_grad():
            out = fuser.fuse(infrared, visible, {"saliency": blend})
            assert out.image.shape == visible.shape and out.luminance.shape == infrared.shape
            assert fuser.segment(out.image).shape == (batch, 15, *size[1:])
