"""What the meta learners are asked, shown and judged by: base classes, and of those the held-out ones for selection."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import UsageError
from models.frames import layer_name
from models.segmenters import lessons as lessons_module
from models.segmenters.desk import Desk
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert
from models.segmenters.lessons import SELECTIONS, Best, Lessons, MetaSettings, courses, held_out_score
from models.segmenters.prototype import Prototype
from models.segmenters.similarity import soft_mask, to_grid
from models.views import PSEUDO, STREAMS, PseudoViews, Stream
from tests.models.drawn import EXPERT, META, SIZE, drawn_bank

FOLDS, STEPS = (0, 1, 2, 3), range(10)
ALL_LAYERS = ("infrared", "lightness", "rgb", "rgb_lightness")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return drawn_bank(tmp_path_factory.mktemp("bank"), test=8)


def lessons(bank, fold=0, **changes):
    return Lessons(bank.views, fold, replace(META, **changes))


def asked(lesson):
    """Training episodes of some steps and ranks, and those of validation."""
    return [e for step in STEPS for rank in (0, 1) for e in lesson.batch(step, rank)[0]], lesson.validation()


# ---- lessons


@pytest.mark.parametrize("policy", ["ignore", "background", "drop"])
@pytest.mark.parametrize("fold", FOLDS)
def test_no_novel_class_is_asked_for_and_held_out_ones_are_not_trained(bank, fold, policy):
    frames = bank.views.frames
    lesson = lessons(bank, fold, novel_in_train=policy, min_pixels=1)
    training, validation = asked(lesson)
    assert {*lesson.classes, *lesson.held_out} == set(frames.base(fold)) and len(lesson.held_out) == 2
    assert {e.label for e in training} <= set(lesson.classes)
    assert {e.label for e in validation} <= set(lesson.held_out)
    for e in (*training, *validation):
        shown = [e.query, *e.supports]
        assert len(set(shown)) == 2 and all(frames.split(id) == "train" for id in shown)
        if policy == "drop":
            assert all(set(frames.novel(fold)).isdisjoint(frames.pixels(id)) for id in shown)


@pytest.mark.parametrize("policy, hidden", [("ignore", 255), ("background", 0)])
@pytest.mark.parametrize("fold", FOLDS)
def test_no_novel_pixel_is_ever_an_object(bank, fold, policy, hidden):
    """Masks and targets of whole batches against the true labels, on real and on synthetic layers."""
    frames, seen = bank.views.frames, 0
    lesson = lessons(bank, fold, novel_in_train=policy)
    for step in STEPS:
        episodes, layers = lesson.batch(step, 0)
        batch = gather(bank, episodes, layers, lesson.novel, policy)
        for b, e in enumerate(episodes):
            pairs = [(e.query, target[b]) for target in batch.targets]
            pairs += list(zip(e.supports, batch.masks[b], strict=True))
            for id, mask in pairs:
                novel = np.isin(frames.label(id), frames.novel(fold))
                assert (mask.numpy()[novel] == hidden).all()
                seen += novel.sum()
    assert seen > 0, "no frame showed a novel class: nothing was tried"


def test_a_batch_is_a_function_of_seed_fold_step_and_rank(bank):
    first, second = lessons(bank), lessons(bank)
    for step in reversed(STEPS):
        second.batch(step, 1), second.validation()
    assert all(first.batch(step, rank) == second.batch(step, rank) for step in STEPS for rank in (0, 1))
    assert first.validation() == second.validation()
    batches = [
        str(lesson.batch(step, rank)[0])
        for lesson in (first, lessons(bank, seed=1), lessons(bank, fold=1)) for step in (0, 1) for rank in (0, 1)
    ]
    assert len(set(batches)) == 12


def test_episodes_of_a_batch_and_of_its_neighbours_differ(bank):
    drawn = [(e.label, e.query, e.supports) for step in STEPS for e in lessons(bank).batch(step, 0)[0]]
    assert len(set(drawn)) > 0.8 * len(drawn)


def test_stand_ins_take_the_place_of_all_streams_together(bank):
    layers = {share: [tuple(lessons(bank, stand_in=share).batch(step, 0)[1]) for step in range(60)]
              for share in (0.0, 0.5, 1.0)}
    assert set(layers[0.0]) == {("infrared", "rgb")} and set(layers[1.0]) == {("lightness", "rgb_lightness")}
    assert set(layers[0.5]) == {*layers[0.0], *layers[1.0]} and 15 < layers[0.5].count(("infrared", "rgb")) < 45
    alone = lessons(bank, streams=(Stream("rgb", "rgb"),), stand_in=1.0)
    assert alone.batch(0, 0)[1] == ["rgb"], "a stream without a stand-in stands for itself"


def test_validation_asks_each_held_out_class_equally_often(bank):
    lesson = lessons(bank, validation=3)
    assert [e.label for e in lesson.validation()] == [c for c in lesson.held_out for _ in range(3)]
    assert len(set(lesson.validation())) > 3


def test_a_frame_that_lacks_a_layer_is_left_out(bank, tmp_path):
    """Such as one that was quarantined in synthesis."""
    partly = PseudoViews(bank.views.frames, shutil.copytree(bank.views.synthetic, tmp_path / "synthetic"))
    gone = bank.views.frames.ids("train")[::2]
    for id, layer in zip(gone, cycle(ALL_LAYERS[1:]), strict=False):
        (partly.synthetic / layer_name(id, layer)).unlink()
    training, validation = asked(Lessons(partly, 0, replace(META, min_pixels=1)))
    assert not set(gone) & {id for e in (*training, *validation) for id in (e.query, *e.supports)}
    with pytest.raises(UsageError, match="No base class has 2 frames"):
        Lessons(PseudoViews(bank.views.frames), 0, META).batch(0, 0)


def test_a_pool_is_asked_again_and_again(bank):
    lesson = lessons(bank, pool=3)
    drawn = {(e.label, e.query, e.supports) for step in range(60) for e in lesson.batch(step, 0)[0]}
    assert len(lesson.classes) < len(drawn) <= 3 * len(lesson.classes)
    others = lessons(bank, pool=3, seed=1)
    assert drawn != {(e.label, e.query, e.supports) for step in range(60) for e in others.batch(step, 0)[0]}


def test_copies_of_a_fold_draw_from_one_pool(bank):
    found = courses(bank.views, [0], replace(META, pool=3, rotate=True))
    pools = [{(e.label, e.query) for step in range(60) for e in one.batch(step, 0)[0]} for one in found.values()]
    assert all(pool <= pools[0] for pool in pools[1:])


# ---- rotation


def test_every_base_class_is_held_out_once(bank):
    found = courses(bank.views, [0, 2], replace(META, rotate=True, held_out=2))
    for fold in (0, 2):
        copies = [one for name, one in found.items() if name.startswith(f"{fold}_")]
        assert found[str(fold)].classes == bank.views.frames.base(fold) and found[str(fold)].held_out == ()
        out = [label for one in copies for label in one.held_out]
        assert sorted(out) == sorted(set(out)) and set(out) <= set(bank.views.frames.base(fold)) and len(copies) > 2
        for one in copies:
            asked_for = {e.label for step in STEPS for e in one.batch(step, 0)[0]}
            assert asked_for.isdisjoint(one.held_out) and {e.label for e in one.validation()} == set(one.held_out)


def test_without_rotation_a_fold_has_one_course(bank):
    assert list(courses(bank.views, [0, 1], META)) == ["0", "1"]
    assert list(courses(bank.views, [0], replace(META, rotate=True, held_out=0))) == ["0"]


def test_the_copies_judge_together_and_the_whole_is_kept(bank, scores):
    """Means 0.3, 0.5, 0.4: the second step is kept, of the expert that saw every class."""
    found = dict(list(courses(bank.views, [0], replace(META, rotate=True)).items())[:3])
    scores += [0.2, 0.4, 0.9, 0.1, 0.4, 0.4]
    models, best = experts(0), None
    models = nn.ModuleDict({name: experts(0)["0"] for name in found})
    best = Best(models)
    for step, value in ((0, 1.0), (10, 2.0), (20, 3.0)):
        for name, expert in models.items():
            nn.init.constant_(expert.ensemble.learners[0].threshold, value + 10 * (name != "0"))
        best.examine(step, models, found, Desk(bank).ask)
    best.load_into(models)
    assert best.score == {"0": 0.5} and best.step == {"0": 10}
    assert models["0"].ensemble.learners[0].threshold.item() == 2.0


# ---- pseudo-classes


def test_pseudo_episodes_come_as_often_as_wanted(bank):
    for share, low, high in ((0.0, 0, 0), (0.5, 15, 45), (1.0, 60, 60)):
        lesson = lessons(bank, pseudo_share=share)
        kinds = [{e.label == PSEUDO for e in lesson.batch(step, 0)[0]} for step in range(60)]
        assert all(len(kind) == 1 for kind in kinds), "a batch is of one kind"
        assert low <= sum(True in kind for kind in kinds) <= high


def test_a_pseudo_episode_shows_one_frame_and_hides_the_novel(bank):
    frames, lesson, hidden = bank.views.frames, lessons(bank, pseudo_share=1.0), 0
    for step in STEPS:
        for e in lesson.batch(step, 0)[0]:
            frame, number, role = e.query.split("~")
            assert role == "query" and e.supports == (f"{frame}~{number}~support",)
            support = bank.views.label(e.supports[0], "rgb", lesson.novel)
            assert (support == PSEUDO).any() and set(np.unique(support)) <= {0, PSEUDO, 255}
            assert ((support == 255) == np.isin(frames.label(frame), [*lesson.novel, 255])).all()
            query = bank.views.label(e.query, "rgb", lesson.novel)
            assert (query == PSEUDO).any() and bank.views.picture(e.query, "rgb").shape == (*query.shape, 3)
            hidden += (support == 255).sum()
    assert hidden > 0
    assert Expert((48, 192, 96), range(1, 10), 2, EXPERT).own_index([PSEUDO, 3, 12]).tolist() == [-1, 3, 0]


# ---- selection


def experts(*folds, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({str(fold): Expert((48, 192, 96), range(1, 10), 2, EXPERT) for fold in folds})


def marked(models, value):
    for expert in models.values():
        nn.init.constant_(expert.ensemble.learners[0].threshold, value)


def thresholds(models):
    return {fold: expert.ensemble.learners[0].threshold.item() for fold, expert in models.items()}


@pytest.fixture
def scores(monkeypatch):
    """Scores that `examine` will find, in this order."""
    queue = []
    monkeypatch.setattr(lessons_module, "held_out_score", lambda *_: queue.pop(0))
    return queue


def test_the_best_state_of_each_fold_is_kept(bank, scores):
    scores += [0.3, 0.6, 0.5, 0.4, 0.5, 0.7]  # folds 0 and 2, at three steps
    models = experts(0, 2)
    given, best = {fold: lessons(bank, int(fold)) for fold in models}, Best(models)
    for step, value in ((0, 1.0), (50, 2.0), (100, 3.0)):
        marked(models, value)
        found = best.examine(step, models, given, Desk(bank).ask)
        assert set(found) == {"held_out_fold0", "held_out_fold2"}
    best.load_into(models)
    assert thresholds(models) == {"0": 2.0, "2": 3.0}, "of equal scores the earlier one stays"
    assert best.step == {"0": 50, "2": 100} and best.score == {"0": 0.5, "2": 0.7}


def test_the_start_is_a_candidate(bank, scores):
    scores += [0.4, 0.1]
    models = experts(0)
    best = Best(models)
    for step, value in ((0, 0.0), (50, 9.0)):
        marked(models, value)
        best.examine(step, models, {"0": lessons(bank)}, Desk(bank).ask)
    best.load_into(models)
    assert thresholds(models) == {"0": 0.0} and best.step == {"0": 0}


def test_the_best_survives_a_checkpoint(bank, scores, tmp_path):
    scores += [0.4, 0.2, 0.3]
    models = experts(0)
    best = Best(models)
    marked(models, 5.0)
    best.examine(7, models, {"0": lessons(bank)}, Desk(bank).ask)
    torch.save(best.state_dict(), tmp_path / "state.pt")
    again, others = Best(experts(0)), experts(0, seed=1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    marked(others, 6.0)
    again.examine(8, others, {"0": lessons(bank)}, Desk(bank).ask)
    again.load_into(others)
    assert thresholds(others) == {"0": 5.0} and again.step == {"0": 7} and again.score == {"0": 0.4}
    expected = models["0"].ensemble.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in others["0"].ensemble.state_dict().items())


def test_without_an_episode_nothing_is_selected(bank, scores):
    models = experts(0)
    best = Best(models)
    marked(models, 5.0)
    assert best.examine(0, models, {"0": lessons(bank, held_out=0)}, Desk(bank).ask) == {}
    best.load_into(models)
    assert thresholds(models) == {"0": 5.0}


def test_the_held_out_score_is_miou_over_the_classes(bank):
    """A fresh expert of one stream decides as the control does, so its score is the control's, counted by hand."""
    lesson = lessons(bank, streams=STREAMS[:1], validation=6)
    settings = replace(EXPERT, use_base=False, anchored=replace(EXPERT.anchored, correction=False))
    expert = Expert((48, 192, 96), bank.views.frames.base(0), 1, settings)
    sums = {label: np.zeros(2) for label in lesson.held_out}
    for e in lesson.validation():
        batch = gather(bank, [e], ["infrared"], lesson.novel)
        levels = to_grid(batch.query[0], bank.grid), to_grid(batch.support[0], bank.grid)
        logits = Prototype()(*levels, soft_mask(batch.masks, bank.grid)).log_softmax(1)
        said = nn.functional.interpolate(logits, SIZE, mode="bilinear", align_corners=False).argmax(1)[0].numpy() == 1
        truth = batch.targets[0, 0].numpy()
        sums[e.label] += [(said & (truth == 1)).sum(), ((said | (truth == 1)) & (truth != 255)).sum()]
    expected = np.mean([both / either for both, either in sums.values()])
    assert 0 < expected < 1
    assert held_out_score(expert, lesson.validation(), lesson, Desk(bank).ask) == pytest.approx(expected, abs=0.01)


