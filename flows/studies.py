"""Studies: what each part of the night is worth, measured on the same frozen episodes with its controls.

    thermofuse study ablation msrs-1shot

A study is a table (parquet and Markdown), a chart, and an MLflow run with one child per row. Cells are fanned out on
Ray and kept one by one: a study that was killed goes on with the next. Model selection stays on base classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
from prefect import flow

from flows.catalogue import SEEDS
from flows.plans import PLANS, Palette
from flows.recipes import Recipe, named
from models import charts
from models.corruptions import CORRUPTIONS
from models.errors import unknown
from models.plots import png
from tasks import places
from tasks.compare import Pictures, cell_table, compare, held_out_scores
from tasks.degrade import degrade
from tasks.evaluate import evaluate, exam_table
from tasks.fit_translators import fit_translators
from tasks.freeze_encoder import freeze_encoder
from tasks.fuse import fuse_again, fuse_night
from tasks.lease import lease
from tasks.prepare import chosen_folds, freeze_episodes, open_frames, prepare
from tasks.refine import refine
from tasks.report import plain
from tasks.stage import ledger, reset_ledger
from tasks.store import Ref, digest_of
from tasks.synthesise import synthesise
from tasks.tabulate import Row, StudyOutcome, tabulate, write_study
from tasks.tracking import night_run
from tasks.train_base import train_base
from tasks.train_meta import train_meta

SEVERITIES = (1, 3, 5)


@flow(name="study", log_prints=False, validate_parameters=False)
def study(name: str, recipe: Recipe | str = "smoke", seeds: Sequence[int] = SEEDS) -> StudyOutcome:
    """Run one of STUDIES on the pictures of a recipe. Raises UsageError that lists the names."""
    return conduct(STUDIES, name, named(recipe), seeds)


def conduct(studies: Mapping[str, Callable], name: str, recipe: Any, seeds: Sequence[int]) -> StudyOutcome:
    """Run one of `studies`, alone in the store. Raises UsageError that lists the names, and LeaseHeld."""
    if name not in studies:
        raise unknown("study", name, studies)
    places.prepare_environment()
    reset_ledger()
    with lease(places.store(), f"study-{name}-{recipe.name}"):
        return studies[name](recipe, tuple(seeds))


def trial(name: str, recipe: Recipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """Variants of the learners, each fitted with every seed on the same pictures."""
    compute = recipe.compute
    frames = prepare(recipe.data, compute)
    folds = chosen_folds(frames, recipe.data)
    episodes = freeze_episodes(frames, replace(recipe.episodes, seeds=seeds), recipe.data)
    encoder = freeze_encoder(recipe.encoder)
    plan = PLANS[name](recipe, has_visible(frames))
    pictures = [paint(palette, frames, encoder, folds, recipe) for palette in plan.palettes]
    cells = compare(frames, encoder, episodes, pictures, plan.variants, seeds, folds, compute)

    rows, names = places.store().rows(cells), [variant.name for variant in plan.variants]
    table = cell_table(rows, names)
    opened = open_frames(frames)
    classes = {fold: opened.novel(fold) for fold in folds}
    found = tabulate(table, plan.rows, plan.references, classes, recipe.exam.resamples, held_out_scores(rows, names))
    chart = charts.dots(found.to_dict("records"), plan.references[-1 if name == "mix" else 1])
    return publish(name, recipe, [cells], found, plan.references, chart)


def strain(recipe: Recipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """The one model of the night on test frames that get worse and worse; visible pictures stay as they are."""
    compute = recipe.compute
    frames = prepare(recipe.data, compute)
    folds = chosen_folds(frames, recipe.data)
    episodes = freeze_episodes(frames, recipe.episodes, recipe.data)
    encoder = freeze_encoder(recipe.encoder)
    translators = fit_translators(frames, recipe.translate, compute)
    synthetic = synthesise(frames, translators, recipe.translate, compute)
    labels = refine(frames, synthetic, encoder, recipe.refine, compute)
    base = train_base(frames, synthetic, labels, encoder, recipe.base, folds, compute)
    shown = fuse_night(frames, synthetic, recipe.fuse, folds, compute)
    model = train_meta(
        frames, synthetic, labels, encoder, base, translators, recipe.meta, folds, recipe.translate.generator, compute,
        shown, recipe.fuse,
    )
    test = replace(recipe.translate, splits=("test",))
    exams = {}
    for corruption, severity in [(kind, severity) for kind in CORRUPTIONS for severity in (0, *SEVERITIES)]:
        spoilt = degrade(frames, corruption, severity, compute) if severity else frames
        pictures = synthesise(spoilt, translators, test, compute) if severity else synthetic
        again = fuse_again(spoilt, model, pictures, compute) if severity else shown
        exams[corruption, severity] = evaluate(model, spoilt, pictures, episodes, recipe.exam, compute, again)

    opened = open_frames(frames)
    classes = {fold: opened.novel(fold) for fold in folds}
    found, panels = strained(exams, recipe, classes)
    chart = charts.curves(panels, "severity")
    return publish("degradation", recipe, list(exams.values()), found, ("clean_fusion",), chart)


STUDIES = {name: partial(trial, name) for name in PLANS} | {"degradation": strain}


def strained(exams: dict[tuple[str, int], Ref], recipe: Recipe, classes) -> tuple:
    """The table of all conditions, and the chart's panels: corruption -> stream -> (severity, mIoU, low, high)."""
    parts, rows, where = [], [], {}
    for (corruption, severity), exam in exams.items():
        condition = f"{corruption}_{severity}" if severity else "clean"
        part = exam_table(exam).assign(seed=recipe.episodes.seeds[0])
        streams = list(dict.fromkeys(part["stream"]))
        where |= {(corruption, severity, stream): f"{condition}_{stream}" for stream in streams}
        if f"{condition}_{streams[0]}" in {row.name for row in rows}:
            continue
        parts.append(part.assign(stream=f"{condition}_" + part["stream"]))
        about = f"{corruption} at severity {severity}" if severity else "frames as they are"
        rows += [Row(f"{condition}_{stream}", about, f"{condition}_{stream}") for stream in streams]
    found = tabulate(pd.concat(parts, ignore_index=True), rows, ("clean_fusion",), classes, recipe.exam.resamples)
    by_name = found.set_index("row")
    panels: dict[str, dict[str, list]] = {}
    for (corruption, severity, stream), name in where.items():
        point = (severity, *(by_name.loc[name, column] for column in ("miou", "low", "high")))
        panels.setdefault(corruption, {}).setdefault(stream, []).append(point)
    return found, panels


