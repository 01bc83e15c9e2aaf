"""Studies of Syn4Seg: what each of its steps is worth, and how good its labels are where the truth is known.

    thermofuse study syn4seg toy-gfss
    thermofuse study labels msrs-gfss

Each seed is a list of supports and a training. Cells are fanned out on Ray and kept one by one: a study that was killed
goes on with the next, one with more seeds makes only what is new, and steps share pictures, labels and base models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
from prefect import flow

from flows.catalogue import SEEDS
from flows.generalised import compared, encoder_of, foundation_of, lesson
from flows.generalised_recipes import FOUNDATIONS, GeneralisedRecipe, named
from flows.studies import conduct, publish
from models.charts import dots
from tasks import judge_labels as judged
from tasks import tabulate_generalised
from tasks.illustrate_generalised import TITLES, step_chart
from tasks.judge_labels import counted, judge_labels, label_scores
from tasks.label import LabelStage
from tasks.prepare import chosen_folds, prepare
from tasks.shots import choose_queries, choose_supports
from tasks.store import Ref
from tasks.tabulate import StudyOutcome
from tasks.tabulate_generalised import REFERENCES
from tasks.tabulate_generalised import tabulate_generalised as tabulate_steps
from tasks.train_generalised import train_generalised_base


@flow(name="study-generalised", log_prints=False, validate_parameters=False)
def study(name: str, recipe: GeneralisedRecipe | str = "toy-gfss", seeds: Sequence[int] = SEEDS) -> StudyOutcome:
    """Run one of STUDIES. Raises UsageError that lists the names."""
    return conduct(STUDIES, name, named(recipe), seeds)


def steps(recipe: GeneralisedRecipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """Every step of the recipe with every seed: base, novel and harmonic mIoU, and what a step adds."""
    frames = prepare(recipe.data, recipe.compute)
    encoders = {fold: encoder_of(recipe, frames, fold) for fold in chosen_folds(frames, recipe.data)}
    lessons = [lesson(recipe, frames, encoder, fold, seed) for seed in seeds for fold, encoder in encoders.items()]
    scores = pd.concat([compared(recipe, frames, encoders[one.fold], one) for one in lessons], ignore_index=True)
    found = tabulate_steps(scores, recipe.steps)
    rows = found.to_dict("records")
    return publish("syn4seg", recipe, (frames, *encoders.values(), seeds), found, REFERENCES, step_chart(rows),
                   tabulate_generalised.markdown(rows))


def labels(recipe: GeneralisedRecipe, seeds: tuple[int, ...]) -> StudyOutcome:
    """Real test frames of the novel classes, labelled as if they had no mask: the label after each step."""
    compute = recipe.compute
    frames = prepare(recipe.data, compute)
    encoders = {fold: encoder_of(recipe, frames, fold) for fold in chosen_folds(frames, recipe.data)}
    parts = []
    for fold, encoder in encoders.items():
        base = train_generalised_base(frames, encoder, recipe.train, fold, compute)
        rule, foundation = segmenter_of(recipe, frames, fold)
        for seed in seeds:
            supports = choose_supports(frames, recipe.shots, fold, seed)
            queries = choose_queries(frames, supports)
            found = judge_labels(frames, encoder, base, foundation, supports, queries, rule, fold, compute)
            parts.append(counted(found, fold=fold, seed=seed))
    table = label_scores(pd.concat(parts, ignore_index=True))
    named_steps = {"sabr": f"{TITLES['sabr']}, with the SAM of {recipe.label.sam}"}
    table.insert(1, "about", [named_steps.get(step, TITLES[step]) for step in table["row"]])
    text = judged.markdown(table.to_dict("records")) + f"\nSAM: {recipe.label.sam}.\n"
    table = table.rename(columns={"miou_low": "low", "miou_high": "high"})
    chart = dots(table.to_dict("records"))
    return publish("labels", recipe, (frames, *encoders.values(), seeds), table, ("predict",), chart, text)


STUDIES: dict[str, Callable[[GeneralisedRecipe, tuple[int, ...]], StudyOutcome]] = {"syn4seg": steps, "labels": labels}


def segmenter_of(recipe: GeneralisedRecipe, frames: Ref, fold: int) -> tuple[LabelStage, Ref | None]:
    """How far labels can go, and the foundation models that bring a fitted SAM: the recipe's own, or those of another
    recipe whose name `label.sam` says. With "none" labels end where SAM would begin."""
    stage = recipe.label
    if stage.sam == "none":
        return replace(stage, rule=replace(stage.rule, upto="ape")), None
    if stage.sam in FOUNDATIONS:
        lender = named(stage.sam)
        lent = prepare(lender.data, lender.compute)
        return stage, foundation_of(lender, lent, chosen_folds(lent, lender.data)[0])
    return stage, foundation_of(recipe, frames, fold) if stage.sam == "foundation" else None
