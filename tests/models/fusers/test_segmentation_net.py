"""Encoders that stop early, one head on all of them."""

from __future__ import annotations

import pytest
import torch

from models.errors import UsageError
from models.fusers.segmentation_net import SegmentationNet

KINDS = {
    "mit": {"encoder": "mit", "widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1)},
    "mobilenet_v2": {"encoder": "mobilenet_v2", "normalise": "symmetric"},
    "resnet": {"encoder": "test_resnet"},
    "convnext": {"encoder": "test_convnext"},
}


def build(kind: str, **changes) -> SegmentationNet:
    torch.manual_seed(0)
    return SegmentationNet(**{"classes": 5, "head_width": 8, **KINDS[kind], **changes}).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_stages_are_the_first_two_of_four(kind):
    net, images = build(kind), torch.rand(2, 3, 64, 96)
    early, whole = net.features(images, 2), net.features(images)
    assert len(early) == 2 and len(whole) == 4
    assert all(torch.equal(a, b) for a, b in zip(early, whole, strict=False))
    assert [x.shape[1] for x in whole] == list(net.channels)
    assert [64 // x.shape[2] for x in whole] == [4, 8, 16, 32]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_have_the_size_of_the_picture(kind):
    assert build(kind)(torch.rand(1, 3, 50, 70)).shape == (1, 5, 50, 70)


def test_early_stages_do_no_later_work():
    net, ran = build("mit"), []
    for i, stage in enumerate(net.encoder.stages):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    net.features(torch.rand(1, 3, 64, 64), 2)
    assert ran == [0, 1]


def test_b3_with_256_channels_has_the_measured_size():
    with torch.device("meta"):
        net = SegmentationNet(9)
    total, encoder = (sum(p.numel() for p in m.parameters()) for m in (net, net.encoder))
    assert total == pytest.approx(44.602e6, abs=3e3) and encoder == pytest.approx(44.072e6, abs=1e4)


def test_normalisation_is_inside():
    net, seen = build("mobilenet_v2"), []
    net.encoder.stages[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    net.features(torch.ones(1, 3, 32, 32), 1)
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 32, 32))
    net.features(torch.zeros(1, 3, 32, 32), 1)
    torch.testing.assert_close(seen[1], -torch.ones(1, 3, 32, 32))


def test_weights_come_from_a_file(tmp_path):
    net = build("mit")
    torch.save(net.encoder.state_dict(), tmp_path / "mit.pth")
    torch.manual_seed(5)
    again = SegmentationNet(5, head_width=8, **KINDS["mit"], weights=str(tmp_path / "mit.pth"))
    assert all(torch.equal(a, b) for a, b in zip(net.encoder.parameters(), again.encoder.parameters(), strict=True))
    with pytest.raises(UsageError, match="no weights file"):
        build("mit", weights=str(tmp_path / "absent.pth"))


@pytest.mark.parametrize("name", ["no_such_net", "test_vit"])
def test_encoders_that_do_not_serve_are_told(name):
    with pytest.raises(UsageError, match=r"no encoder|4, 8, 16 and 32"):
        SegmentationNet(5, encoder=name)
