"""Fusion studies: is a learnt fuser better than the brighter of both pictures, which part of it, and for whom.

    fusers    SegMiF, SGDFuse and its ablations beside the controls: every metric on the test pairs, and the pictures
    masks     SGDFuse with masks that are shrunk, grown or gone
    sensors   one segmentation network on infrared, on visible, on fused pictures, and trained jointly with SegMiF

Fits and tests are cells of the store (`tasks.cells`): a study that was killed goes on with the next, and the three
share their fusers. Nothing is chosen on the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import flow

from flows.fusion_recipes import FusionSizes, sized
from flows.recipes import Recipe, named
from flows.studies import conduct, publish
from models import charts
from models.fusers.settings import FuserSettings
from models.fusion_charts import fused_sheet, metric_curves, metric_dots
from models.plots import png
from tasks import places
from tasks.compare_sensors import JOINT, Sensor, by_protocol, compare_sensors
from tasks.fit_fusers import fit_fusers
from tasks.fuse import fuse_by
from tasks.prepare import open_frames, prepare
from tasks.show_fused import scenes
from tasks.store import Ref, digest_of
from tasks.tabulate import Row, StudyOutcome, tabulate
from tasks.tabulate_metrics import GOALS, FusedRow, metrics_markdown, tabulate_metrics

CONTROLS = {
    "average": "the mean of both",
    "maximum": "the brighter of both",
    "saliency": "both, weighed by how rare their grey levels are",
    "two_scale": "the glow of the brighter, the detail of the livelier: what the learnt ones start from",
}
SEEDS = (510, 365, 382)
TEST = ("test",)


@flow(name="fusion study", log_prints=False, validate_parameters=False)
def study(name: str, recipe: Recipe | str = "smoke", seeds: Sequence[int] = SEEDS) -> StudyOutcome:
    """Run one of STUDIES on the pairs of a recipe's data.

    seeds: of `sensors`, three at most; the others take the first. Raises UsageError that lists the names, or when the
    data has no pairs.
    """
    return conduct(STUDIES, name, named(recipe), seeds)


def fusers(recipe: Recipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """Both fusers beside the controls, and SGDFuse without each of its parts."""
    sizes, frames = seeded(sized(recipe), seeds[0]), prepare(recipe.data, recipe.compute)
    fitted = fit_everything(frames, sizes, recipe)
    rows, uses = fuser_rows(sizes)
    made = fuse_by(frames, {r.name: fitted[uses[r.name][0]] for r in rows},
                   {r.name: uses[r.name][1] for r in rows}, recipe.compute)
    store = places.store()
    tables = {name: store.rows(ref) for name, ref in made.items()}
    found = tabulate_metrics(tables, rows, recipe.exam.resamples)
    chart = metric_dots(found.to_dict("records"), GOALS, tuple(CONTROLS))
    shown = ("maximum", "segmif", "stage1", many(sizes))
    sheet = fused_sheet(scenes(frames, {name: made[name] for name in shown}, sizes.scenes))
    return publish("fusers", recipe, list(made.values()), found, (), chart, metrics_markdown(found),
                   {"pictures": png(sheet)})


def masks(recipe: Recipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """The fitted SGDFuse of `fusers`, with worse and worse masks at hand."""
    sizes, frames = seeded(sized(recipe), seeds[0]), prepare(recipe.data, recipe.compute)
    fitted = fit_fusers(frames, {"maximum": FuserSettings("maximum"), "sgdfuse": sizes.sgdfuse}, recipe.compute)
    told = replace(sizes.sgdfuse, splits=TEST, steps=sizes.steps[-1])
    conditions = mask_conditions(told, sizes.radii)
    settings = {name: condition for name, (_, condition) in conditions.items()}
    settings |= {"stage1": replace(told, steps=0), "maximum": FuserSettings("maximum", splits=TEST)}
    learnt = {name: fitted["maximum" if name == "maximum" else "sgdfuse"] for name in settings}
    made = fuse_by(frames, learnt, settings, recipe.compute)
    rows = [FusedRow("maximum", CONTROLS["maximum"], True), FusedRow("stage1", "Stage I, which sees no masks")]
    rows += [FusedRow(name, about) for name, (about, _) in conditions.items()]
    tables = {name: places.store().rows(ref) for name, ref in made.items()}
    found = tabulate_metrics(tables, rows, recipe.exam.resamples)
    chart = metric_curves(*mask_curves(found.set_index("row"), sizes.radii), "pixels by which masks grow (or shrink)")
    return publish("masks", recipe, list(made.values()), found, (), chart, metrics_markdown(found))


def sensors(recipe: Recipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """One segmentation network and budget on everything that can be looked at."""
    sizes, frames = sized(recipe), prepare(recipe.data, recipe.compute)
    first = seeded(sizes, seeds[0])
    whole = {"maximum": FuserSettings("maximum"), "segmif": first.segmif, "sgdfuse": first.sgdfuse}
    fused = fuse_by(frames, fit_fusers(frames, whole, recipe.compute), whole, recipe.compute)
    compared, seeds = sensor_rows(sizes), seeds[: len(SEEDS)]
    table = compare_sensors(frames, compared, seeds, fused, recipe.compute)
    rows = [Row(sensor.name, sensor.about, sensor.name) for sensor in compared]
    classes = {0: range(len(open_frames(frames).classes) + 1)}
    found = tabulate(table, rows, ("infrared", "visible", "segmif"), classes, recipe.exam.resamples)
    found = found.merge(by_protocol(table), left_on="row", right_index=True)
    chart = charts.dots(found.to_dict("records"), "visible")
    asked = [frames, *fused.values(), digest_of("sensors", [], (sizes, seeds))]
    return publish("sensors", recipe, asked, found, ("infrared", "visible", "segmif"), chart)


STUDIES: dict[str, Callable[[Recipe, tuple[int, ...]], StudyOutcome]] = {
    "fusers": fusers, "masks": masks, "sensors": sensors,
}


# ---- what is fitted and compared


def seeded(sizes: FusionSizes, seed: int) -> FusionSizes:
    """The same with both fusers fitted from this seed."""
    return replace(sizes, segmif=replace(sizes.segmif, seed=seed), sgdfuse=replace(sizes.sgdfuse, seed=seed))


def many(sizes: FusionSizes) -> str:
    """The row of the whole SGDFuse."""
    return f"sgdfuse_{sizes.steps[-1]}"


def fit_everything(frames: Ref, sizes: FusionSizes, recipe: Recipe) -> dict[str, Ref]:
    """Controls, SegMiF, SGDFuse, and SGDFuse without its parts, which share its Stage I."""
    whole = sizes.sgdfuse
    apart = {name: FuserSettings(name) for name in CONTROLS}
    apart |= {"segmif": sizes.segmif, "sgdfuse": whole, "stage2_alone": replace(whole, first_share=0.0)}
    fitted = fit_fusers(frames, apart, recipe.compute)
    second = replace(whole, first_share=0.0, iterations=whole.iterations - round(whole.first_share * whole.iterations))
    return fitted | fit_fusers(frames, ablations(second), recipe.compute, fitted["sgdfuse"])


def ablations(second: FuserSettings) -> dict[str, FuserSettings]:
    """Stage II without one thing. second: of Stage II alone."""
    return {
        "without_masks": replace(second, masks=replace(second.masks, backend="none")),
        "without_diffusion": replace(second, network={**second.network, "start": "clean"}),
        "without_hfah": replace(second, network={**second.network, "head": "plain"}),
    }


def fuser_rows(sizes: FusionSizes) -> tuple[list[FusedRow], dict[str, tuple[str, FuserSettings]]]:
    """The rows of `fusers`, and for each the fitted fuser it takes and how it fuses."""
    told, last = replace(sizes.sgdfuse, splits=TEST), sizes.steps[-1]
    rows = [FusedRow(name, about, True) for name, about in CONTROLS.items()]
    uses = {name: (name, FuserSettings(name, splits=TEST)) for name in CONTROLS}
    rows += [FusedRow("segmif", "SegMiF, trained jointly with segmentation"),
             FusedRow("stage1", "SGDFuse's F1: Stage I alone")]
    uses |= {"segmif": ("segmif", replace(sizes.segmif, splits=TEST)), "stage1": ("sgdfuse", replace(told, steps=0))}
    for steps in sizes.steps:
        rows.append(FusedRow(f"sgdfuse_{steps}", f"SGDFuse's F2 in {steps} step{'s' * (steps > 1)}"))
        uses[f"sgdfuse_{steps}"] = ("sgdfuse", replace(told, steps=steps))
    told = replace(told, steps=last)
    for name, about in (("stage2_alone", "Stage II alone, from two scales"),
                        ("without_masks", "SGDFuse trained and used without masks"),
                        ("without_diffusion", "SGDFuse whose Stage II looks once, without noise"),
                        ("without_hfah", "SGDFuse with one convolution in place of HFAH")):
        rows.append(FusedRow(name, about))
        bare = replace(told, masks=replace(told.masks, backend="none")) if name == "without_masks" else told
        uses[name] = (name, bare)
    return rows, uses


def mask_conditions(told: FuserSettings, radii: Sequence[int]) -> dict[str, tuple[str, FuserSettings]]:
    """Row -> what it is, and how SGDFuse then fuses."""
    def worse(**changes: Any) -> FuserSettings:
        return replace(told, masks=replace(told.masks, **changes))

    found = {"original": ("masks as they are", told)}
    for radius in radii:
        name, word = (f"grown_{radius}", "grown") if radius > 0 else (f"shrunk_{-radius}", "shrunk")
        found[name] = (f"masks {word} by {abs(radius)} pixels", worse(grow=radius))
    for kind in ("infrared", "visible", "both"):
        about = "no masks at all" if kind == "both" else f"no mask of the {kind} picture"
        found[f"dropped_{kind}"] = (about, worse(drop=kind))
    return found


def mask_curves(by_name: Any, radii: Sequence[int]) -> tuple[Mapping, Mapping]:
    """For each of GOALS the curve over radii (0: as they are), and where no masks and Stage I lie."""
    names = {0: "original"} | {r: f"grown_{r}" if r > 0 else f"shrunk_{-r}" for r in radii}
    curves = {g: [(r, *(by_name.loc[n, c] for c in (g, f"{g}_low", f"{g}_high"))) for r, n in names.items()]
              for g in GOALS}
    return curves, {g: {n: by_name.loc[n, g] for n in ("dropped_both", "stage1", "maximum")} for g in GOALS}


def sensor_rows(sizes: FusionSizes) -> list[Sensor]:
    """The rows of `sensors`: one network, many pictures."""
    joint = sizes.joint
    return [
        Sensor("infrared", "infrared alone", joint, "infrared"),
        Sensor("visible", "visible alone", joint, "visible"),
        Sensor("maximum", "the brighter of both", joint, "fused", "maximum"),
        Sensor("sgdfuse", "SGDFuse's pictures", joint, "fused", "sgdfuse"),
        Sensor("segmif", "SegMiF's pictures, fused first: separate training", joint, "fused", "segmif"),
        Sensor("segmif_detached", "SegMiF trained meanwhile, segmentation not reaching it", replace(joint, detach=True),
               JOINT),
        Sensor("segmif_joint", "SegMiF trained jointly", joint, JOINT),
    ]
