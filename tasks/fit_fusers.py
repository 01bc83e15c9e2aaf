"""Fit several small fusers side by side, as studies need them: one core and one actor each.

Each is the fuser that `tasks.fit_fuser` would fit, found there if a night has done so: the same steps from the same
seeds. What differs is that a fit that was killed starts over.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from models import FUSERS, find
from models.errors import StageFailed
from models.frames import Frames
from models.fusers.settings import FuserSettings
from models.views import Views
from tasks import places
from tasks.cells import Cell, side_by_side
from tasks.checkpoints import seed_step
from tasks.fanout import Compute
from tasks.fit_fuser import CODE, KIND, LOG_EVERY, FuserJob, PairCrops, build, given, job_of, training_pairs
from tasks.stage import stage
from tasks.store import Ref


@stage("fit_fusers")
def fit_fusers(
    frames: Ref, settings: Mapping[str, FuserSettings], compute: Compute, first: Ref | None = None
) -> dict[str, Ref]:
    """Name -> folder of a fuser, for each of the settings. first: an SGDFuse whose Stage I all of them take.

    Raises UsageError when there are no pairs to learn from.
    """
    controls = {name: given(s.fuser) for name, s in settings.items() if find(FUSERS, s.fuser).trainer is None}
    views = Views(Frames.open(places.store().local(frames)))
    for name in settings.keys() - controls.keys():
        training_pairs(views, FuserJob(settings[name]))
    cells = [cell(name, frames, s, first) for name, s in settings.items() if name not in controls]
    return controls | side_by_side(cells, compute)


def cell(name: str, frames: Ref, settings: FuserSettings, first: Ref | None = None) -> Cell:
    """The fit of one fuser, of no fold: every class of the train split may be seen."""
    job = job_of(settings)
    if first is None:
        return Cell(name, KIND, f"{__name__}:fit_one", job, (frames,), CODE)
    return Cell(name, KIND, f"{__name__}:fit_one", replace(job, first=first.digest), (frames, first), CODE)


def fit_one(job: FuserJob, inputs: list[Path], draft: Any) -> tuple[None, dict]:
    """The loop of `tasks.fit_fuser` in one process. Raises StageFailed when a loss is not finite."""
    from models.fusers.base import load_fuser

    frames, settings = Frames.open(inputs[0]), job.settings
    seed_step(settings.seed, -1)
    trainer = build(settings, frames)
    if job.first:
        trainer.take_first(load_fuser(inputs[1]))
    draw, history = PairCrops(Views(frames), job), []
    for step in range(settings.iterations):
        rng = seed_step(settings.seed, step)
        losses = trainer.iterate(draw(rng), step)
        if step % LOG_EVERY == 0 or step + 1 == settings.iterations:
            history.append({"step": step, **{name: float(value) for name, value in losses.items()}})
            if not all(math.isfinite(value) for value in history[-1].values()):
                raise StageFailed(f"A loss of {settings.fuser} is not finite at step {step}; lower its rates.")
    with tempfile.TemporaryDirectory() as folder:
        trainer.fuser.save(Path(folder))
        pd.DataFrame(history).to_parquet(Path(folder) / "history.parquet")
        draft.upload(Path(folder))
    return None, {"steps": settings.iterations, **history[-1]}
