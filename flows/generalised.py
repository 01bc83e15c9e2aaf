"""Generalised: class names and K supports in, a segmenter of base and novel classes out, and what each step was worth.

    thermofuse run toy-foundation      # where no foundation models can be fetched: small ones, from scratch
    thermofuse run toy-gfss

Read it top to bottom. Pictures depend on no support and labels on no picture's making, so a sweep of labels draws
nothing, and another list of supports neither. What is finished is reused.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
from prefect import flow

from flows.generalised_recipes import GeneralisedRecipe, named
from flows.recipes import run_key
from tasks import places
from tasks.carry import carry
from tasks.compare_generalised import Lesson, compare_generalised, graded_cells
from tasks.evaluate_generalised import evaluate_generalised, grade_generalised
from tasks.fit_foundation import FoundationSettings, fit_foundation
from tasks.fit_translators import fit_translators
from tasks.freeze_encoder import freeze_encoder
from tasks.illustrate_generalised import foundation_quality, illustrate_foundation, illustrate_lesson
from tasks.imagine import imagine
from tasks.label import label
from tasks.lease import lease
from tasks.prepare import chosen_folds, open_frames, prepare
from tasks.pretrain import PretrainSettings, pretrain
from tasks.propose import propose
from tasks.report_generalised import GeneralisedOutcome, report_generalised
from tasks.shots import choose_queries, choose_supports
from tasks.stage import ledger, reset_ledger
from tasks.store import Ref
from tasks.tabulate_generalised import step_scores
from tasks.tracking import night_run
from tasks.train_generalised import train_generalised_base, train_joint


@flow(name="foundation", log_prints=False, validate_parameters=False)
def foundation(recipe: GeneralisedRecipe | str = "toy-foundation") -> GeneralisedOutcome:
    """The toy world's own text-to-image pipeline and SAM, into the store."""
    places.prepare_environment()
    recipe = named(recipe)
    reset_ledger()
    with lease(places.store(), f"foundation-{recipe.name}"):
        frames = prepare(recipe.data, recipe.compute)
        made = [foundation_of(recipe, frames, fold) for fold in chosen_folds(frames, recipe.data)]
        key = run_key(recipe, made)
        with night_run(recipe.name, key, recipe, {"frames": frames.digest}) as run:
            models = dict(enumerate(ref.uri for ref in made))
            outcome = GeneralisedOutcome(key, recipe.name, foundation_quality(made[0]), tuple(ledger()), models)
            return report_generalised(outcome, run=run, **illustrate_foundation(recipe, made[0]))


@flow(name="generalised", log_prints=False, validate_parameters=False)
def generalised(recipe: GeneralisedRecipe | str = "toy-gfss") -> GeneralisedOutcome:
    """Pictures of novel classes, labels for them, a joint model, and the scores of every step of the recipe."""
    places.prepare_environment()
    recipe = named(recipe)
    reset_ledger()
    with lease(places.store(), f"generalised-{recipe.name}"):
        frames = prepare(recipe.data, recipe.compute)
        folds = chosen_folds(frames, recipe.data)
        encoders = {fold: encoder_of(recipe, frames, fold) for fold in folds}
        inputs = {"frames": frames, **{f"encoder_{fold}": ref for fold, ref in encoders.items()}}
        key = run_key(recipe, list(inputs.values()))

        with night_run(recipe.name, key, recipe, {name: ref.digest for name, ref in inputs.items()}) as run:
            # What each step is worth: the same supports, the same exam, one thing added at a time.
            lessons = [lesson(recipe, frames, encoders[fold], fold, seed)
                       for fold in folds for seed in recipe.shots.seeds]
            table = pd.concat([compared(recipe, frames, encoders[one.fold], one) for one in lessons], ignore_index=True)

            # The model: the whole method, on the first list of supports of each fold.
            taught = lessons[:: len(recipe.shots.seeds)]
            models = {one.fold: learn(recipe, frames, encoders[one.fold], one) for one in taught}
            marks = pd.concat([examined(recipe, frames, encoders[one.fold], one, models[one.fold]) for one in taught])
            found, made = step_scores(table, recipe.steps, marks), {fold: ref.uri for fold, ref in models.items()}
            outcome = GeneralisedOutcome(key, recipe.name, found, tuple(ledger()), made)
            own = foundation_of(recipe, frames, taught[0].fold)
            shown = illustrate_lesson(recipe, frames, taught[0].synthetic, own, found)
            return report_generalised(outcome, run=run, **shown)


