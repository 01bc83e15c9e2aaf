"""Encoders in pieces: levels, block maps and dilation as BAM and MSANet released them, at sides of 8n and 8n + 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.backbone import Features, Wants, build_encoder, load_encoder, save_encoder
from models.encoders import EncoderSettings, build_parts, fold_norms
from models.errors import UsageError
from models.views import encode
from tests.models.drawn import ENCODER, tiny_encoder

MOBILENET, VGG = EncoderSettings("mobilenet_v2"), EncoderSettings("vgg16_bn")
KINDS = [ENCODER, MOBILENET, VGG]
BLOCKS = Wants(blocks=True)


def images(height=64, width=96, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS, ids=lambda s: s.name)
def encoder(request):
    torch.manual_seed(0)
    return build_encoder(request.param, BLOCKS)


@pytest.mark.parametrize("height, width", [(64, 96), (65, 97), (41, 33)])
def test_levels_and_blocks_share_the_grid_of_the_canvas(encoder, height, width):
    grid = -(-height // 8), -(-width // 8)
    features = encoder(images(height, width))
    for level, channels in zip(features[:3], encoder.channels, strict=True):
        assert level.shape == (2, channels, *grid)
    assert features.blocks.shape == (2, grid[0] * grid[1], sum(encoder.blocks))


def test_block_cells_are_unit_vectors_and_levels_stay_what_they_are(encoder):
    features = encoder(images())
    for block in features.blocks.split(list(encoder.blocks), 2):
        lengths = block.norm(dim=2)
        assert ((lengths - 1).abs() < 1e-4).logical_or(lengths == 0).all() and lengths.max() > 0.99
    encoder.wants = Wants()
    plain = encoder(images())
    encoder.wants = BLOCKS
    assert len(plain) == 3 and all(torch.equal(a, b) for a, b in zip(plain, features[:3], strict=True))


def test_blocks_stand_before_the_relu_that_makes_the_level():
    """The last block of a level, rectified, is the level itself."""
    encoder = tiny_encoder()
    deep = build_encoder(ENCODER, BLOCKS)
    deep.load_state_dict(encoder.state_dict())
    features = deep(images())
    assert deep.blocks == (48, 192, 96)
    for level, block in zip(features[:3], features.blocks.split(list(deep.blocks), 2), strict=True):
        cells = block.transpose(1, 2).unflatten(2, level.shape[-2:])
        assert (cells < 0).any(), "rectified already"
        direction = nn.functional.normalize(level, dim=1)
        assert torch.allclose(nn.functional.normalize(cells.relu(), dim=1), direction, atol=1e-5)


def test_the_blocks_of_the_papers_encoders():
    """ResNet-50: 4 + 6 + 3 of layers 2 to 4; VGG-16: conv3_1 to conv5_3; MobileNetV2: the bottlenecks at stride 8."""
    widths = {s.name: [width for _, width in build_parts(s).taps] for s in (VGG, MOBILENET)}
    assert widths["vgg16_bn"] == [256] * 3 + [512] * 6
    assert widths["mobilenet_v2"] == [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    resnet = build_parts(EncoderSettings("resnet50s", stages=(2, 3, 4)))
    assert [width for _, width in resnet.taps] == [512] * 4 + [1024] * 6 + [2048] * 3
    assert resnet.channels == (512, 1024, 2048)
    assert resnet.stages.conv1[0].out_channels == 64 and resnet.stages.conv1[6].out_channels == 128, "a deep stem"


def dilations(layers):
    return [m.dilation[0] for m in layers.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize("first, expected", [(True, [2, 2, 4, 4, 4]), (False, [1, 2, 2, 4, 4])])
def test_every_block_of_a_stage_is_dilated_or_all_but_the_first(first, expected):
    layers = build_parts(EncoderSettings("resnet50s", stages=(2, 3, 4), dilate_first_block=first)).stages
    assert dilations(layers.layer3)[:2] + dilations(layers.layer4) == expected
    assert set(dilations(layers.layer2)) == {1}
    pieces = build_parts(replace(MOBILENET, dilate_first_block=first)).stages.pieces
    assert dilations(pieces[1])[:2] + dilations(pieces[2])[:3] == expected


def test_vgg_keeps_the_released_strides_without_dilation():
    shapes = [level.shape[-2:] for level in build_encoder(replace(VGG, dilated=False))(images())]
    assert shapes == [(8, 12), (4, 6), (4, 6)]
    assert set(dilations(build_parts(VGG).last)) == {2}


def test_the_masked_level_is_the_last_stage_of_what_the_mask_leaves(encoder):
    mid = encoder(images()).mid
    everything = encoder.masked(mid, torch.ones(2, 1, *mid.shape[-2:]))
    assert torch.allclose(everything, encoder(images()).high, atol=1e-5)
    nothing = encoder.masked(mid, torch.zeros(2, 1, *mid.shape[-2:]))
    assert not torch.allclose(nothing, everything)


@pytest.mark.parametrize("wants", [Wants(blocks=True), Wants(masked=True)])
def test_an_encoder_without_blocks_says_which_have_them(wants):
    with pytest.raises(UsageError, match="no block maps; choose a ResNet, vgg16_bn or mobilenet_v2"):
        build_encoder(replace(ENCODER, name="test_vit", stages=(0, 0, 0), dilated=False), wants)


def test_a_saved_encoder_gives_what_is_wanted_of_it(tmp_path):
    save_encoder(tmp_path, ENCODER)
    assert load_encoder(tmp_path).blocks == () and load_encoder(tmp_path, BLOCKS).blocks == (48, 192, 96)
    plain, deep = load_encoder(tmp_path), load_encoder(tmp_path, BLOCKS)
    assert torch.equal(plain(images()).high, deep(images()).high)


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(UsageError, match="no precision 'half'; choose one of auto, float32, bfloat16"):
        EncoderSettings(precision="half")


def test_bfloat16_is_close_and_leaves_as_float32():
    full, small = tiny_encoder(), tiny_encoder(precision="bfloat16")
    for exact, rough in zip(encode(full, images()), encode(small, images()), strict=True):
        assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
        assert torch.allclose(exact, rough, atol=0.05 * exact.abs().max())


def test_features_are_a_tuple_with_names():
    levels = Features(*(torch.tensor(float(n)) for n in range(5)))
    assert [levels.low, levels.mid, levels.high, levels.blocks, levels.masked] == list(levels)
    torch.manual_seed(0)
    assert type(levels)(*(x + 1 for x in levels)).high == 3


@pytest.mark.parametrize("settings", [MOBILENET, VGG], ids=lambda s: s.name)
def test_norms_fold_into_their_convolutions_and_change_no_answer(settings):
    torch.manual_seed(0)
    network = build_parts(settings).stages.eval()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        expected = network(images())
        fold_norms(network)
        found = network(images())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())
    for level, as_before in zip(found, expected, strict=True):
        assert torch.allclose(level, as_before, rtol=1e-3, atol=1e-4 * as_before.abs().max().item())