def has_visible(frames: Ref) -> bool:
    opened = open_frames(frames)
    return all(opened.has(id, "visible") for id in (*opened.ids("train"), *opened.ids("test")))


def paint(palette: Palette, frames: Ref, encoder: Ref, folds: Sequence[int], recipe: Recipe) -> Pictures:
    """The stages of a night up to its base learner."""
    translators = fit_translators(frames, palette.translate, recipe.compute)
    synthetic = synthesise(frames, translators, palette.translate, recipe.compute)
    labels = refine(frames, synthetic, encoder, recipe.refine, recipe.compute)
    base = train_base(frames, synthetic, labels, encoder, palette.base, folds, recipe.compute)
    shown = fuse_night(frames, synthetic, palette.fuse, folds, recipe.compute)
    return Pictures(synthetic, labels, base, shown and shown.pictures)


def publish(
    name: str, recipe: Any, asked: Any, table: pd.DataFrame, references: Sequence[str], chart,
    text: str | None = None, pictures: Mapping[str, bytes] | None = None,
) -> StudyOutcome:
    """Write the study down, here and in MLflow.

    asked: what it was made of besides the recipe, for its key. text: the table for people, where it is not one of mIoU.
    """
    key = f"{name}-{recipe.name}-{digest_of('study', [], (asked, replace(recipe, compute=None, about='')))[:10]}"
    with night_run(f"study {name} {recipe.name}", key, recipe, {"study": name}) as run:
        report = write_study(name, recipe, key, table, references, png(chart), run, text, pictures or {})
    rows = tuple(plain(table.to_dict("records")))
    return StudyOutcome(name, recipe.name, key, tuple(references), rows, tuple(ledger()), report)
