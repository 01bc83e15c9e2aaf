"""Two drawn classes are told apart by one example, and a stream of noise does no harm (GenFusion spec §10, test 14)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from models.backbone import Features
from models.geometry import enlarge
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.msanet import MSANetSettings
from models.views import encode
from tests.models.drawn import tiny_encoder

SIDE, FRAMES, BATCH, STEPS = 96, 12, 4, 300
SETTINGS = ExpertSettings(
    base_width=16, learner="msanet", use_base=False,
    msanet=MSANetSettings(width=32, similarity_width=8, multi_sim=False, rates=(1, 2), dropout=0.0),
)  # fmt: skip


def scenes():
    """Infrared pictures [F, 1, S, S] of a bright blob (1) and a bar of fine stripes (2), and their labels."""
    generator = torch.Generator().manual_seed(0)
    pictures = 0.3 + 0.02 * torch.randn(FRAMES, 1, SIDE, SIDE, generator=generator)
    labels = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.uint8)
    stripes = (torch.arange(SIDE) // 4 % 2).float()
    for n in range(FRAMES):
        top, left, row = (8 * int(torch.randint(0, high, (), generator=generator)) for high in (4, 9, 4))
        labels[n, top : top + 24, left : left + 24] = 1
        labels[n, 56 + row // 4 * 4 : 72 + row // 4 * 4, 8:88] = 2
        pictures[n, 0, labels[n] == 1] += 0.5
        pictures[n, 0] += 0.6 * stripes * (labels[n] == 2)
    return pictures.clamp(0, 1), labels


def episodes(step, labels):
    """Queries, supports and the class asked for, [B] each."""
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(FRAMES, generator=generator)
    wanted = torch.randint(1, 3, (BATCH,), generator=generator).to(torch.uint8)
    return order[:BATCH], order[BATCH : 2 * BATCH], wanted


def iou(expert, streams, labels):
    """Of all queries with one support each, and both classes."""
    both, either = 0, 0
    for wanted in (1, 2):
        query, support = torch.arange(FRAMES), torch.arange(FRAMES).roll(1)
        final = answers(expert, streams, labels, query, support, torch.full((FRAMES,), wanted))
        said = {"fusion": final.final, **{v: final.streams[:, v] for v in range(len(streams))}}
        said = torch.stack([enlarge(x, (SIDE, SIDE)).argmax(1) == 1 for x in said.values()])
        truth = labels == wanted
        both, either = both + (said & truth).sum((1, 2, 3)), either + (said | truth).sum((1, 2, 3))
    return (both / either).tolist()


def answers(expert, streams, labels, query, support, wanted):
    masks = (labels[support] == wanted[:, None, None]).to(torch.uint8)[:, None]
    asked = [Features(*(level[query] for level in stream)) for stream in streams]
    shown = [Features(*(level[support][:, None] for level in stream)) for stream in streams]
    return expert(asked, shown, masks)


@pytest.mark.parametrize("fusion", ["F1", "F2"])
def test_blobs_and_bars_are_learnt_and_noise_is_survived(fusion):
    pictures, labels = scenes()
    noise = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(1))
    seen = [encode(tiny_encoder(), x.expand(-1, 3, -1, -1)) for x in (pictures, noise)]
    streams = [Features(*(level.clone() for level in levels)) for levels in seen]
    torch.manual_seed(0)
    expert = Expert((48, 192, 96), (1, 2), 2, ExpertSettings(**{**vars(SETTINGS), "fusion": fusion}))
    learners, fusion_weights = expert.ensemble.learners.parameters(), expert.ensemble.fusion.parameters()
    optimiser = torch.optim.Adam([{"params": learners, "lr": 6e-3}, {"params": fusion_weights, "lr": 5e-2}])
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, STEPS)
    for step in range(STEPS):
        query, support, wanted = episodes(step, labels)
        out = answers(expert, streams, labels, query, support, wanted)
        target = (labels[query] == wanted[:, None, None]).long()[:, None].float()
        target = interpolate(target, (SIDE // 3, SIDE // 3), mode="nearest-exact")[:, 0].long()
        logits = [out.final, *out.streams.unbind(1)]
        loss = sum(torch.nn.functional.cross_entropy(enlarge(x, (SIDE, SIDE), 3), target) for x in logits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        fused, infrared, blind = iou(expert.eval(), streams, labels)
    assert infrared > 0.9 and blind < 0.6, (fused, infrared, blind)
    assert fused >= infrared - 0.02, f"fusion {fused:.3f}, infrared alone {infrared:.3f}"
