"""The encoders that there are: torchvision's MobileNetV2 and VGG-16, and any classifier of timm, cut into three levels.

With `dilated`, strides beyond 8 become dilation, as in PSPNet, BAM (arXiv 2203.07615) and MSANet (arXiv 2206.09667),
and all levels share one grid. Legend: B images, h x w cells, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.errors import UsageError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder, with which weights.

    name: `mobilenet_v2`, `vgg16_bn` (torchvision; BAM's VGG) or any timm classifier with feature maps, such as
    `resnet50s.gluon_in1k` (BAM's deep stem) or `resnet101s`.
    weights: a state-dict file (.pth or .safetensors), `pretrained` (timm or torchvision fetches them), or `random`.
    normalise: `imagenet` mean and deviation, or `symmetric` (x / 127.5 - 1).
    stages: feature levels (low, mid, high), as indices into the encoder's list of stages.
    dilated: stride 8 for all levels instead of the encoder's own (8, 16, 32; VGG: 8, 16, 16, as BAM released it).
    dilate_first_block: also the first block of a dilated stage, as released; timm and torchvision leave it behind.
    precision: `float32`, `bfloat16`, or `auto`: bfloat16 where a CUDA device has it. seed: of `random` weights.
    """

    name: str = "mobilenet_v2"
    weights: str = "random"
    normalise: str = "imagenet"
    stages: tuple[int, int, int] = (1, 2, 3)
    dilated: bool = True
    dilate_first_block: bool = True
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(f"There is no precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}.")


class Parts(NamedTuple):
    """An encoder in pieces. stages: image -> (low, mid, high); channels: their widths; last: mid -> high.

    taps: modules whose input (`before`) or output is a block's map, in order, with its channels.
    """

    stages: nn.Module
    channels: tuple[int, int, int]
    last: nn.Module | None = None
    taps: Sequence[tuple[nn.Module, int]] = ()
    before: bool = True


def build_parts(settings: EncoderSettings) -> Parts:
    """The encoder in pieces, with its weights. Raises UsageError when the name is unknown or the weights do not fit."""
    return {"mobilenet_v2": _mobilenet_v2, "vgg16_bn": _vgg16}.get(settings.name, _timm)(settings)


class _Chunks(nn.Module):
    """A chain cut in pieces; forward returns what leaves each piece."""

    def __init__(self, *pieces: nn.Module) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for piece in self.pieces:
            x = piece(x)
            out.append(x)
        return out