def test_selection_on_the_test_split_is_said_aloud_and_holds_nothing_out(bank):
    """For parity alone: novel classes of test frames, seen with their labels; the default never asks for one."""
    frames = bank.views.frames
    lesson = lessons(bank, select_on="test", min_pixels=1)
    assert set(lesson.classes) == set(frames.base(0)) and lesson.held_out == () == lesson.hidden
    asked_for = [e for fold in FOLDS for e in lessons(bank, fold, select_on="test", min_pixels=1).validation()]
    assert asked_for, "two test frames share no novel class: nothing was tried"
    for e in asked_for:
        assert {frames.split(id) for id in (e.query, *e.supports)} == {"test"}
    assert {e.label for e in lesson.validation()} <= set(frames.novel(0))
    assert "NOVEL CLASSES" in SELECTIONS["test"] and "NOVEL CLASSES" in MetaSettings.__doc__
    assert replace(META, select_on="test", held_out=0).selects and not replace(META, held_out=0).selects
    assert list(courses(bank.views, [0], replace(META, select_on="test", rotate=True))) == ["0"], "nothing rotates"
    default = lessons(bank, min_pixels=1)
    assert default.hidden == frames.novel(0) and not {e.label for e in default.validation()} & set(frames.novel(0))


def test_an_unknown_selection_or_policy_lists_the_known_ones():
    with pytest.raises(UsageError, match="no select_on 'novel'; choose held_out or test"):
        MetaSettings(select_on="novel")
    with pytest.raises(UsageError, match=r"no policy 'maybe' .*choose ignore, background, drop"):
        MetaSettings(novel_in_train="maybe")
