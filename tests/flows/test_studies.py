"""Studies: what is compared with what. One is run for real on the pictures of `test_nightly.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.recipes import RECIPES, smoke
from flows.studies import PLANS, SEEDS, STUDIES, ablation, mix, modalities, study
from models.errors import UsageError


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("visible", [True, False])
def test_every_plan_is_sound(plan, recipe, visible):
    made = PLANS[plan](RECIPES[recipe](), visible)
    names = [variant.name for variant in made.variants]
    assert len(set(names)) == len(names)
    assert set(made.references) <= {row.name for row in made.rows}
    assert {row.stream.partition(":")[0] for row in made.rows} == set(names)
    assert all(0 <= variant.pictures < len(made.palettes) for variant in made.variants)
    streams = {stream.layer for variant in made.variants for stream in variant.meta.streams}
    assert visible or "visible" not in streams


def test_the_ablation_holds_every_method_and_control():
    recipe = smoke()
    made = {variant.name: variant for variant in ablation(recipe, True).variants}
    assert set(made) == {"baseline", "method1", "method2", "method3", "replicated", "other_seed", "self_supervised",
                         "no_base", "f1", "visible"}  # fmt: skip
    palettes = ablation(recipe, True).palettes
    assert palettes[made["baseline"].pictures].base.layers == ("infrared",)
    assert [stream.stand_in for stream in made["baseline"].meta.streams] == [None]
    assert [stream.layer for stream in made["replicated"].meta.streams] == ["infrared", "infrared"]
    assert palettes[made["other_seed"].pictures].translate.seed != palettes[0].translate.seed
    assert not made["no_base"].meta.expert.use_base and made["f1"].meta.expert.fusion == "F1"
    rest = replace(made["f1"].meta, expert=replace(made["f1"].meta.expert, fusion="F2"))
    assert rest == made["method3"].meta, "a control differs in one thing"
    assert "visible" not in {variant.name for variant in ablation(recipe, False).variants}


def test_mix_and_modalities_change_one_thing_at_a_time():
    shares = [variant.meta.stand_in for variant in mix(smoke(), False).variants]
    assert shares == [0.0, 0.25, 0.5, 0.75, 0.9]
    counts = [len(variant.meta.streams) for variant in modalities(smoke(), True).variants]
    assert counts == [1, 2, 2, 3, 2, 4]


def test_an_unknown_study_is_named_with_the_right_ones(thermofuse_home, prefect_server):
    with pytest.raises(UsageError, match=r"no study 'ablatoin'.*ablation, mix, modalities, degradation.*mean 'abl"):
        study("ablatoin", smoke(), SEEDS[:1])
    assert STUDIES == ("ablation", "mix", "modalities", "degradation")
