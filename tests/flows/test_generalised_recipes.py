"""The generalised recipes hold together, and their steps say what they change."""

from __future__ import annotations

import pytest

from flows.catalogue import SEEDS
from flows.generalised_recipes import FOUNDATIONS, GENERALISED, STEPS, named
from models import DATASETS, find
from models.errors import UsageError
from models.geometry import Canvas
from models.labelling import LAST
from tasks.propose import PROPOSERS
from tasks.store import canonical_json


@pytest.mark.parametrize("name", [*FOUNDATIONS, *GENERALISED])
def test_a_recipe_holds_together(name):
    recipe = named(name)
    assert recipe.name == name and canonical_json(recipe)
    find(DATASETS, recipe.data.dataset)
    Canvas(recipe.train.size)
    drawn = [recipe.propose.pipeline, recipe.imagine.picture.pipeline] if recipe.sources else []
    own = "foundation" in (*drawn, recipe.label.sam)
    assert own == (recipe.foundation is not None), "foundation models are fitted when, and only when, they are used"
    assert recipe.label.sam != "toy-foundation" or not recipe.sources, "a borrowed SAM labels no pictures of its own"
    if recipe.foundation:
        assert recipe.imagine.picture.size == recipe.foundation.pipeline.size
        assert recipe.foundation.layer == ("visible" if recipe.carry else recipe.train.layer)
        assert all(side % 16 == 0 for side in recipe.foundation.pipeline.size)


def test_the_study_adds_one_thing_at_a_time():
    assert [step.name for step in STEPS if step.control] == ["pasted_supports"]
    steps = [step for step in STEPS if not step.control]
    assert [step.name for step in steps] == ["supports", "names", "hdig", "ape", "sabr", "paste", "real_masks"]
    assert all(step.upto in LAST and step.source in ("", *PROPOSERS) for step in STEPS)
    assert [(step.source, step.upto, step.paste) for step in steps[1:6]] == [
        ("names", "predict", False), ("grammar", "predict", False), ("grammar", "ape", False),
        ("grammar", "sabr", False), ("grammar", "sabr", True)]
    assert [step.truth for step in steps] == [False] * 6 + [True]


def test_pictures_are_labelled_as_far_as_a_step_wants():
    recipe = named("toy-gfss")
    assert recipe.sources == ["names", "grammar"]
    assert [recipe.proposed(source).proposer for source in recipe.sources] == recipe.sources
    assert [recipe.labelled(source).rule.upto for source in recipe.sources] == ["predict", "sabr"]


def test_the_foundation_night_makes_what_the_study_finds():
    one, other = named("toy-foundation"), named("toy-gfss")
    assert (one.data, one.foundation) == (other.data, other.foundation)


def test_captioned_pictures_show_the_classes_of_the_scenes_and_are_none_of_them():
    recipe = named("toy-gfss")
    for told in (recipe.foundation.captioned, recipe.pretrain.captioned):
        assert told.dataset == recipe.data.dataset and told.options["size"] == recipe.foundation.pipeline.size
        assert told.options["seed"] != recipe.data.options.get("seed", 0)


def test_a_run_takes_the_first_seed_of_a_study():
    assert named("toy-gfss").shots.seeds == SEEDS[:1]


def test_an_unknown_recipe_lists_the_right_ones():
    with pytest.raises(UsageError, match=r"toy-foundation.*toy-gfss.*Did you mean 'toy-gfss'"):
        named("toy-gffs")