def lesson(recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, fold: int, seed: int) -> Lesson:
    """What the steps of one fold share with one list of supports: base model, pictures, labels."""
    supports = choose_supports(frames, recipe.shots, fold, seed)
    base = train_generalised_base(frames, encoder, recipe.train, fold, recipe.compute)
    make = drawn_in_infrared if recipe.carry else drawn
    synthetic = {source: make(recipe, frames, encoder, base, supports, fold, source) for source in recipe.sources}
    return Lesson(fold, seed, supports, base, synthetic)


def drawn(
    recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, base: Ref, supports: dict, fold: int, source: str,
) -> tuple[Ref, Ref]:
    """The pictures of a source's prompts, and their labels."""
    own = foundation_of(recipe, frames, fold)
    prompts = propose(frames, own, fold, recipe.proposed(source))
    imagined = imagine(prompts, own, recipe.imagine, recipe.compute)
    return imagined, label(frames, encoder, base, imagined, own, supports, recipe.labelled(source), recipe.compute)


def drawn_in_infrared(
    recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, base: Ref, supports: dict, fold: int, source: str,
) -> tuple[Ref, Ref]:
    """The same for infrared frames: drawn and labelled in visible light, then carried over and checked again."""
    visible = train_generalised_base(frames, encoder, replace(recipe.train, layer="visible"), fold, recipe.compute)
    imagined, labels = drawn(recipe, frames, encoder, visible, supports, fold, source)
    translators = fit_translators(frames, recipe.translate, recipe.compute) if recipe.translate else None
    both = carry(frames, encoder, base, imagined, labels, translators, supports, recipe.carry, recipe.compute)
    return both, both


def foundation_of(recipe: GeneralisedRecipe, frames: Ref, fold: int) -> Ref | None:
    """The pipeline and SAM that are fitted for a fold, where no published ones are named."""
    if recipe.foundation is None:
        return None
    captioned = captioned_for(recipe.foundation, recipe, frames)
    return fit_foundation(frames, captioned, recipe.foundation, fold, recipe.compute)


def captioned_for(settings: FoundationSettings | PretrainSettings, recipe: GeneralisedRecipe, frames: Ref) -> Ref:
    """The captioned pictures that the settings name, or the frames of the run."""
    return prepare(settings.captioned, recipe.compute) if settings.captioned else frames


def encoder_of(recipe: GeneralisedRecipe, frames: Ref, fold: int) -> Ref:
    """The recipe's encoder: with the weights that it names, or fitted on captions of the fold's base classes."""
    if recipe.pretrain is None or recipe.encoder.weights != "random":
        return freeze_encoder(recipe.encoder)
    opened, captioned = open_frames(frames), captioned_for(recipe.pretrain, recipe, frames)
    base = [opened.class_name(k) for k in opened.base(fold)]
    return pretrain(captioned, recipe.encoder, base, recipe.pretrain, recipe.compute)


def compared(recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, one: Lesson) -> pd.DataFrame:
    """The scores of every step with one list of supports."""
    queries = choose_queries(frames, one.supports)
    cells = compare_generalised(frames, encoder, one, queries, recipe.steps, recipe.train, recipe.compute)
    return graded_cells(cells, frames, one.fold, one.seed)


def learn(recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, one: Lesson) -> Ref:
    """The joint model of the last step that needs no real masks, with checkpoints."""
    step = [step for step in recipe.steps if not step.truth and not step.control][-1]
    synthetic, train = one.synthetic.get(step.source), replace(recipe.train, seed=one.seed)
    return train_joint(
        frames, encoder, one.base, synthetic, one.supports, train, one.fold, recipe.compute, upto=step.upto,
        paste=step.paste,
    )


def examined(recipe: GeneralisedRecipe, frames: Ref, encoder: Ref, one: Lesson, model: Ref) -> pd.DataFrame:
    """The scores of a model on the frames that its lesson asks about."""
    exam = evaluate_generalised(frames, encoder, model, choose_queries(frames, one.supports), recipe.compute)
    return grade_generalised(exam, frames, one.fold, seed=one.seed)
