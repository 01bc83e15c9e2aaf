"""Studies: what is compared with what. One is run for real on the pictures of `test_nightly.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.plans import PLANS, ablation, fused, mix, modalities, pseudo
from flows.recipes import RECIPES, demo, smoke, with_fused
from flows.studies import SEEDS, STUDIES, study
from models.errors import UsageError
from models.fusers.settings import FuserSettings


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
    assert set(made) == {"baseline", "method1", "method2", "method3", "replicated", "other_seed", "no_base", "f1",
                         "self_supervised_alone", "self_supervised", "self_supervised_three", "visible"}  # fmt: skip
    layers = {name: [stream.layer for stream in one.meta.streams] for name, one in made.items()}
    assert layers["self_supervised_three"] == ["infrared", "lightness", "rgb"]
    for name, beside in {"self_supervised_alone": "baseline", "self_supervised": "method3"}.items():
        assert made[name].pictures == made[beside].pictures
        assert replace(made[name].meta, pseudo_share=0.0) == made[beside].meta, "a row beyond the paper adds one thing"
    palettes = ablation(recipe, True).palettes
    assert palettes[made["baseline"].pictures].base.layers == ("infrared",)
    assert [stream.stand_in for stream in made["baseline"].meta.streams] == [None]
    assert [stream.layer for stream in made["replicated"].meta.streams] == ["infrared", "infrared"]
    assert palettes[made["other_seed"].pictures].translate.seed != palettes[0].translate.seed
    assert not made["no_base"].meta.expert.use_base and made["f1"].meta.expert.fusion == "F1"
    rest = replace(made["f1"].meta, expert=replace(made["f1"].meta.expert, fusion="F2"))
    assert rest == made["method3"].meta, "a control differs in one thing"
    assert "visible" not in {variant.name for variant in ablation(recipe, False).variants}


@pytest.mark.parametrize(("own", "chosen"), [(0.0, 0.5), (0.75, 0.75), (0.6, 0.6)])
def test_pseudo_classes_are_asked_of_one_stream_and_of_two(own, chosen):
    recipe = smoke()
    recipe = replace(recipe, meta=replace(recipe.meta, pseudo_share=own))
    made = {variant.name: variant for variant in pseudo(recipe, False).variants}
    palettes = pseudo(recipe, False).palettes
    assert palettes[made["infrared"].pictures].base.layers == ("infrared",)
    pairs = {"infrared_pseudo": ("infrared", chosen)}
    pairs |= {f"both_pseudo_{share:g}": ("both", share) for share in {0.25, 0.5, 0.75, 1.0, chosen}}
    for name, (beside, share) in pairs.items():
        without, with_them = made[beside], made[name]
        assert (without.meta.pseudo_share, with_them.meta.pseudo_share) == (0.0, share)
        assert replace(with_them, meta=without.meta, name=beside, about=without.about) == without, "one thing differs"
    assert [stream.layer for stream in made["both"].meta.streams] == ["infrared", "rgb"]
    assert [s.layer for s in made["replicated_pseudo"].meta.streams] == ["infrared", "infrared"]
    assert made["replicated_pseudo"].meta.pseudo_share == chosen


def test_the_published_methods_are_shown_without_pseudo_classes_whatever_the_recipe_does():
    recipe = smoke()
    recipe = replace(recipe, meta=replace(recipe.meta, pseudo_share=0.75))
    shares = {variant.name: variant.meta.pseudo_share for variant in ablation(recipe, True).variants}
    assert [shares.pop(f"self_supervised{rest}") for rest in ("", "_alone", "_three")] == [0.75] * 3
    others = [*mix(recipe, True).variants, *modalities(recipe, True).variants]
    shares |= {variant.name: variant.meta.pseudo_share for variant in others}
    assert set(shares.values()) == {0.0}


def test_a_learnt_metric_has_rows_of_its_own_where_the_recipe_asks_for_one():
    recipe = demo()
    found = {variant.name: variant for variant in ablation(recipe, True).variants}
    widths = {name: one.meta.expert.anchored.metric for name, one in found.items()}
    pairs = {"measured_alone": "baseline", "measured": "method3", "measured_visible": "visible"}
    assert {name for name, width in widths.items() if width} == set(pairs) and widths["measured"] == 64
    for name, beside in pairs.items():
        meta = found[name].meta
        without = replace(meta.expert, anchored=replace(meta.expert.anchored, metric=0))
        assert replace(meta, expert=without) == found[beside].meta and found[name].pictures == found[beside].pictures
    others = [*mix(recipe, True).variants, *modalities(recipe, True).variants, *pseudo(recipe, True).variants]
    assert {one.meta.expert.anchored.metric for one in others} == {0}
    assert not any("measured" in one.name for one in ablation(smoke(), True).variants)


def test_mix_and_modalities_change_one_thing_at_a_time():
    shares = [variant.meta.stand_in for variant in mix(smoke(), False).variants]
    assert shares == [0.0, 0.25, 0.5, 0.75, 0.9]
    counts = [len(variant.meta.streams) for variant in modalities(smoke(), True).variants]
    assert counts == [1, 2, 2, 3, 2, 4]


def test_the_fused_picture_is_held_against_a_third_look_and_a_control():
    made = fused(with_fused(smoke(), FuserSettings("average", visible="visible")), True)
    layers = {v.name: [s.layer for s in v.meta.streams] for v in made.variants}
    assert layers["without"] == ["infrared", "rgb"] and layers["replicated"] == ["infrared", "rgb", "infrared"]
    assert layers["fused"] == layers["fused_maximum"] == layers["fused_visible"] == ["infrared", "rgb", "fused"]
    how = {v.name: made.palettes[v.pictures].fuse for v in made.variants}
    assert (how["fused"].fuser, how["fused"].visible) == ("average", "rgb"), "what the served model sees"
    assert (how["fused_maximum"].fuser, how["fused_maximum"].visible) == ("maximum", "rgb")
    assert (how["fused_visible"].fuser, how["fused_visible"].visible) == ("average", "visible")
    assert "fused_visible" not in {v.name for v in fused(smoke(), False).variants}


def test_an_unknown_study_is_named_with_the_right_ones(thermofuse_home, prefect_server):
    known = "ablation, pseudo, mix, modalities, fused, degradation"
    with pytest.raises(UsageError, match=rf"no study 'ablatoin'.*{known}.*mean 'abl"):
        study("ablatoin", smoke(), SEEDS[:1])
    assert list(STUDIES) == ["ablation", "pseudo", "mix", "modalities", "fused", "degradation"]
