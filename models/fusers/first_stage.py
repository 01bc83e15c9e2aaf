"""Stage I of SGDFuse (arXiv 2508.05264): a first fused picture, without masks and without diffusion.

Infrared features pass through a multi-scale block (MSFEM), visible ones through transformer blocks; each then attends
to the other, and both are joined. The paper names these parts; their insides are ours where it does not say: attention
is between channels (Zamir et al. 2022), which is linear in the number of pixels and, because queries and keys are
normalised over space, does not depend on it.

Legend: B batch, C width, H W height and width (multiples of fold), r fold, d = C / heads; pictures are in [-1,1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fusers.anchors import ANCHORS
from models.fusers.precision import float32


class MultiScale(nn.Module):
    """MSFEM: convolutions of 1, 3, 5 and 7 pixels side by side; what they find is weighed and added to the input.

    variant "channel": added content times one weight per channel, from its mean and its maximum. "released": the
    weights themselves are added, per pixel, as in the released code.
    """

    def __init__(self, channels: int, width: int, variant: str = "channel") -> None:
        super().__init__()
        self.variant = variant
        self.scales = nn.ModuleList(nn.Conv2d(channels, width, k, padding=k // 2) for k in (1, 3, 5, 7))
        self.enhance = nn.Sequential(
            nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width),
            nn.Conv2d(3 * width, width, 1),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
        )
        self.leave = nn.Conv2d(2 * width, channels, 1)
        if variant == "channel":
            hidden = max(4, channels // 4)
            self.weigh = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B,c,h,w] -> [B,c,h,w]."""
        fine, *coarse = (scale(x) for scale in self.scales)
        found = torch.cat([self.enhance(torch.cat(coarse, 1)), fine], 1)
        if self.variant == "released":
            return x + self.leave(found).sigmoid()
        added = self.leave(F.gelu(found))
        weight = self.weigh(added.mean((2, 3), keepdim=True)) + self.weigh(added.amax((2, 3), keepdim=True))
        return x + weight.sigmoid() * added


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelAttention(nn.Module):
    """softmax(τ Q̂ K̂') V per head, a d x d map; queries from one picture, keys and values from another or the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries = _pointwise_depthwise(width, width)
        self.keys_values = _pointwise_depthwise(width, 2 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.leave = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """[B,C,h,w] twice -> [B,C,h,w]."""
        query = self._heads(self.queries(x))
        key, value = (self._heads(part) for part in self.keys_values(other).chunk(2, 1))
        with float32(x.device):
            query, key = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
            weights = (self.temperature * (query @ key.transpose(-2, -1))).softmax(-1)
        out = weights.to(value.dtype) @ value
        return self.leave(out.flatten(1, 2).unflatten(2, x.shape[2:]))

    def _heads(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,heads,d,hw]."""
        return x.flatten(2).unflatten(1, (self.heads, -1))


class Block(nn.Module):
    """Channel attention and a gated feed-forward network, each behind a norm and with its input added."""

    def __init__(self, width: int, heads: int, expansion: float = 2.66) -> None:
        super().__init__()
        hidden = int(width * expansion)
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(2))
        self.attention = ChannelAttention(width, heads)
        self.enter, self.leave = _pointwise_depthwise(width, 2 * hidden), nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x [B,C,h,w] attends to `other`, or to itself -> [B,C,h,w]."""
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed if other is None else self.norms[0](other))
        gate, content = self.enter(self.norms[1](x)).chunk(2, 1)
        return x + self.leave(F.gelu(gate) * content)


class FirstStage(nn.Module):
    """Infrared and visible -> F1.

    width, heads    C and the heads of every attention
    blocks          transformer blocks on the visible features, and on the joined ones
    fold            r: side of the pixel blocks that are folded into channels
    channels        1: a luminance; 3: a colour picture
    anchor          what the last convolution, which starts at zero, is added to: a learnt "blend" of the pair, or one
                    of `ANCHORS`, without a tanh, which would hold dark scenes in their place
    """

    def __init__(
        self, width: int = 48, heads: int = 4, blocks: Sequence[int] = (4, 2), fold: int = 1, channels: int = 1,
        anchor: str = "blend",
    ) -> None:
        super().__init__()
        self.fold, self.channels, self.anchor = fold, channels, anchor
        self.enter = nn.ModuleList(nn.Conv2d(c * fold**2, width, 3, padding=1) for c in (1, 3))
        self.infrared = nn.Sequential(*(MultiScale(width, width // 2) for _ in range(2)))
        self.visible = nn.Sequential(*(Block(width, heads) for _ in range(blocks[0])))
        self.cross = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.join = nn.Conv2d(2 * width, width, 1)
        self.joined = nn.Sequential(*(Block(width, heads) for _ in range(blocks[1])))
        self.leave = nn.Conv2d(width, channels * fold**2, 3, padding=1)
        self.share = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.leave.weight), nn.init.zeros_(self.leave.bias)

    def forward(self, infrared: Tensor, visible: Tensor, base: Tensor) -> Tensor:
        """infrared [B,1,H,W], visible [B,3,H,W], base (luminance or visible) [B,channels,H,W] -> F1, as base."""
        folded = (F.pixel_unshuffle(x, self.fold) for x in (infrared, visible))
        a, b = (enter(x) for enter, x in zip(self.enter, folded, strict=True))
        a, b = self.infrared(a), self.visible(b)
        a, b = self.cross[0](a, b), self.cross[1](b, a)
        drawn = F.pixel_shuffle(self.leave(self.joined(self.join(torch.cat([a, b], 1)))), self.fold)
        if self.anchor != "blend":
            return drawn + ANCHORS[self.anchor](infrared.expand_as(base), base)
        share = self.share.sigmoid()
        return (drawn + before_tanh(share * infrared + (1 - share) * base)).tanh()


def before_tanh(picture: Tensor) -> Tensor:
    """What the tanh turns back into the picture."""
    return picture.float().clamp(-0.999, 0.999).atanh().to(picture.dtype)


def _pointwise_depthwise(source: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(source, target, 1), nn.Conv2d(target, target, 3, padding=1, groups=target))
