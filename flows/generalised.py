"""Generalised: class names and K supports in, a segmenter of base and novel classes out, and what each step was worth.

    python -m flows.generalised toy-gfss

Read it top to bottom. Pictures depend on no support and labels on no picture's making, so a sweep of labels draws
nothing, and another list of supports neither. What is finished is reused.
"""

from __future__ import annotations

import sys

import pandas as pd
from prefect import flow

from flows.generalised_recipes import GeneralisedRecipe, Step, named
from models.generalised_metrics import summary
from tasks import places
from tasks.evaluate_generalised import evaluate_generalised, grade_generalised
from tasks.fit_foundation import fit_foundation
from tasks.freeze_encoder import freeze_encoder
from tasks.imagine import imagine
from tasks.label import label
from tasks.lease import lease
from tasks.prepare import chosen_folds, prepare
from tasks.propose import propose
from tasks.shots import choose_queries, choose_supports
from tasks.stage import reset_ledger
from tasks.store import Ref
from tasks.train_generalised import train_generalised_base, train_joint


@flow(name="foundation", log_prints=False, validate_parameters=False)
def foundation(recipe: GeneralisedRecipe | str = "toy-foundation") -> Ref:
    """The toy world's own text-to-image pipeline and SAM, into the store."""
    places.prepare_environment()
    recipe = named(recipe)
    reset_ledger()
    frames = prepare(recipe.data, recipe.compute)
    return fit_foundation(frames, recipe.foundation, chosen_folds(frames, recipe.data)[0], recipe.compute)


@flow(name="generalised", log_prints=False, validate_parameters=False)
def generalised(recipe: GeneralisedRecipe | str = "toy-gfss") -> pd.DataFrame:
    """Scores of every step of the recipe: step, protocol, metric, value, low, high, runs."""
    places.prepare_environment()
    recipe = named(recipe)
    reset_ledger()
    with lease(places.store(), f"generalised-{recipe.name}"):
        frames = prepare(recipe.data, recipe.compute)
        encoder = freeze_encoder(recipe.encoder)
        rows = [scores(recipe, step, frames, encoder, fold, seed)
                for fold in chosen_folds(frames, recipe.data)
                for seed in recipe.shots.seeds
                for step in recipe.steps]
        table = pd.concat(rows, ignore_index=True)
        return pd.concat([summary(part).assign(step=step) for step, part in table.groupby("step", sort=False)])


def scores(recipe: GeneralisedRecipe, step: Step, frames: Ref, encoder: Ref, fold: int, seed: int) -> pd.DataFrame:
    """One step of the study with one list of supports: train on what it has, and sit the exam."""
    compute = recipe.compute
    supports = choose_supports(frames, recipe.shots, fold, seed)
    base = train_generalised_base(frames, encoder, recipe.train, fold, compute)
    synthetic = pictures(recipe, step, frames, encoder, base, supports, fold) if step.labelled else None
    model = train_joint(frames, encoder, base, synthetic, supports, recipe.train, fold, compute, step.truth)
    exam = evaluate_generalised(frames, encoder, model, choose_queries(frames, supports), compute)
    return grade_generalised(exam, frames, fold, seed=seed, step=step.name)


def pictures(
    recipe: GeneralisedRecipe, step: Step, frames: Ref, encoder: Ref, base: Ref, supports: dict, fold: int,
) -> tuple[Ref, Ref]:
    """The synthetic pictures of a step's prompts, and their labels as far as the step goes."""
    compute = recipe.compute
    own = fit_foundation(frames, recipe.foundation, fold, compute) if recipe.foundation else None
    prompts = propose(frames, own, fold, recipe.proposed(step))
    imagined = imagine(prompts, own, recipe.imagine, compute)
    return imagined, label(frames, encoder, base, imagined, own, supports, recipe.labelled(step), compute)


if __name__ == "__main__":
    print(generalised(*sys.argv[1:2]).to_string(index=False))
