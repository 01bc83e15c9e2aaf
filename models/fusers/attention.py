"""Hierarchical interactive attention of SegMiF (arXiv 2308.02097): two modalities and semantics gate each other.

Channel attention: a context G of d x d per head, summed over all N tokens, so the cost is O(N C d).
    modality-oriented (MoMA)   queries from a modality, context from the semantics:  v_i = u_i G_s
    semantic-oriented (SoMA)   queries from the semantics, context from a modality:  z_i = y_s G_i
    x_i <- LayerNorm(x_i + W_i [z_i ; v_i])
The released sum K'V grows with N, so that its softmax saturates on large pictures; here K'V is divided by N, computed
in float32, and each head has a temperature. norm="sum" is the released form, for comparison.

Semantics may come on a coarser grid: then their tokens are projected and contracted there, and only the finished
W z_i is upsampled.

Legend: B batch, C channels, h heads, d = C / h, H W the modalities' grid, N tokens of a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UsageError
from models.fusers.precision import float32


class Context(nn.Module):
    """Tokens [B,N,C] -> G [B,h,d,d], each column a softmax over the key channels."""

    def __init__(self, width: int, heads: int, norm: str) -> None:
        super().__init__()
        self.heads, self.norm = heads, norm
        self.keys_values = nn.Linear(width, 2 * width, bias=False)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1)) if norm == "mean" else None

    def forward(self, tokens: Tensor) -> Tensor:
        keys, values = (split_heads(x, self.heads) for x in self.keys_values(tokens).chunk(2, -1))
        depth, count = keys.shape[-1], keys.shape[-2]
        with float32(tokens.device):
            keys, values = keys.float(), values.float()
            if self.norm == "mean":
                keys = keys / count
            logits = keys.transpose(-2, -1) @ values * depth**-0.5
            if self.temperature is not None:
                logits = logits * self.temperature
            return logits.softmax(-2)


class HierarchicalAttention(nn.Module):
    """width: C; heads: h; norm: "mean" or "sum"; paths: which of "semantic" (SoMA) and "modal" (MoMA) act."""

    def __init__(
        self, width: int, heads: int = 8, norm: str = "mean", paths: tuple[str, ...] = ("semantic", "modal")
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"{heads} heads do not divide {width} channels; choose a divisor.")
        if norm not in ("mean", "sum") or not set(paths) <= {"semantic", "modal"} or not paths:
            raise UsageError(f"No attention {norm!r} with {paths}; norm is mean or sum, paths are semantic and modal.")
        self.heads, self.paths = heads, tuple(paths)
        self.enter = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.context = nn.ModuleList(Context(width, heads, norm) for _ in range(3))
        self.leave = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, first: Tensor, second: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Modalities [B,C,H,W] twice, semantics [B,C,H',W'] -> both modalities [B,C,H,W]."""
        maps = (first, second, semantic)
        halves = [F.relu(enter(to_tokens(x))).chunk(2, -1) for enter, x in zip(self.enter, maps, strict=True)]
        of_semantics = self.context[2](halves[2][1]) if "modal" in self.paths else None
        out = []
        for i, x in enumerate((first, second)):
            of_semantic_weight, of_modal_weight = self.leave[i].weight.chunk(2, 1)
            total = to_tokens(x) + self.leave[i].bias
            if of_semantics is not None:
                total = total + F.linear(gate(halves[i][1], of_semantics), of_modal_weight)
            if "semantic" in self.paths:
                told = F.linear(gate(halves[2][0], self.context[i](halves[i][0])), of_semantic_weight)
                total = total + _on_grid(told, semantic, x)
            out.append(to_map(self.norm[i](total), x.shape[2:]))
        return out[0], out[1]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B,N,C] -> [B,h,N,d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def gate(queries: Tensor, context: Tensor) -> Tensor:
    """Tokens [B,N,C] through G [B,h,d,d] -> [B,N,C]."""
    heads = context.shape[1]
    return (split_heads(queries, heads) @ context.to(queries.dtype)).transpose(1, 2).flatten(2)


def to_tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,HW,C]."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: torch.Size) -> Tensor:
    """[B,HW,C] -> [B,C,H,W]."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def _on_grid(tokens: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Tokens of the grid of `source` as tokens of the grid of `target`, bilinear."""
    if source.shape[2:] == target.shape[2:]:
        return tokens
    coarse = to_map(tokens, source.shape[2:])
    return to_tokens(F.interpolate(coarse, target.shape[2:], mode="bilinear", align_corners=False))
