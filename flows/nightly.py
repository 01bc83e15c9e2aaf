"""Nightly: real infrared frames in, a promoted (or refused) fusion model out.

    thermofuse run msrs-1shot                      # here, or on the cluster that RAY_ADDRESS names
    prefect deployment run nightly/nightly

Read it top to bottom. What passes from one line to the next is a Ref: an address and a digest, never a tensor. A
finished Ref is never computed twice, so a failed night is repaired by running it again.
"""

from __future__ import annotations

from prefect import flow

from flows.recipes import Recipe, named, run_key
from tasks import places
from tasks.evaluate import evaluate, exam_table, grade, sit_again
from tasks.fit_translators import fit_translators
from tasks.freeze_encoder import freeze_encoder
from tasks.fuse import fuse_night
from tasks.illustrate import illustrate
from tasks.judge_pictures import judge_pictures, layer_scores
from tasks.lease import lease
from tasks.prepare import chosen_folds, freeze_episodes, prepare
from tasks.promote import promote
from tasks.refine import refine
from tasks.register import register
from tasks.report import Outcome, report
from tasks.stage import ledger, reset_ledger
from tasks.synthesise import synthesise
from tasks.tracking import night_run
from tasks.train_base import train_base
from tasks.train_meta import train_meta


@flow(name="nightly", log_prints=False, validate_parameters=False)
def nightly(recipe: Recipe | str = "smoke") -> Outcome:
    """Synthesise, refine, train two views, fuse them, and promote only what is better on the same exam."""
    places.prepare_environment()
    recipe = named(recipe)
    reset_ledger()
    with lease(places.store(), f"nightly-{recipe.name}"):
        compute = recipe.compute
        frames = prepare(recipe.data, compute)
        folds = chosen_folds(frames, recipe.data)
        episodes = freeze_episodes(frames, recipe.episodes, recipe.data)
        encoder = freeze_encoder(recipe.encoder)
        inputs = {"frames": frames, "episodes": episodes, "encoder": encoder}
        key = run_key(recipe, list(inputs.values()))

        with night_run(recipe.name, key, recipe, {name: ref.digest for name, ref in inputs.items()}) as run:
            # Pictures. Lightness sharpens infrared, RGB adds the channels it lacks; a fused one, where the recipe asks
            # for it, shows both at once. They are judged before use.
            translators = fit_translators(frames, recipe.translate, compute)
            synthetic = synthesise(frames, translators, recipe.translate, compute)
            quality = layer_scores(judge_pictures(frames, synthetic, encoder, recipe.judge, compute, run))
            fused = fuse_night(frames, synthetic, recipe.fuse, folds, compute)

            # Labels. They come over pixel by pixel; a region counts only where the picture still shows its class.
            labels = refine(frames, synthetic, encoder, recipe.refine, compute)

            # Learners. Novel classes never reach a loss, nor the choice of a checkpoint.
            base = train_base(frames, synthetic, labels, encoder, recipe.base, folds, compute)
            model = train_meta(
                frames, synthetic, labels, encoder, base, translators,
                recipe.meta, folds, recipe.translate.generator, compute, fused, recipe.fuse,
            )

            # Judgement. Novel classes are asked for here, for the first time.
            exam = evaluate(model, frames, synthetic, episodes, recipe.exam, compute, fused)
            scores, table = grade(exam, frames, recipe.exam).as_dict(), exam_table(exam)
            version = register(
                model, scores, table, run=run,
                dataset=recipe.data.dataset, shots=recipe.episodes.shots, exam=episodes.digest,
            )
            again = sit_again(frames, episodes, recipe.translate, recipe.exam, compute)
            verdict = promote(version, table, recipe.gate, rescore=again)
            outcome = Outcome(key, recipe.name, verdict, version, scores, tuple(ledger()), pictures=quality)
            return report(outcome, run=run, **illustrate(recipe, exam, frames, translators, labels, scores))


if __name__ == "__main__":
    print(nightly())
