"""Recipes: complete, named, documented, and a night's key depends on what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flows.fusion_recipes import TOY, FusionSizes, sized
from flows.overrides import override
from flows.recipes import RECIPES, named, run_key
from models import DATASETS, FUSERS, GENERATORS, find
from models.backbone import Wants
from models.episode import POLICIES
from models.errors import UsageError
from models.geometry import Canvas
from models.views import Stream
from tasks.fanout import Compute
from tasks.store import Ref

WANTED = {"smoke", "demo", "msrs-1shot", "msrs-5shot", "msrs-1shot-fused", "soda-1shot", "soda-5shot", "scutseg-1shot"}
FRAMES = [Ref("store/frames/1", "frames", "1" * 16, 3)]


def test_the_promised_recipes_exist():
    assert set(RECIPES) >= WANTED


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_holds_together(name):
    recipe = named(name)
    assert recipe.name == name
    assert recipe.episodes.shots == recipe.meta.shots, "trained and examined with different shots"
    assert recipe.episodes.min_pixels == recipe.meta.min_pixels
    assert recipe.base.size == recipe.meta.size, "the base map has to lie on the meta learners' grid"
    assert recipe.base.novel_in_train == recipe.meta.novel_in_train in POLICIES
    assert recipe.base.letterbox == recipe.meta.letterbox == "exact" and recipe.meta.select_on == "held_out"
    Canvas(recipe.base.size)
    find(DATASETS, recipe.data.dataset), find(GENERATORS, recipe.translate.generator)
    made = set(recipe.translate.directions) | {"infrared", "visible"} | ({"fused"} if recipe.fuse else set())
    read = {layer.split("_")[0] for s in recipe.meta.streams for layer in (s.layer, s.stand_in) if layer}
    assert read <= made, "a stream reads a layer that nothing makes"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_many_base_classes_take_msanet_and_few_the_anchor(name):
    """The GPU recipes are the papers'; smaller ones have too few base classes for a decoder that reads features."""
    expert = named(name).meta.expert
    large = name.startswith(("soda", "scutseg"))
    assert (expert.learner, expert.fusion) == ("msanet" if large else "anchored", "F2")
    assert not large or (expert.msanet.width, expert.msanet.prior, expert.msanet.gam_pool) == (256, "masked_l4", "area")


def test_the_switches_for_parity_are_settings():
    """GenFusion spec §12: what it takes to repeat BAM's and MSANet's own protocol."""
    switches = [
        "meta.expert.msanet.prior=masked_l3", "meta.expert.msanet.gam_pool=all", "meta.novel_in_train=drop",
        "base.novel_in_train=drop", "meta.letterbox=bam", "base.letterbox=bam", "episodes.protocol=bam1000",
        "meta.select_on=test", "meta.size=473,473", "base.size=473,473", "meta.expert.fusion=F1",
    ]  # fmt: skip
    recipe = override(named("soda-1shot"), switches)
    assert recipe.meta.expert.wants == Wants(blocks=True, masked=True) and recipe.meta.selects
    assert Canvas(recipe.meta.size, recipe.meta.letterbox).content(480, 640) == (352, 472)
    assert (recipe.episodes.protocol, recipe.meta.expert.fusion) == ("bam1000", "F1")


def test_a_recipe_object_is_its_own_name():
    recipe = replace(named("smoke"), name="mine")
    assert named(recipe) is recipe


def test_an_unknown_recipe_lists_the_right_ones():
    with pytest.raises(UsageError, match=r"msrs-1shot.*Did you mean 'smoke'"):
        named("smoek")


def test_the_key_depends_on_settings_and_data_but_not_on_the_machine():
    recipe = named("smoke")
    key = run_key(recipe, FRAMES)
    assert key.startswith("smoke-")
    assert run_key(replace(recipe, compute=Compute(actors=9)), FRAMES) == key
    assert run_key(replace(recipe, meta=replace(recipe.meta, seed=1)), FRAMES) != key
    assert run_key(recipe, [replace(FRAMES[0], digest="2" * 16)]) != key


def test_a_fused_stream_is_one_more_and_fuses_what_prediction_has():
    plain, fused = named("msrs-1shot"), named("msrs-1shot-fused")
    assert plain.fuse is None and fused.fuse.visible == "rgb" and "rgb" in fused.translate.directions
    assert fused.meta.streams == (*plain.meta.streams, Stream("fused", "fused"))
    assert replace(fused, name=plain.name, fuse=None, meta=replace(fused.meta, streams=plain.meta.streams)) == plain
    assert not find(FUSERS, fused.fuse.fuser).needs_labels, "three folds leave no class that a fuser may see"
    changed = override(fused, ["fuse.visible=visible", "fuse.iterations=7", "fuse.network.base=8"])
    assert (changed.fuse.visible, changed.fuse.iterations, changed.fuse.network["base"]) == ("visible", 7, 8)
    assert run_key(changed, FRAMES) != run_key(fused, FRAMES)


@pytest.mark.parametrize("sizes", [FusionSizes(), TOY], ids=["two cores", "toy"])
def test_the_fusion_studies_can_be_fitted(sizes):
    for settings in (sizes.segmif, sizes.sgdfuse, sizes.joint):
        start = {"weights": "random"} if settings.fuser == "segmif" else {}
        fuser = find(FUSERS, settings.fuser)(**{**settings.network, **start})
        assert settings.crop % fuser.stride == 0 and settings.crop >= 32
    assert sizes.steps[0] == 1 and 0 not in sizes.radii
    assert sizes.sgdfuse.network["configuration"] == "fast" and sizes.sgdfuse.masks.backend == "levels"


def test_toy_scenes_are_fitted_briefly():
    assert sized(named("smoke")) is TOY and sized(named("msrs-1shot")) == FusionSizes()


@pytest.mark.parametrize("name", ["msrs-1shot", "msrs-1shot-fused"])
def test_a_form_that_was_filled_in_becomes_its_recipe(name):
    from dataclasses import asdict

    recipe = named(name)
    form = asdict(recipe)
    assert named(form) == recipe
    with pytest.raises(UsageError, match=r"The form's meta\.steps is wrong"):
        named({**form, "meta": {**form["meta"], "steps": "many"}})
