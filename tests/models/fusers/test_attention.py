"""Channel attention that does not know the picture's size, and its switches."""

from __future__ import annotations

import pytest
import torch

from models.errors import UsageError
from models.fusers.attention import Context, HierarchicalAttention, to_map, to_tokens


def build(**changes) -> HierarchicalAttention:
    torch.manual_seed(0)
    return HierarchicalAttention(**{"width": 16, "heads": 4, **changes})


def maps(batch: int = 2, side: int = 6, width: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, width, side, side + 2) for _ in range(3)]


def strong(module: torch.nn.Module, factor: float = 20.0) -> torch.nn.Module:
    """Weights large enough to see what attention does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


def test_tiling_the_picture_changes_no_context():
    tokens = torch.rand(1, 48, 16)
    for norm, alike in (("mean", True), ("sum", False)):
        torch.manual_seed(0)
        context = strong(Context(16, 4, norm), 3.0)
        once, four_times = context(tokens), context(tokens.repeat(1, 4, 1))
        assert torch.allclose(once, four_times, atol=1e-5) == alike
        torch.testing.assert_close(once.sum(-2), torch.ones(1, 4, 4))


def test_the_sum_saturates_where_the_mean_does_not():
    tokens = torch.rand(1, 20_000, 16)
    peaks = {}
    for norm in ("mean", "sum"):
        torch.manual_seed(0)
        peaks[norm] = Context(16, 4, norm)(tokens).amax(-2).mean().item()
    assert peaks["sum"] > 0.9 and peaks["mean"] < 0.5


def test_it_is_the_equations_on_one_head():
    net = strong(build(width=4, heads=1), 4.0).double()
    first, second, semantic = (x.double() for x in maps(1, 3, 4))
    tokens = [x.flatten(2).transpose(1, 2)[0] for x in (first, second, semantic)]
    halves = [(t @ e.weight.T + e.bias).relu() for t, e in zip(tokens, net.enter, strict=True)]
    y, u = [h[:, :4] for h in halves], [h[:, 4:] for h in halves]

    def context(i, t):
        kv = t @ net.context[i].keys_values.weight.T
        return ((kv[:, :4].T @ kv[:, 4:] / len(t)) / 2 * net.context[i].temperature.item()).softmax(0)

    for i, out in enumerate(net(first, second, semantic)):
        z, v = y[2] @ context(i, y[i]), u[i] @ context(2, u[2])
        total = tokens[i] + torch.cat([z, v], 1) @ net.leave[i].weight.T + net.leave[i].bias
        torch.testing.assert_close(to_tokens(out)[0], net.norm[i](total), atol=1e-5, rtol=1e-4)


def test_each_path_acts_alone():
    inputs = maps()
    both, semantic, modal = (
        strong(build(paths=paths))(*inputs)[0] for paths in (("semantic", "modal"), ("semantic",), ("modal",))
    )
    assert not torch.allclose(both, semantic, atol=1e-3) and not torch.allclose(both, modal, atol=1e-3)
    changed = [inputs[0], inputs[1] + 1, inputs[2]]
    assert torch.allclose(strong(build(paths=("modal",)))(*changed)[0], modal), "MoMA knows no other modality"


def test_semantics_may_be_coarser():
    first, second, semantic = maps(side=8)
    net = strong(build())
    coarse = net(first, second, semantic[..., ::2, ::2])
    assert coarse[0].shape == first.shape
    flat = semantic.mean((2, 3), keepdim=True)
    same = net(first, second, flat.expand_as(semantic)), net(first, second, flat.expand(-1, -1, 4, 5))
    torch.testing.assert_close(same[0][0], same[1][0], atol=1e-4, rtol=1e-4)


def test_tokens_there_and_back():
    x = maps()[0]
    assert torch.equal(to_map(to_tokens(x), x.shape[2:]), x)


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"norm": "max"}, {"paths": ()}, {"paths": ("spatial",)}])
def test_what_does_not_fit_is_told(wrong):
    with pytest.raises(UsageError, match=r"choose a divisor|norm is mean or sum"):
        build(**wrong)


def test_half_precision_bears_large_pictures():
    net = build(norm="sum").bfloat16()
    out = net(*(100 * x.bfloat16() for x in maps(side=64)))
    assert all(torch.isfinite(x).all() and x.dtype == torch.bfloat16 for x in out)
