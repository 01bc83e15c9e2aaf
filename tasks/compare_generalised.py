"""Fit the joint model of every step of a generalised study, and let each sit the same exam: the cells of one seed.

A cell is one step with one list of supports. The cells of a seed go out to actors one by one and are kept one by one:
a study that was killed goes on with the next, and one with more seeds makes only what is new. An actor encodes a
picture once, for all of its cells. Training is that of `tasks.train_generalised`, step for step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from models.backbone import load_encoder
from models.errors import StageFailed
from models.frames import Frames
from models.geometry import Canvas
from models.views import FeatureBank
from tasks import evaluate_generalised, places, train_generalised
from tasks.evaluate_generalised import Exam, graded
from tasks.fanout import Compute, fan_out
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref
from tasks.train_generalised import GeneralisedSettings, Joint, Parts

KIND = "generalised_cells"
CODE = ("tasks.compare_generalised", "models.labelling", *train_generalised.CODE, *evaluate_generalised.CODE)
DEADLINE_SECONDS = 12 * 3600
CHECK_EVERY = 20


@dataclass(frozen=True)
class Course:
    """What one step trains on beside base frames and supports. source: whose pictures ("" for none), by the proposer of
    their prompts. upto: how far their labels go (`models.labelling.LAST`). truth: the real training frames of the novel
    classes, with their masks. paste: what the pictures show, or without a source what the supports show, comes pasted
    on base frames (`models.paste`), which is not the paper's. control: no step that others build on."""

    name: str
    about: str = ""
    source: str = ""
    upto: str = "sabr"
    truth: bool = False
    paste: bool = False
    control: bool = False


@dataclass(frozen=True)
class Lesson:
    """What all courses of one fold and one seed share. synthetic: source -> pictures and labels."""

    fold: int
    seed: int
    supports: Mapping[int, tuple[str, ...]]
    base: Ref
    synthetic: Mapping[str, tuple[Ref, Ref]]


@stage("compare_generalised")
def compare_generalised(
    frames: Ref, encoder: Ref, lesson: Lesson, queries: Sequence[str], courses: Sequence[Course],
    settings: GeneralisedSettings, compute: Compute,
) -> Ref:
    """Kind "generalised_cells": one row a course; `exam` holds what its model said of each query, as JSON."""
    sources = list(lesson.synthetic)
    rows = [{"id": course.name, "source": sources.index(course.source) if course.source else None,
             "upto": course.upto, "truth": course.truth, "paste": course.paste}
            for course in courses]
    chosen = {"train": replace(settings, seed=lesson.seed), "fold": lesson.fold, "queries": list(queries),
              "supports": {str(k): list(ids) for k, ids in lesson.supports.items()}}
    inputs = [frames, encoder, lesson.base, *(ref for pair in lesson.synthetic.values() for ref in pair)]
    alone = replace(compute, shard_size=1, shard_deadline_seconds=DEADLINE_SECONDS, max_quarantined=0.0)
    return fan_out(Classroom, rows, chosen, alone, kind=KIND, inputs=inputs, code=CODE)


def graded_cells(cells: Ref, frames: Ref, fold: int, seed: int) -> pd.DataFrame:
    """The scores of all courses (`tasks.evaluate_generalised.graded`), with fold, seed and step."""
    opened, parts = open_frames(frames), []
    for row in places.store().rows(cells).to_dict("records"):
        exam = pd.DataFrame(json.loads(row["exam"]))
        parts.append(graded(exam, opened, fold, seed=seed, step=row["id"]))
    return pd.concat(parts, ignore_index=True)


class Classroom:
    """The worker: frames, encoder and base model; one bank of features for all its courses."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, self.base, *pairs = inputs
        self.pairs = [tuple(pairs[n : n + 2]) for n in range(0, len(pairs), 2)]
        self.train: GeneralisedSettings = settings["train"]
        self.fold, self.queries = settings["fold"], settings["queries"]
        self.supports = {int(k): ids for k, ids in settings["supports"].items()}
        self.frames = Frames.open(frames)
        self.encoder = load_encoder(encoder).to("cuda" if torch.cuda.is_available() else "cpu")
        budget = int(self.train.cache_gb * 2**30)
        # One by one: what a picture is encoded beside must not decide a cell.
        self.bank = FeatureBank(self.encoder, None, Canvas(self.train.size), budget, batch=1)

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [{"id": row["id"], "exam": json.dumps(self.cell(row))} for row in shard]

    def cell(self, row: dict) -> list[dict]:
        """Train one course and ask its model: {"id", "all", "single"} of each query."""
        pair = () if row["source"] is None else self.pairs[row["source"]]
        chosen = self.frames, self.encoder, pair, self.train, self.fold
        told = row["truth"], row["upto"], row["paste"]
        parts = Parts(*chosen, *told, self.supports, self.bank)
        joint = Joint(parts, self.base, self.train, self.supports)
        for step in range(self.train.joint.steps):
            losses = joint.step(step)
            if step % CHECK_EVERY == 0 and not torch.isfinite(losses["loss"]):
                raise StageFailed(f"The loss of {row['id']} is not finite at step {step}; lower train.joint.rate.")
        exam = Exam(self.frames, self.encoder, joint.model, self.train.size, self.train.layer)
        return [{"id": id} | exam.count(id) for id in self.queries]
