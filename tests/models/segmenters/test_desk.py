"""The desk: what it remembers changes no answer, and nothing is worked out twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.geometry import Canvas
from models.segmenters import desk as module
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.desk import Desk, Evidence, Question, answer
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.lessons import Lessons, MetaSettings
from models.views import FeatureBank, PseudoViews
from tests.models.drawn import SIZE, drawn_frames, drawn_translations, tiny_encoder

ANCHOR = ExpertSettings(base_width=16, anchored=AnchoredSettings(correction=False))
MEASURED = replace(ANCHOR, anchored=AnchoredSettings(correction=False, metric=8))
SETTINGS = MetaSettings(size=SIZE, expert=ANCHOR, min_pixels=40, batch=3, pool=4)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    frames = drawn_frames(tmp_path_factory.mktemp("frames"), train=30, test=2)
    return PseudoViews(frames, drawn_translations(tmp_path_factory.mktemp("synthetic"), frames))


@pytest.fixture
def desk(views):
    return Desk(FeatureBank(tiny_encoder(), views, Canvas(SIZE)))


def expert(views, settings=ANCHOR):
    torch.manual_seed(0)
    made = Expert((48, 192, 96), views.frames.base(0), 2, settings).eval()
    with torch.no_grad():
        for one in made.ensemble.learners:
            one.mix.copy_(torch.tensor([0.7, 0.4]))
            if one.metric:
                one.trust.fill_(0.5)
    return made


def asked(views, step=0, **changes):
    lesson = Lessons(views, 0, replace(SETTINGS, **changes))
    episodes, layers = lesson.batch(step, 0)
    return episodes, layers, lesson.novel, "ignore"


@pytest.mark.parametrize("settings", [
    ANCHOR, replace(ANCHOR, use_base=False), replace(ANCHOR, fusion="F1"),
    replace(ANCHOR, anchored=AnchoredSettings(width=4)), MEASURED,
])  # fmt: skip
@pytest.mark.parametrize("pseudo", [0.0, 1.0])
def test_the_short_way_and_the_long_way_agree(views, desk, monkeypatch, settings, pseudo):
    model, episodes = expert(views, settings), asked(views, pseudo_share=pseudo)
    short = desk.lay(model, 0, *episodes)
    assert isinstance(short, Evidence)
    answers = [answer(model, short)]
    monkeypatch.setattr(Expert, "reads_evidence_alone", False)
    long = desk.lay(model, 0, *episodes)
    assert isinstance(long, Question)
    answers.append(answer(model, long))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
    assert torch.equal(short.targets, long.targets) and torch.equal(short.own, long.own)
    assert (short.own == -1).all() == (pseudo == 1)


def test_an_episode_that_comes_again_is_not_worked_out_again(views, desk, monkeypatch):
    worked = []
    honest = module.evidence
    monkeypatch.setattr(module, "evidence", lambda *given: worked.append(1) or honest(*given))
    model = expert(views)
    first, _ = desk.ask(model, 0, *asked(views))
    count = len(worked)
    assert 0 < count <= 6
    again, _ = desk.ask(model, 0, *asked(views))
    other, _ = desk.beside().ask(expert(views), 1, *asked(views))
    assert len(worked) == count
    assert torch.equal(first.final, again.final) and torch.equal(first.streams, other.streams)


def test_a_desk_beside_has_base_maps_of_its_own(views, desk):
    model, other = expert(views), expert(views)
    torch.nn.init.constant_(other.base.classify.bias, 0)
    other.base.classify.bias.data[1] = 9.0
    first, second = desk.lay(model, 0, *asked(views)), desk.beside().lay(other, 0, *asked(views))
    assert torch.equal(first.maps, second.maps) and not torch.allclose(first.base, second.base)


def test_a_full_desk_still_answers(views):
    small, large = (Desk(FeatureBank(tiny_encoder(), views, Canvas(SIZE)), budget) for budget in (0, 1 << 30))
    model = expert(views)
    for step in range(2):
        found, expected = (one.ask(model, 0, *asked(views, step))[0].final for one in (small, large))
        assert torch.equal(found, expected)
    assert not small.shelf.held and large.shelf.held


def test_desks_beside_each_other_share_one_budget(views):
    first = Desk(FeatureBank(tiny_encoder(), views, Canvas(SIZE)), 300_000)
    second, model = first.beside(), expert(views)
    for step in range(4):
        (first, second)[step % 2].ask(model, 0, *asked(views, step))
    kept = [x[0] if isinstance(x, tuple) else x for x in second.shelf.held.values()]
    assert kept and sum(x.nbytes for x in kept) == first.shelf.bytes <= 300_000


def test_only_who_measures_is_given_features(views, desk):
    assert desk.lay(expert(views), 0, *asked(views)).shown is None
    shown = desk.lay(expert(views, MEASURED), 0, *asked(views)).shown
    assert [x.low.shape[:2] for x in shown.support] == [(3, 1), (3, 1)] and shown.mask.foreground.shape[:2] == (3, 1)


@pytest.mark.parametrize("settings", [ANCHOR, MEASURED])
def test_gradients_reach_the_learners_and_nothing_else(views, desk, settings):
    model = expert(views, settings).train()
    out, _ = desk.ask(model, 0, *asked(views))
    out.final.square().mean().backward()
    assert all(one.mix.grad.abs().sum() > 0 for one in model.ensemble.learners)
    assert all(p.grad is None for p in model.base.parameters())
    learnt = [p.grad for one in model.ensemble.learners if one.metric for p in one.metric.parameters()]
    assert all(gradient.abs().sum() > 0 for gradient in learnt) and bool(learnt) == (settings == MEASURED)
