"""The four kinds of network of SynDiff (Özbey et al. 2023), for any channel counts and any image size.

Legend: B batch, c channels, H W height and width (multiples of the network's stride), T number of diffusion steps.
Written from the equations and tables; the residual blocks of the diffusive generator are those of diffusers.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F


class DiffusiveGenerator(nn.Module):
    """G^d: noisy target and clean source -> clean target, in one shot.

    The source is concatenated to the noisy target; the step index enters as a time embedding, and the latent z, after
    pixel normalisation and an MLP, is added to it and scales and shifts every group norm (adaptive group norm).

    channels    UNet widths, from the finest level to the coarsest
    layers      residual blocks per level
    patch       side of the pixel blocks that are folded into channels before the UNet; 1 is the paper's
    attention   self-attention at the last level but one and at the bottleneck, as in the paper
    identity_start  what the UNet says (at first: nothing) is added to the source's channel mean before the final
                    tanh, so that training starts from the source. Not in the paper; it saves most of a short budget.
    """

    def __init__(
        self,
        source: int,
        target: int,
        channels: tuple,
        layers: int = 2,
        patch: int = 1,
        attention: bool = True,
        latent: int = 100,
        identity_start: bool = False,
    ):
        super().__init__()
        self.patch, self.target, self.latent, self.identity_start = patch, target, latent, identity_start
        self.stride = patch * 2 ** (len(channels) - 1)
        width = 4 * channels[0]
        dense = [PixelNorm(), nn.Linear(latent, width), nn.SiLU()]
        self.mapping = nn.Sequential(*dense, *[m for _ in range(3) for m in (nn.Linear(width, width), nn.SiLU())])
        down = ["ResnetDownsampleBlock2D"] * len(channels)
        up = ["ResnetUpsampleBlock2D"] * len(channels)
        if attention and len(channels) > 1:
            down[-2], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.unet = UNet2DModel(
            in_channels=(source + target) * patch**2,
            out_channels=target * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            downsample_type="resnet",
            upsample_type="resnet",
            add_attention=attention,
            attention_head_dim=_divisor(channels, 8),
            norm_num_groups=_divisor(channels, 16),
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        )
        if identity_start:
            nn.init.zeros_(self.unet.conv_out.weight)
            nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, noisy: Tensor, source: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """noisy [B,c_target,H,W], source [B,c_source,H,W] in [-1,1], t [B] long, z [B,latent] -> [B,c_target,H,W]."""
        folded = F.pixel_unshuffle(torch.cat([noisy, source], 1), self.patch)
        folded = self.unet(folded, t, class_labels=self.mapping(z)).sample
        drawn = F.pixel_shuffle(folded, self.patch)
        return (drawn + _before_tanh(source) if self.identity_start else drawn).tanh()


def _before_tanh(source: Tensor) -> Tensor:
    """What the tanh turns back into the channel mean of the source."""
    return source.mean(1, keepdim=True).clamp(-0.99, 0.99).atanh()


class PixelNorm(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


class CycleGenerator(nn.Module):
    """G^n: one domain -> the other, without diffusion: the ResNet generator of CycleGAN (Zhu et al. 2017).

    Its transposed convolutions have kernel 4 instead of 3, which draws no checkerboards.

    identity_start  as above
    """

    stride = 4

    def __init__(self, source: int, target: int, width: int = 64, blocks: int = 6, identity_start: bool = False):
        super().__init__()
        self.target, self.identity_start = target, identity_start
        norm = nn.InstanceNorm2d
        parts = [nn.ReflectionPad2d(3), nn.Conv2d(source, width, 7), norm(width), nn.ReLU(True)]
        for c in (width, 2 * width):
            parts += [nn.Conv2d(c, 2 * c, 3, 2, 1), norm(2 * c), nn.ReLU(True)]
        parts += [ResidualBlock(4 * width) for _ in range(blocks)]
        for c in (4 * width, 2 * width):
            parts += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1), norm(c // 2), nn.ReLU(True)]
        self.body = nn.Sequential(*parts, nn.ReflectionPad2d(3), nn.Conv2d(width, target, 7))
        self.apply(_normal_start)

    def forward(self, source: Tensor) -> Tensor:
        """[B,c_source,H,W] -> [B,c_target,H,W], both in [-1,1]."""
        drawn = self.body(source)
        if self.identity_start:
            drawn = drawn + _before_tanh(source)
        return drawn.tanh()


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        conv = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.body = nn.Sequential(*conv, nn.ReLU(True), *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PatchDiscriminator(nn.Sequential):
    """D^n: [B,c,H,W] -> [B,1,h,w] logits, one per overlapping patch (70 x 70 pixels with three layers).

    norm    instance norms, as in the paper; they hide brightness and colour, which a short training has to learn first
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3, norm: bool = True):
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for i in range(layers):
            before, after = width * min(2**i, 8), width * min(2 ** (i + 1), 8)
            stride = 2 if i < layers - 1 else 1
            normed = [nn.InstanceNorm2d(after)] if norm else []
            parts += [nn.Conv2d(before, after, 4, stride, 1), *normed, nn.LeakyReLU(0.2, True)]
        super().__init__(*parts, nn.Conv2d(after, 1, 4, 1, 1))
        self.apply(_normal_start)


