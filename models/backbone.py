"""Frozen image encoders: one forward gives three levels of features.

Legend: B images, H x W pixels (multiples of 8), h x w = H/8 x W/8 cells, c channels.

Any classifier of timm, plus torchvision's `mobilenet_v2`, serves as encoder. With `dilated`, strides beyond 8
become dilation, as in PSPNet, BAM (arXiv 2203.07615) and MSANet (arXiv 2206.09667), and all levels share one grid.
Without it the levels keep their own strides (8, 16, 32), which is less work, and `similarity.to_grid` joins them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.errors import UsageError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoder, with which weights.

    name: `mobilenet_v2` (torchvision) or any timm classifier with feature maps, such as `resnet50s.gluon_in1k`.
    weights: a state-dict file (.pth or .safetensors), `pretrained` (timm or torchvision fetches them), or `random`.
    normalise: `imagenet` mean and deviation, or `symmetric` (x / 127.5 - 1).
    stages: feature levels (low, mid, high), as indices into the encoder's list of stages.
    dilated: stride 8 for all levels instead of 8, 16, 32. seed: of `random` weights.
    """

    name: str = "mobilenet_v2"
    weights: str = "random"
    normalise: str = "imagenet"
    stages: tuple[int, int, int] = (1, 2, 3)
    dilated: bool = True
    seed: int = 0


class Features(NamedTuple):
    """Stage outputs, each [B, c, h', w']: one grid of stride 8, or strides 8, 16, 32."""

    low: Tensor
    mid: Tensor
    high: Tensor


class Encoder(nn.Module):
    """Frozen stages behind one normalisation; always in eval mode, never with gradient.

    channels: widths of (low, mid, high).
    """

    def __init__(self, stages: nn.Module, channels: tuple[int, int, int], mean, deviation) -> None:
        super().__init__()
        self.stages, self.channels = stages, channels
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode: statistics of batch normalisation are frozen, too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Encode images [B, 3, H, W] in 0..1. Raises UsageError unless H and W are multiples of 8."""
        height, width = images.shape[-2:]
        if height % 8 or width % 8:
            fit = -(-height // 8) * 8, -(-width // 8) * 8
            raise UsageError(f"The encoder needs sides that are multiples of 8, got {height}x{width}; use {fit}.")
        return Features(*self.stages((images - self.mean) / self.deviation))


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


def _dilate(layers: nn.Module, dilation: int) -> None:
    """Replace strides by dilation in every depthwise 3x3 convolution of `layers`."""
    for module in layers.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.stride, module.dilation, module.padding = (1, 1), (dilation, dilation), (dilation, dilation)


def _mobilenet_v2(settings: EncoderSettings) -> tuple[nn.Module, tuple[int, int, int]]:
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    pretrained = MobileNet_V2_Weights.IMAGENET1K_V1 if settings.weights == "pretrained" else None
    net = mobilenet_v2(weights=pretrained)
    load_weights(net, settings.weights)
    layers = net.features
    if settings.dilated:
        _dilate(layers[7:14], 2)
        _dilate(layers[14:18], 4)
    return _Chunks(layers[:7], layers[7:14], layers[14:18]), (32, 96, 320)


def _timm(settings: EncoderSettings) -> tuple[nn.Module, tuple[int, int, int]]:
    import timm

    if not timm.is_model(settings.name):
        close = timm.list_models(f"*{settings.name.split('.')[0][:6]}*")[:8]
        known = ", ".join(["mobilenet_v2", *(close or ["resnet50s", "resnet101s", "vgg16_bn"])])
        raise UsageError(f"There is no encoder {settings.name!r}; some that exist: {known} (any timm name works).")
    options = {"features_only": True, "out_indices": settings.stages, "pretrained": settings.weights == "pretrained"}
    stride = {"output_stride": 8} if settings.dilated else {}
    try:
        net = timm.create_model(settings.name, **stride, **options)
    except (NotImplementedError, TypeError, AssertionError) as error:
        why = str(error) or "its strides are fixed"
        raise UsageError(f"{settings.name} cannot be dilated ({why}); set encoder.dilated=false.") from error
    load_weights(net, settings.weights)
    return net, tuple(net.feature_info.channels())


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
        missing, _ = net.load_state_dict(_read(path), strict=False)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{path.name} does not fit the encoder: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in missing if "num_batches_tracked" not in name]
    if missing:
        raise UsageError(f"{path.name} does not fit the encoder: it lacks {len(missing)} tensors, first {missing[0]}.")


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the two formats fail in a dozen ways
        raise UsageError(f"{path.name} cannot be read; set encoder.weights to a .pth or .safetensors file.") from error


def build_encoder(settings: EncoderSettings) -> Encoder:
    """The encoder that `settings` describe, frozen. Random weights come from the current torch seed.

    Raises UsageError when the name is unknown or the weights do not fit.
    """
    build = _mobilenet_v2 if settings.name == "mobilenet_v2" else _timm
    stages, channels = build(settings)
    scale = SYMMETRIC if settings.normalise == "symmetric" else IMAGENET
    return Encoder(stages, channels, *scale)


def save_encoder(folder: Path, settings: EncoderSettings) -> None:
    """Builds the encoder and writes config.json and encoder.safetensors; `load_encoder` needs nothing else."""
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        encoder = build_encoder(settings)
    save_file({name: x.contiguous() for name, x in encoder.state_dict().items()}, Path(folder) / "encoder.safetensors")
    kept = asdict(replace(settings, weights="random"))
    (Path(folder) / "config.json").write_text(json.dumps(kept, indent=1))


def load_encoder(folder: Path) -> Encoder:
    """The encoder that `save_encoder` wrote, on the CPU."""
    from safetensors.torch import load_file

    stored = json.loads((Path(folder) / "config.json").read_text())
    encoder = build_encoder(EncoderSettings(**{**stored, "stages": tuple(stored["stages"])}))
    encoder.load_state_dict(load_file(Path(folder) / "encoder.safetensors"))
    return encoder
