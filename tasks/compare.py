"""Fit many variants of the learners and let them sit the same frozen exam: the cells of a study.

A cell is one variant with one seed: its meta learners and fusion are fitted for every fold, and sit the episodes whose
supports that seed drew. All cells of a seed are one shard: what the frozen networks say about an episode is worked out
once and read by every variant. A cell that is done is kept at once, for whatever study asks for it: one that was killed
goes on with the next, and one with another variant or more seeds makes only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from models.backbone import load_encoder
from models.episode import EpisodeKey, from_rows
from models.frames import Frames
from models.geometry import Canvas
from models.metrics import COUNTS, episode_counts
from models.segmenters.desk import Desk
from models.segmenters.expert import Expert
from models.segmenters.lessons import Best, MetaSettings, courses
from models.views import FeatureBank, PseudoViews, episode_mask
from tasks import places, train_meta
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Ref, digest_of
from tasks.train_meta import Experts, batch_losses, fresh_experts, optimisers, update

CODE = ("tasks.compare", "models.metrics", *train_meta.CODE)
DEADLINE_SECONDS = 12 * 3600
CONTROL = "prototype"


class Pictures(NamedTuple):
    """What a variant learns from: kinds "synthetic", "pseudolabels", "base" and, where one is a stream, "fused"."""

    synthetic: Ref
    labels: Ref
    base: Ref
    fused: Ref | None = None


@dataclass(frozen=True)
class Variant:
    """One row of a study. pictures: which of the study's `Pictures` it learns from."""

    name: str
    about: str
    meta: MetaSettings = field(default_factory=MetaSettings)
    pictures: int = 0


@stage("compare")
def compare(
    frames: Ref, encoder: Ref, episodes: Ref, pictures: Sequence[Pictures], variants: Sequence[Variant],
    seeds: Sequence[int], folds: Sequence[int], compute: Compute,
) -> Ref:
    """Kind "cells": one row per variant and seed; `exam` holds its episodes as JSON (`cell_table`), `held_out` the mIoU
    of base classes that its training did not see, which is what variants may be chosen by.

    episodes: the exam, drawn with the same seeds. seeds: of the training episodes, too.
    """
    asked = from_rows(places.store().rows(episodes))
    rows = [
        {"id": f"{v.name}.{seed}", "variant": n, "seed": seed,
         "digest": cell_digest((frames, encoder, *pictures[v.pictures]), asked, v.meta, seed, folds)}
        for seed in seeds for n, v in enumerate(variants)
    ]
    fused = [each.fused for each in pictures if each.fused]
    settings = {"variants": [replace(v, about="") for v in variants], "folds": tuple(folds)}
    settings["fused"] = [each.fused is not None for each in pictures]
    wide = replace(compute, shard_size=len(variants), shard_deadline_seconds=DEADLINE_SECONDS, max_quarantined=0.0)
    inputs = [frames, encoder, episodes, *chain.from_iterable(each[:3] for each in pictures), *fused]
    return fan_out(Laboratory, rows, settings, wide, kind="cells", inputs=inputs, code=CODE)


def cell_digest(
    inputs: Sequence[Ref | None], episodes: Sequence[EpisodeKey], meta: MetaSettings, seed: int, folds: Sequence[int]
) -> str:
    """What a cell is kept under: its own pictures, settings, and the episodes of its seed."""
    asked = {"meta": replace(meta, seed=seed), "folds": tuple(folds), "episodes": of_seed(episodes, seed)}
    return digest_of("cell", list(filter(None, inputs)), asked, CODE)


def of_seed(episodes: Sequence[EpisodeKey], seed: int) -> list[EpisodeKey]:
    return [key for key in episodes if key.seed == seed]


