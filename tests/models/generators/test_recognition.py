"""The toy world's judge: it learns names from captioned pictures, and says whether a picture shows what was asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.errors import UsageError
from models.generators.inspection import open_judge
from models.generators.recognition import (
    RecogniserSettings,
    ToyJudge,
    build_recogniser,
    fit_recogniser,
    held_in,
    recognised,
    recogniser_fitting,
    save_judge,
)

CLASSES = ("red", "green", "blue")
SETTINGS = RecogniserSettings(widths=(8, 16), steps=60, batch=16, rate=1e-2)


def spots(count, seed=0):
    """Pictures uint8 [N, 32, 32, 3] of grey noise with a spot of each colour that is shown, and which these are."""
    rng = np.random.default_rng(seed)
    pictures, shown = rng.integers(90, 130, (count, 32, 32, 3)).astype(np.uint8), rng.random((count, 3)) < 0.5
    for picture, here in zip(pictures, shown, strict=True):
        for k in np.flatnonzero(here):
            y, x = rng.integers(0, 24, 2)
            picture[y : y + 8, x : x + 8, k] = 250
    return pictures, shown


@pytest.fixture(scope="module")
def judge():
    model = build_recogniser(3, SETTINGS)
    fit_recogniser(model, recogniser_fitting(model), *spots(120))
    return ToyJudge(model, CLASSES)


def test_it_learns_what_pictures_show(judge):
    pictures, shown = spots(60, seed=1)
    margins = np.stack([judge.margins(pictures, CLASSES, k)[0] for k in range(3)], axis=1)
    assert ((margins > 0) == shown).mean() > 0.95
    alone = shown.sum(1) == 1
    assert recognised(judge.model, pictures[alone], shown[alone].argmax(1)) > 0.95
    assert recognised(judge.model, pictures[alone], (shown[alone].argmax(1) + 1) % 3) < 0.05


def test_a_judge_without_colour_sees_light_and_shade_alone():
    """Where classes are colours it is lost; neither which colours nor how bright moves what it says."""
    pictures, shown = spots(120)
    model = build_recogniser(3, replace(SETTINGS, colour=False))
    fit_recogniser(model, recogniser_fitting(model), pictures, shown)
    fresh, known = spots(60, seed=1)
    alone = known.sum(1) == 1
    assert recognised(model, fresh[alone], known[alone].argmax(1)) < 0.7
    blind = ToyJudge(model, CLASSES)
    said, again = (blind.margins(part, CLASSES, 0) for part in (fresh, fresh[..., ::-1] - 80))
    assert np.allclose(said[0], again[0], atol=1e-3) and np.allclose(said[1], again[1], atol=1e-3)
    assert model.describe(torch.zeros(2, 3, 32, 32)).shape == (2, 8, 16, 16)


def test_the_last_pictures_are_held_out():
    """Broken ones at the end change nothing that is learnt."""
    pictures, shown = spots(40)
    assert held_in(40, SETTINGS) == 36 and held_in(1, SETTINGS) == 1
    spoilt = shown.copy()
    spoilt[36:] = ~spoilt[36:]
    weights = []
    for known in (shown, spoilt):
        model = build_recogniser(3, RecogniserSettings(widths=(8,), steps=3, batch=8))
        fit_recogniser(model, recogniser_fitting(model), pictures, known)
        weights.append(model.classify.weight)
    assert torch.equal(*weights)


def test_embeddings_tell_pictures_of_one_class_from_those_of_another(judge):
    pictures, shown = spots(80, seed=2)
    red, blue = (pictures[(shown == wanted).all(1)] for wanted in ([1, 0, 0], [0, 0, 1]))
    near, far = (judge.margins(part, CLASSES, 0)[1] for part in (red, blue))
    assert np.allclose(np.linalg.norm(near, axis=1), 1, atol=1e-5)
    assert (near @ near.T).mean() > (near @ far.T).mean() + 0.3


def test_a_saved_judge_is_opened_like_a_clip(judge, tmp_path):
    save_judge(tmp_path, judge.model, CLASSES)
    pictures, _ = spots(3, seed=3)
    opened = open_judge(str(tmp_path))
    for one, other in zip(opened.margins(pictures, CLASSES, 1), judge.margins(pictures, CLASSES, 1), strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(UsageError, match="knows other classes"):
        opened.margins(pictures, ("red", "blue", "green"), 0)


def test_a_picture_s_margin_does_not_depend_on_its_neighbours(judge):
    pictures, _ = spots(8, seed=4)
    together = judge.margins(pictures, CLASSES, 2)[0]
    alone = [judge.margins([picture], CLASSES, 2)[0][0] for picture in pictures]
    assert np.allclose(together, alone, atol=1e-4)


def test_nothing_recognised_of_nothing(judge):
    assert np.isnan(recognised(judge.model, [], []))
