"""What each study of the learners compares: variants, the pictures they learn from, and the rows they stand in.

One function a study, in PLANS; a variant differs from what it is held against in one thing. `flows/studies.py` runs
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flows.recipes import Recipe
from models.fusers.settings import FuserSettings
from models.generators.settings import TranslateSettings
from models.segmenters.lessons import MetaSettings
from models.views import FUSED, Stream
from tasks.compare import Variant
from tasks.tabulate import Row
from tasks.train_base import BaseSettings

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
PSEUDO_SHARES = (0.25, 0.5, 0.75, 1.0)
ALONE, AUGMENTED = Stream("infrared", "infrared"), Stream("infrared", "infrared", "lightness")
RGB, VISIBLE = Stream("rgb", "rgb", "rgb_lightness"), Stream("visible", "visible")
COPY = Stream("copy", "infrared", "lightness")
LIGHTNESS = Stream("lightness", "lightness")
THIRD = Stream(FUSED, FUSED)


@dataclass(frozen=True)
class Palette:
    """How pictures and base learner of some variants are made. fuse: of a fused picture, if one of them reads it."""

    translate: TranslateSettings
    base: BaseSettings
    fuse: FuserSettings | None = None


@dataclass(frozen=True)
class Plan:
    """What a study compares. reference: the row that all are measured against, next to `control`."""

    variants: tuple[Variant, ...]
    palettes: tuple[Palette, ...]
    references: tuple[str, ...]
    rows: tuple[Row, ...]


def ablation(recipe: Recipe, visible: bool) -> Plan:
    """GenFusion's four methods, and what else might explain a gain: two looks at one picture, luck, the base map.

    What goes beyond the paper, pseudo-classes and a learnt metric, has rows of its own, each beside one stream that has
    it, too.
    """
    meta, base, metric = published(recipe), recipe.base, recipe.meta.expert.anchored.metric
    share = asked_share(recipe)
    palettes = (
        Palette(recipe.translate, base),
        Palette(recipe.translate, replace(base, layers=("infrared",))),
        Palette(recipe.translate, replace(base, layers=("rgb", "rgb_lightness"))),
        Palette(replace(recipe.translate, seed=recipe.translate.seed + 1), base),
    )
    other = "F1" if meta.expert.fusion == "F2" else "F2"
    alone, both = replace(meta, streams=(ALONE,)), replace(meta, streams=(AUGMENTED, RGB))
    asking = f"{share:.0%} of the batches asking for pseudo-classes"
    variants = [
        Variant("baseline", "infrared alone", alone, 1),
        Variant("method1", "infrared with lightness pictures in training", replace(meta, streams=(AUGMENTED,))),
        Variant("method2", "synthetic RGB alone", replace(meta, streams=(RGB,)), 2),
        Variant("method3", f"infrared and synthetic RGB, fused by {meta.expert.fusion}", both),
        Variant("replicated", "method3 whose second stream sees infrared", replace(both, streams=(AUGMENTED, COPY))),
        Variant("other_seed", "method3 with translators of another seed", both, 3),
        Variant("no_base", "method3 without the base map", _expert(both, use_base=False)),
        Variant(other.lower(), f"method3 fused by {other}", _expert(both, fusion=other)),
        Variant("self_supervised_alone", f"infrared alone, {asking}", replace(alone, pseudo_share=share), 1),
        Variant("self_supervised", f"method3, {asking}", replace(both, pseudo_share=share)),
        Variant("self_supervised_three", f"method3 with lightness as a third stream, {asking}",
                replace(both, streams=(AUGMENTED, LIGHTNESS, RGB), pseudo_share=share)),
    ]
    if metric:
        variants += [
            Variant("measured_alone", "infrared alone with a learnt metric", _measured(alone, metric), 1),
            Variant("measured", "method3 with a learnt metric", _measured(both, metric)),
        ]
    if visible:
        seen, about = replace(meta, streams=(AUGMENTED, VISIBLE)), "the real visible picture in place of the synthetic"
        variants.append(Variant("visible", f"method3 with {about}", seen))
        if metric:
            variants.append(Variant("measured_visible", f"a learnt metric, {about}", _measured(seen, metric)))
    controls = _controls({"prototype": ("baseline", "prototype"), "prototype_both": ("method3", "prototype")})
    return _plan(variants, palettes, ("prototype", "baseline", "replicated"), controls)


def pseudo(recipe: Recipe, visible: bool) -> Plan:
    """What episodes without labels are worth, to one stream and to two, and how many of the batches should ask for
    them: all variants take as many steps (after Ouyang et al., "Self-supervision with Superpixels", ECCV 2020). The
    share is to be chosen by the held-out base classes."""
    base, chosen = recipe.base, asked_share(recipe)
    alone, both = (replace(published(recipe), streams=streams) for streams in ((ALONE,), (AUGMENTED, RGB)))
    about = f"{chosen:.0%} of the batches asking for pseudo-classes"
    variants = [
        Variant("infrared", "infrared alone", alone, 1),
        Variant("infrared_pseudo", f"infrared alone, {about}", replace(alone, pseudo_share=chosen), 1),
        Variant("replicated_pseudo", f"two looks at infrared, {about}",
                replace(both, streams=(AUGMENTED, COPY), pseudo_share=chosen)),
        Variant("both", "infrared and synthetic RGB", both),
    ] + [
        Variant(f"both_pseudo_{share:g}", f"infrared and synthetic RGB, {share:.0%} of the batches",
                replace(both, pseudo_share=share))
        for share in sorted({*PSEUDO_SHARES, chosen})
    ]
    controls = _controls({"prototype": ("infrared", "prototype")})
    palettes = (Palette(recipe.translate, base), Palette(recipe.translate, replace(base, layers=("infrared",))))
    return _plan(variants, palettes, ("prototype", "infrared", "infrared_pseudo", "replicated_pseudo"), controls)


def mix(recipe: Recipe, visible: bool) -> Plan:
    """How often training shows synthetic stand-ins (lightness and its RGB) in place of the real infrared frame."""
    variants = [
        Variant(f"share_{share:g}", f"{share:.0%} of the training episodes show the stand-ins",
                replace(published(recipe), streams=(AUGMENTED, RGB), stand_in=share))
        for share in SHARES
    ]
    controls = _controls({"prototype": ("share_0", "prototype_infrared")})
    return _plan(variants, (Palette(recipe.translate, recipe.base),), ("prototype", "share_0"), controls)


def modalities(recipe: Recipe, visible: bool) -> Plan:
    """One to four modalities in one ensemble."""
    sets = {
        "infrared": (AUGMENTED,),
        "infrared_rgb": (AUGMENTED, RGB),
        "infrared_lightness": (AUGMENTED, LIGHTNESS),
        "infrared_lightness_rgb": (AUGMENTED, LIGHTNESS, RGB),
    }
    if visible:
        sets |= {
            "infrared_visible": (AUGMENTED, VISIBLE),
            "infrared_lightness_rgb_visible": (AUGMENTED, LIGHTNESS, RGB, VISIBLE),
        }
    variants = [
        Variant(name, " + ".join(stream.name for stream in streams), replace(published(recipe), streams=streams))
        for name, streams in sets.items()
    ]
    controls = _controls({"prototype": ("infrared", "prototype")})
    return _plan(variants, (Palette(recipe.translate, recipe.base),), ("prototype", "infrared"), controls)


def fused(recipe: Recipe, visible: bool) -> Plan:
    """A fused picture as third stream, with controls: a third look at infrared, and pictures that nothing learnt."""
    learnt = replace(recipe.fuse or FuserSettings("saliency"), visible="rgb")
    kinds = [learnt, replace(learnt, fuser="maximum", network={})]
    if visible:
        kinds.append(replace(learnt, visible="visible"))
    palettes = [Palette(recipe.translate, recipe.base, kind) for kind in kinds]
    third = replace(recipe.meta, streams=(AUGMENTED, RGB, THIRD))
    variants = [
        Variant("without", "infrared and synthetic RGB", replace(recipe.meta, streams=(AUGMENTED, RGB))),
        Variant("replicated", "a third stream that sees infrared", replace(third, streams=(AUGMENTED, RGB, COPY))),
        Variant("fused", f"a third stream: {learnt.fuser} of infrared and synthetic RGB", third),
        Variant("fused_maximum", "the same with the brighter of both", third, 1),
    ]
    if visible:
        variants += [
            Variant("fused_visible", f"a third stream: {learnt.fuser} of infrared and the real visible", third, 2),
            Variant("visible", "the real visible as it is", replace(third, streams=(AUGMENTED, RGB, VISIBLE))),
        ]
    controls = _controls({"prototype": ("without", "prototype_infrared")})
    return _plan(variants, palettes, ("prototype", "without"), controls)


def published(recipe: Recipe) -> MetaSettings:
    """The recipe's settings without pseudo-classes and learnt metric, which GenFusion lacks: rows of several studies
    compare."""
    return _measured(replace(recipe.meta, pseudo_share=0.0), 0)


def asked_share(recipe: Recipe) -> float:
    """How often a row with pseudo-classes asks for them: as often as the recipe, or in half of the batches."""
    return recipe.meta.pseudo_share or 0.5


def _expert(meta: MetaSettings, **changes) -> MetaSettings:
    return replace(meta, expert=replace(meta.expert, **changes))


def _measured(meta: MetaSettings, metric: int) -> MetaSettings:
    return _expert(meta, anchored=replace(meta.expert.anchored, metric=metric))


def _controls(streams: dict[str, tuple[str, str]]) -> list[Row]:
    about = {"prototype": "training-free control on infrared",
             "prototype_both": "training-free control summed over infrared and synthetic RGB"}
    return [Row(name, about[name], ":".join(stream)) for name, stream in streams.items()]


def _plan(variants: Sequence[Variant], palettes: Sequence[Palette], references: Sequence[str], controls) -> Plan:
    rows = (*controls, *(Row(v.name, v.about, f"{v.name}:all") for v in variants))
    return Plan(tuple(variants), tuple(palettes), tuple(references), rows)


PLANS: dict[str, Callable[[Recipe, bool], Plan]] = {
    "ablation": ablation, "pseudo": pseudo, "mix": mix, "modalities": modalities, "fused": fused,
}
