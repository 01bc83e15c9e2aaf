"""The loss of a batch, and how an expert starts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.segmenters.episodes import gather
from models.segmenters.fusion import EnsembleOut
from models.segmenters.lessons import Lessons
from models.segmenters.pspnet import PSPNet
from tasks.train_meta import ensemble_loss, fresh_expert, segmentation_loss
from tests.models.drawn import META, SIZE, drawn_bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return drawn_bank(tmp_path_factory.mktemp("bank"), test=2)


# ---- losses


def logits_like(bank, episodes, layers, lesson, policy="ignore"):
    batch = gather(bank, episodes, layers, lesson.novel, policy)
    generator = torch.Generator().manual_seed(0)
    third = tuple(side // 3 for side in SIZE)
    streams = torch.randn(4, 2, 2, *third, generator=generator).requires_grad_()
    final = torch.randn(4, 2, *third, generator=generator).requires_grad_()
    return batch, EnsembleOut(final, streams, torch.zeros(4, 2), streams.detach())


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_novel_pixels_send_no_gradient_under_ignore(bank, weights):
    settings = replace(META, jaccard_weight=weights[0], entropy_weight=weights[1])
    lesson, tried = Lessons(bank.views, 0, settings), 0
    for step in range(10):
        episodes, layers = lesson.batch(step, 0)
        batch, out = logits_like(bank, episodes, layers, lesson)
        ensemble_loss(out, batch.targets, torch.tensor([e.label for e in episodes]), settings).backward()
        for b, e in enumerate(episodes):
            label = bank.views.frames.label(e.query)
            novel = torch.from_numpy(np.isin(label, lesson.novel).astype(np.uint8))
            novel = nn.functional.interpolate(novel[None, None], out.final.shape[-2:], mode="nearest-exact")[0, 0] > 0
            for grad in (out.final.grad[b], out.streams.grad[b, 0], out.streams.grad[b, 1]):
                assert (grad[:, novel] == 0).all() and grad.abs().sum() > 0
            tried += int(novel.sum())
    assert tried > 0


def test_the_ensemble_loss_adds_every_streams_own(bank):
    lesson = Lessons(bank.views, 0, META)
    episodes, layers = lesson.batch(0, 0)
    batch, out = logits_like(bank, episodes, layers, lesson)
    group = torch.tensor([e.label for e in episodes])
    small = nn.functional.interpolate(batch.targets, out.final.shape[-2:], mode="nearest-exact")
    each = [segmentation_loss(out.streams[:, v], small[v], group, 1.0, 0.3) for v in range(2)]
    expected = segmentation_loss(out.final, small[0], group, 1.0, 0.3) + 0.25 * sum(each)
    settings = replace(META, jaccard_weight=1.0, entropy_weight=0.3, stream_weight=0.25)
    assert torch.allclose(ensemble_loss(out, batch.targets, group, settings), expected)


def test_an_expert_takes_over_the_base_learner_of_its_fold(bank, tmp_path):
    frames = bank.views.frames
    for fold in (0, 1):
        torch.manual_seed(fold)
        base = PSPNet((48, 192, 96), len(frames.base(fold)), 24)
        save_file(base.state_dict(), tmp_path / f"fold{fold}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"width": 24}))
    expert = fresh_expert(frames, 1, bank.encoder, META, tmp_path)
    assert expert.base.width == 24 and expert.base_classes == frames.base(1)
    assert all(torch.equal(x, base.state_dict()[name]) for name, x in expert.base.state_dict().items())
    assert not any(p.requires_grad for p in expert.base.parameters())
    assert all(p.requires_grad for p in expert.ensemble.parameters()) and len(expert.ensemble.learners) == 2
