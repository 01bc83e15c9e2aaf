"""Frozen encoders: what they accept, what they promise, and that a saved one is the same one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.backbone import IMAGENET, Encoder, build_encoder, load_encoder, save_encoder
from models.encoders import EncoderSettings, Parts
from models.errors import UsageError
from tests.models.drawn import ENCODER, tiny_encoder

MOBILENET = EncoderSettings("mobilenet_v2")


def images(batch=2, height=64, width=96, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def same(first, second):
    """The same levels, up to the rounding of norms that are folded."""
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, second, strict=True))


# ---- names and weights


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(UsageError, match=r"no encoder 'resnet5'; .*mobilenet_v2, .*resnet50"):
        build_encoder(EncoderSettings("resnet5"))


@pytest.mark.parametrize("name", ["test_vit", "vgg11"])
def test_one_that_cannot_be_dilated_says_how_to_go_on(name):
    with pytest.raises(UsageError, match=rf"{name} cannot be dilated .*set encoder\.dilated=false"):
        build_encoder(EncoderSettings(name))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_the_file(tmp_path, suffix):
    state = {name: x.contiguous() for name, x in tiny_encoder(seed=5).stages.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert same(tiny_encoder(seed=6, weights=str(path))(images()), tiny_encoder(seed=5)(images()))


def test_a_weights_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"no weights file .*nowhere\.pth; set encoder\.weights"):
        tiny_encoder(weights=str(tmp_path / "nowhere.pth"))


def test_weights_that_lack_tensors_name_the_first(tmp_path, encoder):
    state = encoder.stages.state_dict()
    lost = [name for name in state if name.startswith("layer3")]
    torch.save({name: x for name, x in state.items() if name not in lost}, tmp_path / "w.pth")
    named = [name for name in lost if "num_batches" not in name]
    with pytest.raises(UsageError, match=rf"w\.pth does not fit .* lacks {len(named)} tensors, first {named[0]}"):
        tiny_encoder(weights=str(tmp_path / "w.pth"))


def test_weights_of_another_shape_do_not_fit(tmp_path, encoder):
    state = {name: x[:3] if x.dim() else x for name, x in encoder.stages.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth does not fit the encoder"):
        tiny_encoder(weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_told(tmp_path, suffix):
    (tmp_path / f"w{suffix}").write_text("not weights")
    with pytest.raises(UsageError, match=r"w\..* cannot be read; .*\.pth or \.safetensors"):
        tiny_encoder(weights=str(tmp_path / f"w{suffix}"))


# ---- forward


@pytest.mark.parametrize("height, width, fit", [(63, 96, r"\(64, 96\)"), (64, 100, r"\(64, 104\)")])
def test_a_size_that_does_not_fit_names_the_next_one(encoder, height, width, fit):
    with pytest.raises(UsageError, match=rf"multiples of 8 .*, got {height}x{width}; use {fit}"):
        encoder(images(1, height, width))


@pytest.mark.parametrize("settings", [MOBILENET, ENCODER], ids=lambda s: s.name)
def test_dilated_levels_share_one_grid_and_others_keep_their_strides(settings):
    for dilated, strides in ((True, (8, 8, 8)), (False, (8, 16, 32))):
        encoder = build_encoder(replace(settings, dilated=dilated))
        for level, width, stride in zip(encoder(images()), encoder.channels, strides, strict=True):
            assert level.shape == (2, width, 64 // stride, 96 // stride)


def test_every_block_beyond_stride_8_is_dilated():
    """As in PSPNet and BAM, also the first block of a stage; torchvision and timm would leave that one behind."""
    pieces = build_encoder(MOBILENET).stages.pieces
    for piece, dilation in zip(pieces, (1, 2, 4), strict=True):
        depthwise = [m for m in piece.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert {m.dilation for m in depthwise} == {(dilation, dilation)}
        assert dilation == 1 or {m.stride for m in depthwise} == {(1, 1)}


def test_pictures_are_normalised_as_the_weights_want_it():
    class Echo(nn.Module):
        def forward(self, x):
            return x, x, x

    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    assert torch.allclose(Encoder(Parts(Echo(), (3, 3, 3)), *IMAGENET)(images()).mid, (images() - mean) / deviation)
    symmetric, imagenet = tiny_encoder(), tiny_encoder(normalise="imagenet")
    symmetric.stages = imagenet.stages = Echo()
    assert torch.allclose(symmetric(images()).low, images() * 2 - 1)
    assert torch.allclose(imagenet(images()).low, (images() - mean) / deviation)


def test_it_stays_frozen_inside_a_model_that_trains():
    encoder = tiny_encoder()
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Conv2d(48, 1, 1)}).train()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    features = encoder(images().requires_grad_())
    model["head"](features.low).sum().backward()
    assert model["head"].weight.grad is not None
    assert not any(level.requires_grad for level in features)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items()), "statistics moved"


# ---- saved and loaded


def test_a_saved_encoder_is_the_same_one(tmp_path):
    settings = replace(ENCODER, dilated=False, seed=3)
    save_encoder(tmp_path, settings)
    torch.manual_seed(99)
    loaded = load_encoder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "encoder.safetensors"]
    assert same(loaded(images()), tiny_encoder(seed=3, dilated=False)(images()))
    assert not loaded.training and torch.equal(loaded.mean.flatten(), torch.full((3,), 0.5))


def test_a_saved_encoder_needs_the_weights_file_no_more(tmp_path, encoder):
    torch.save(encoder.stages.state_dict(), tmp_path / "secret.pth")
    (tmp_path / "kept").mkdir()
    save_encoder(tmp_path / "kept", replace(ENCODER, weights=str(tmp_path / "secret.pth"), seed=8))
    (tmp_path / "secret.pth").unlink()
    assert same(load_encoder(tmp_path / "kept")(images()), encoder(images()))
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["weights"] == "random"


def test_the_seed_alone_decides_random_weights(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed, before in zip(folders, (1, 1, 2), (10, 20, 30), strict=True):
        folder.mkdir()
        torch.manual_seed(before)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(before))
        save_encoder(folder, replace(ENCODER, seed=seed))
        assert torch.equal(torch.rand(3), expected), "saving moved the caller's random state"
    first, second, other = ((folder / "encoder.safetensors").read_bytes() for folder in folders)
    assert first == second != other
