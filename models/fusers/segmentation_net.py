"""A segmentation network whose encoder can stop early: SegFormer (Xie et al. 2021), or its head on any encoder.

The encoder is a Mix Transformer of `transformers` built from numbers, torchvision's mobilenet_v2, or any classifier of
timm with strides 4, 8, 16 and 32. Weights are a file of the user's; there is nothing to download.

Legend: B batch, K classes, H W height and width (32 or more), c_i channels of stage i at 1/4, 1/8, 1/16 and 1/32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import IMAGENET, SYMMETRIC
from models.encoders import load_weights
from models.errors import UsageError

STRIDES = (4, 8, 16, 32)


class MixTransformer(nn.Module):
    """MiT: widths and depths (64, 128, 320, 512) and (3, 4, 18, 3) are B3, (32, 64, 160, 256) and (2, 2, 2, 2) B0."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerModel

        config = SegformerConfig(
            hidden_sizes=list(widths), depths=list(depths), sr_ratios=[8, 4, 2, 1], drop_path_rate=0.1,
            num_attention_heads=[w // widths[0] if w % widths[0] == 0 else 1 for w in widths],
        )  # fmt: skip
        self.stages, self.channels = SegformerModel(config).stages, tuple(widths)

    def forward(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        out = []
        for stage in self.stages[:stages]:
            x = stage(x)
            out.append(x)
        return out


class MobileNet(nn.Module):
    """torchvision's mobilenet_v2 in four pieces."""

    channels = (24, 32, 96, 320)

    def __init__(self, weights: str) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2

        whole = mobilenet_v2()
        load_weights(whole, weights)
        self.stages = nn.ModuleList(whole.features[start:stop] for start, stop in ((0, 4), (4, 7), (7, 14), (14, 18)))

    forward = MixTransformer.forward


class Timm(nn.Module):
    """A classifier of timm, without its head."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name):
            raise UsageError(f"There is no encoder {name!r}; choose mit, mobilenet_v2 or a timm name.")
        self.network = timm.create_model(name, num_classes=0)
        info = {entry["reduction"]: (i, entry["num_chs"]) for i, entry in enumerate(self.network.feature_info)}
        if not set(STRIDES) <= set(info) or not hasattr(self.network, "forward_intermediates"):
            raise UsageError(f"{name} has the strides {sorted(info)}; choose an encoder with 4, 8, 16 and 32.")
        load_weights(self.network, weights)
        self.indices, self.channels = zip(*(info[stride] for stride in STRIDES), strict=True)

    def forward(self, x: Tensor, stages: int = 4) -> list[Tensor]:
        wanted = list(self.indices[:stages])
        return self.network.forward_intermediates(x, indices=wanted, stop_early=True, intermediates_only=True)


class Head(nn.Module):
    """SegFormer's: every stage to one width, to 1/4, joined."""

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.join = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.1)
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[B,c_i,h_i,w_i] each -> [B,K,H/4,W/4]."""
        size = features[0].shape[2:]
        maps = [enter(x) for enter, x in zip(self.enter, features, strict=True)]
        maps = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
        return self.classify(self.join(torch.cat(maps, 1)))


class SegmentationNet(nn.Module):
    """Pictures -> logits, with one normalisation for every use of the encoder.

    encoder     "mit" (with widths and depths), "mobilenet_v2" or a name of timm
    weights     "random", or a state-dict file of the encoder
    normalise   "imagenet" or "symmetric" (x / 127.5 - 1)
    head_width  256 as in SegMiF; the official B3 has 768
    """

    def __init__(
        self,
        classes: int,
        encoder: str = "mit",
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 18, 3),
        weights: str = "random",
        normalise: str = "imagenet",
        head_width: int = 256,
    ) -> None:
        super().__init__()
        if encoder == "mit":
            self.encoder = MixTransformer(widths, depths)
            load_weights(self.encoder, weights)
        else:
            self.encoder = MobileNet(weights) if encoder == "mobilenet_v2" else Timm(encoder, weights)
        self.channels = tuple(self.encoder.channels)
        self.head = Head(self.channels, classes, head_width)
        mean, deviation = SYMMETRIC if normalise == "symmetric" else IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor, stages: int = 4) -> list[Tensor]:
        """[B,3,H,W] in 0..1 -> the first `stages` feature maps; the encoder computes no more than those."""
        return self.encoder((images - self.mean) / self.deviation, stages)

    def forward(self, images: Tensor) -> Tensor:
        """[B,3,H,W] in 0..1 -> logits [B,K,H,W]."""
        logits = self.head(self.features(images))
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
