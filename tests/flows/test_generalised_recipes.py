"""The generalised recipes hold together, and their steps say what they change."""

from __future__ import annotations

import pytest

from flows.generalised_recipes import GENERALISED, STEPS, named
from models import DATASETS, find
from models.errors import UsageError
from models.geometry import Canvas
from models.labelling import STEPS as LABELS
from tasks.propose import PROPOSERS
from tasks.store import canonical_json


@pytest.mark.parametrize("name", sorted(GENERALISED))
def test_a_recipe_holds_together(name):
    recipe = named(name)
    assert recipe.name == name and canonical_json(recipe)
    find(DATASETS, recipe.data.dataset)
    Canvas(recipe.train.size)
    own = "foundation" in (recipe.propose.pipeline, recipe.imagine.picture.pipeline, recipe.label.sam)
    assert own == (recipe.foundation is not None), "foundation models are fitted when, and only when, they are used"
    if recipe.foundation:
        assert recipe.imagine.picture.size == recipe.foundation.pipeline.size
        assert recipe.foundation.layer == recipe.train.layer
        assert all(side % 16 == 0 for side in recipe.foundation.pipeline.size)


def test_the_study_adds_one_thing_at_a_time():
    assert [step.name for step in STEPS] == ["supports", "+ names", "+ HDIG", "+ APE", "+ SABR", "real masks"]
    assert all(step.upto in ("", *LABELS) and step.proposer in PROPOSERS for step in STEPS)
    recipe = named("toy-gfss")
    changes = [(recipe.proposed(step).proposer, recipe.labelled(step).rule.upto) for step in STEPS if step.labelled]
    assert changes == [("names", "predict"), ("grammar", "predict"), ("grammar", "ape"), ("grammar", "sabr")]
    assert len(recipe.shots.seeds) == 5
    assert [step.truth for step in STEPS] == [False] * 5 + [True]


def test_an_unknown_recipe_lists_the_right_ones():
    with pytest.raises(UsageError, match=r"toy-gfss.*Did you mean 'toy-gfss'"):
        named("toy-gffs")