def fold_norms(network: nn.Module) -> None:
    """Fold each frozen batch norm that follows a convolution in a chain into it: the same answers, a pass less each."""
    chains = [m for m in network.modules() if isinstance(m, nn.Sequential)]
    for chain in chains:
        for place, (layer, norm) in enumerate(pairwise(chain)):
            if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                chain[place], chain[place + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
    network.requires_grad_(False).eval()


def _dilate(layers: nn.Module, dilation: int, first: bool = True) -> None:
    """Replace strides by dilation in every 3x3 convolution of `layers`; not `first`: half of it in the first one."""
    found = [m for m in layers.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for place, module in enumerate(found):
        by = dilation if place or first else dilation // 2
        module.stride, module.dilation, module.padding = (1, 1), (by, by), (by, by)


def _mobilenet_v2(settings: EncoderSettings) -> Parts:
    """Blocks: the linear bottlenecks of the three levels; they have no ReLU to stand before."""
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    pretrained = MobileNet_V2_Weights.IMAGENET1K_V1 if settings.weights == "pretrained" else None
    net = mobilenet_v2(weights=pretrained)
    load_weights(net, settings.weights)
    layers = net.features
    if settings.dilated:
        _dilate(layers[7:14], 2, settings.dilate_first_block)
        _dilate(layers[14:18], 4, settings.dilate_first_block)
    taps = [(layer, layer.out_channels) for layer in layers[4:18]]
    return Parts(_Chunks(layers[:7], layers[7:14], layers[14:18]), (32, 96, 320), layers[14:18], taps, before=False)


def _vgg16(settings: EncoderSettings) -> Parts:
    """BAM's cut of VGG-16 with batch normalisation: the levels end after the third pool, the fourth, and conv5_3.

    Pools round up, so that sides of 8n + 1 give n + 1 cells as in a ResNet. Blocks: conv3_1 to conv5_3 before ReLU.
    """
    from torchvision.models import VGG16_BN_Weights
    from torchvision.models.vgg import cfgs, make_layers

    net = nn.Module()
    net.features = layers = make_layers(cfgs["D"], batch_norm=True)
    if settings.weights == "pretrained":
        net.load_state_dict(VGG16_BN_Weights.IMAGENET1K_V1.get_state_dict(progress=False), strict=False)
    load_weights(net, settings.weights)
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    if settings.dilated:
        layers[33] = nn.Identity()
        _dilate(layers[34:43], 2, settings.dilate_first_block)
    acts = [place for place in range(14, 43) if isinstance(layers[place], nn.ReLU)]
    taps = [(_kept(layers[place]), layers[place - 1].num_features) for place in acts]
    return Parts(_Chunks(layers[:24], layers[24:34], layers[34:43]), (256, 512, 512), layers[34:43], taps)


def _kept(activation: nn.Module) -> nn.Module:
    """An activation that leaves its input as it was."""
    activation.inplace = False
    return activation


def _timm(settings: EncoderSettings) -> Parts:
    import timm

    if not timm.is_model(settings.name):
        close = timm.list_models(f"*{settings.name.split('.')[0][:6]}*")[:8]
        known = ", ".join(["mobilenet_v2", "vgg16_bn", *(close or ["resnet50s", "resnet101s"])])
        raise UsageError(f"There is no encoder {settings.name!r}; some that exist: {known} (any timm name works).")
    options = {"features_only": True, "out_indices": settings.stages, "pretrained": settings.weights == "pretrained"}
    stride = {"output_stride": 8} if settings.dilated else {}
    try:
        net = timm.create_model(settings.name, **stride, **options)
    except (NotImplementedError, TypeError, AssertionError) as error:  # what timm raises where strides are fixed
        why = str(error) or "its strides are fixed"
        raise UsageError(f"{settings.name} cannot be dilated ({why}); set encoder.dilated=false.") from error
    load_weights(net, settings.weights)
    return _resnet(net, settings)


def _resnet(net: nn.Module, settings: EncoderSettings) -> Parts:
    """What is peculiar to ResNets: all blocks dilated as released, and the bottlenecks' outputs before their ReLU."""
    channels = tuple(net.feature_info.channels())
    stages = [getattr(net, name, None) for name in ("layer1", "layer2", "layer3", "layer4")]
    if None in stages or not all(hasattr(block, "act2") for stage in stages for block in stage):
        return Parts(net, channels)
    if settings.dilated and settings.dilate_first_block:
        _dilate(stages[2], 2)
        _dilate(stages[3], 4)
    used = [stages[place - 1] for place in settings.stages if place > 0]
    taps = [(_kept(getattr(b, "act3", b.act2)), _width(b)) for stage in used for b in stage]
    return Parts(net, channels, used[-1], taps)


def _width(block: nn.Module) -> int:
    return getattr(block, "conv3", block.conv2).out_channels


def load_weights(net: nn.Module, weights: str) -> None:
    """Weights of a .pth or .safetensors file into `net`; "random" and "pretrained" are left to who built it.

    Raises UsageError when the file is absent, unreadable or lacks tensors.
    """
    if weights in ("random", "pretrained"):
        return
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"There is no weights file {weights}; set encoder.weights to a .pth or .safetensors file.")
    try:
        missing, _ = net.load_state_dict(read_weights(path), strict=False)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{path.name} does not fit the encoder: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in missing if "num_batches_tracked" not in name]
    if missing:
        raise UsageError(f"{path.name} does not fit the encoder: it lacks {len(missing)} tensors, first {missing[0]}.")


def read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the two formats fail in a dozen ways
        raise UsageError(f"{path.name} cannot be read; set encoder.weights to a .pth or .safetensors file.") from error