def cell_table(cells: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """All episodes of all cells: seed, stream (`<variant>:<stream>`) and `models.metrics.COLUMNS`.

    cells: rows of a Ref of kind "cells"; names: of the variants. An episode has one number in all variants.
    """
    parts = []
    for row in cells.to_dict("records"):
        table = pd.DataFrame(json.loads(row["exam"]))
        parts.append(table.assign(seed=row["seed"], stream=names[row["variant"]] + ":" + table["stream"]))
    return pd.concat(parts, ignore_index=True)


def held_out_scores(cells: pd.DataFrame, names: Sequence[str]) -> dict[str, float]:
    """Variant -> mIoU in points on base classes that its training did not see, the mean over seeds; the known ones."""
    means = pd.to_numeric(cells["held_out"]).groupby(cells["variant"]).mean().dropna()
    return {names[n]: round(100 * float(value), 2) for n, value in means.items()}


class Laboratory:
    """Holds the frozen networks; a shard is the cells of one seed, one after the other."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, episodes, *pictures = inputs
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.variants, self.folds = settings["variants"], settings["folds"]
        self.frames, self.encoder = Frames.open(frames), encoder
        self.episodes = from_rows(pd.read_parquet(episodes / "rows.parquet"))
        fused = iter(pictures[3 * len(settings["fused"]) :])
        given = [next(fused) if has else None for has in settings["fused"]]
        self.pictures = [(*pictures[3 * n : 3 * n + 3], each) for n, each in enumerate(given)]
        self.banks: dict[tuple, FeatureBank] = {}
        self.desks: dict[tuple, Desk] = {}
        self.beside: dict[tuple, Desk] = {}
        self.seed: int | None = None

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [row | self._cell(row) for row in shard]

    def _cell(self, row: dict) -> dict:
        """The cell, made or found; there, episodes are numbered within their seed, here within the exam."""
        store = places.store()
        found = store.find("cell", row["digest"])
        if found is None:
            made, held_out = self.study(self.variants[row["variant"]], row["seed"])
            found = store.draft("cell", row["digest"]).commit(made, {"id": row["id"], "held_out": held_out})
        table, numbers = store.rows(found), [n for n, key in enumerate(self.episodes) if key.seed == row["seed"]]
        exam = table.assign(episode=[numbers[n] for n in table["episode"]]).to_dict("list")
        return {"exam": json.dumps(exam), "held_out": store.manifest(found)["meta"]["held_out"]}

    def study(self, variant: Variant, seed: int) -> tuple[pd.DataFrame, float | None]:
        """Fit one variant and examine it: its table, and its mIoU on held-out base classes."""
        meta = replace(variant.meta, seed=seed)
        desk = self._desk(variant, seed)
        experts, held_out = fit_experts(desk, self.pictures[variant.pictures][2], self.folds, meta, self.device)
        asked = enumerate(of_seed(self.episodes, seed))
        rows = [row for n, key in asked for row in sit(desk, experts[str(key.fold)], key, n, meta)]
        return pd.DataFrame(rows), held_out

    def _desk(self, variant: Variant, seed: int) -> Desk:
        """The desk of these pictures and base learners at this size; a new seed clears all but features of frames."""
        if seed != self.seed:
            self.desks, self.beside, self.seed = {}, {}, seed
        meta, (synthetic, labels, base, fused) = variant.meta, self.pictures[variant.pictures]
        key = (synthetic, labels, fused, meta.size, meta.letterbox, meta.expert.wants)
        if key not in self.desks:
            if key not in self.banks:
                views = PseudoViews(self.frames, synthetic, labels, seed=seed, fused=fused)
                encoder = load_encoder(self.encoder, meta.expert.wants).to(self.device)
                canvas = Canvas(meta.size, meta.letterbox)
                self.banks[key] = FeatureBank(encoder, views, canvas, int(meta.cache_gb * 2**30))
            bank = self.banks[key]
            self.banks[key] = bank.showing(bank.views.of_seed(seed))
            self.desks[key] = Desk(self.banks[key])
        if (*key, base) not in self.beside:
            self.beside[*key, base] = self.desks[key].beside()
        return self.beside[*key, base]


def fit_experts(
    desk: Desk, base: Path, folds: Sequence[int], meta: MetaSettings, device: str
) -> tuple[nn.ModuleDict, float | None]:
    """The loop of `tasks.train_meta` in one process, with a desk that outlives it: the same steps, the same choice.

    Also how well the chosen did on the held-out base classes: mIoU, the mean over folds; None where none is held out.
    """
    views = desk.bank.views
    lessons = courses(views, folds, meta)
    experts = fresh_experts(views.frames, lessons, desk.bank.encoder, meta, base).to(device)
    model, best = Experts(experts), Best(experts)
    optimiser, schedule = optimisers(experts, meta)
    for step in range(meta.steps):
        if meta.selects and step % meta.validate_every == 0:
            best.examine(step, experts, lessons, desk.ask)
        update(experts, batch_losses(model, experts, lessons, desk, meta, step), optimiser, schedule)
    if meta.selects:
        best.examine(meta.steps, experts, lessons, desk.ask)
        best.load_into(experts)
    judged = [score for score in best.score.values() if score >= 0]
    return experts.eval(), sum(judged) / len(judged) if judged and meta.select_on == "held_out" else None


@torch.no_grad()
def sit(desk: Desk, expert: Expert, key: EpisodeKey, number: int, meta: MetaSettings) -> list[dict]:
    """One episode of the exam: counts of the decision, of each stream, and of the control on each stream."""
    out, _ = desk.ask(expert, key.fold, [key], [stream.layer for stream in meta.streams])
    truth = episode_mask(desk.bank.views.label(key.query), key.label).numpy()
    answers = {"all": out.final}
    for v, stream in enumerate(meta.streams):
        answers |= {stream.name: out.streams[:, v], f"{CONTROL}_{stream.name}": out.control[:, v]}
    answers[CONTROL] = out.control.sum(1)
    head = {"episode": number, "fold": key.fold, "label": key.label, "query": key.query}
    rows = []
    for stream, logits in answers.items():
        background, foreground = desk.bank.canvas.restore(logits.float().cpu(), *truth.shape)[0]
        counts = episode_counts(foreground > background, truth)
        rows.append({**head, "stream": stream, **dict(zip(COUNTS, counts.values(), strict=True))})
    return rows