class DiffusiveDiscriminator(nn.Module):
    """D^d: is x_t a real predecessor of x_{t+1}? [B,c,H,W] twice and t [B] -> [B] logits.

    channels    width of the stem, then of each halving block (blur [1,3,3,1] and stride 2, Karras et al. 2020)
    """

    def __init__(self, channels_in: int, channels: tuple = (128, 256, 512, 512, 512, 512, 512), embedding: int = 256):
        super().__init__()
        self.embedding = embedding
        act = nn.LeakyReLU(0.2)
        self.time = nn.Sequential(nn.Linear(embedding, embedding), act, nn.Linear(embedding, embedding), act)
        self.stem = nn.Conv2d(2 * channels_in, channels[0], 1)
        self.blocks = nn.ModuleList(HalvingBlock(a, b, embedding) for a, b in pairwise(channels))
        self.last = nn.Sequential(nn.Conv2d(channels[-1] + 1, channels[-1], 3, padding=1), act)
        self.head = nn.Linear(channels[-1], 1)

    def forward(self, x: Tensor, x_next: Tensor, t: Tensor) -> Tensor:
        time = self.time(sinusoids(t, self.embedding))
        h = F.leaky_relu(self.stem(torch.cat([x, x_next], 1)), 0.2)
        for block in self.blocks:
            h = block(h, time)
        h = self.last(torch.cat([h, batch_deviation(h)], 1))
        return self.head(h.sum((2, 3)))[:, 0]


class HalvingBlock(nn.Module):
    def __init__(self, before: int, after: int, embedding: int):
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.time = nn.Linear(embedding, after)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1, bias=False)
        tap = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", tap[:, None] * tap[None, :], persistent=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x) + self.time(time)[:, :, None, None], 0.2)
        h = F.leaky_relu(self.second(self._halve(h)), 0.2)
        return (h + self.skip(self._halve(x))) / math.sqrt(2)

    def _halve(self, x: Tensor) -> Tensor:
        kernel = self.blur.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def batch_deviation(h: Tensor) -> Tensor:
    """One map [B,1,H,W]: the mean deviation within groups of at most 4 images (any batch size, Karras et al. 2018)."""
    b, _, height, width = h.shape
    group = max(n for n in range(1, 5) if b % n == 0)
    groups = h.reshape(group, b // group, -1).float()
    deviation = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean(1)
    return deviation.repeat(group).to(h.dtype)[:, None, None, None].expand(b, 1, height, width)


def sinusoids(t: Tensor, size: int) -> Tensor:
    """The usual sinusoidal embedding [B,size] of the integer step t [B]."""
    frequency = torch.exp(torch.arange(size // 2, device=t.device) * (-math.log(10000) / (size // 2 - 1)))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def _divisor(channels: tuple, most: int) -> int:
    """The largest number of groups up to `most` that divides every width."""
    shared = math.gcd(*channels)
    return max(n for n in range(1, most + 1) if shared % n == 0)


def _normal_start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)
