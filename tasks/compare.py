"""Fit many variants of the learners and let them sit the same frozen exam: the cells of a study.

A cell is one variant with one seed: its meta learners and fusion are fitted for every fold, and sit the episodes whose
supports that seed drew. All cells of a seed are one shard: what the frozen networks say about an episode is worked out
once and read by every variant. A cell that is done is kept at once; a study that was killed goes on with the next.

Legend: B episodes, K supports, V streams, E evidence maps, h x w grid of stride 8.
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
from torch import Tensor, nn

from models.backbone import Features, load_encoder
from models.episode import EpisodeKey, from_rows
from models.frames import Frames
from models.geometry import Canvas
from models.metrics import COUNTS, episode_counts
from models.segmenters.expert import Expert
from models.segmenters.fusion import EnsembleOut
from models.segmenters.lessons import Best, Lessons, MetaSettings, ask
from models.segmenters.prototype import Prototype
from models.segmenters.similarity import evidence, soft_mask, style_discrepancy, to_grid
from models.views import FeatureBank, Views, episode_mask
from tasks import train_meta
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Ref
from tasks.train import seed_step
from tasks.train_meta import ensemble_loss

CODE = ("tasks.compare", "models.metrics", *train_meta.CODE)
DEADLINE_SECONDS = 12 * 3600
CONTROL = "prototype"


class Pictures(NamedTuple):
    """What a variant learns from: kinds "synthetic", "pseudolabels" and "base"."""

    synthetic: Ref
    labels: Ref
    base: Ref


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
    """Kind "cells": one row per variant and seed; `exam` holds its episodes as JSON (`cell_table`).

    episodes: the exam, drawn with the same seeds. seeds: of the training episodes, too.
    """
    rows = [{"id": f"{v.name}.{seed}", "variant": n, "seed": seed} for seed in seeds for n, v in enumerate(variants)]
    settings = {"variants": [replace(v, about="") for v in variants], "folds": tuple(folds)}
    wide = replace(compute, shard_size=len(variants), shard_deadline_seconds=DEADLINE_SECONDS, max_quarantined=0.0)
    inputs = [frames, encoder, episodes, *chain(*pictures)]
    return fan_out(Laboratory, rows, settings, wide, kind="cells", inputs=inputs, code=CODE)


def cell_table(cells: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """All episodes of all cells: seed, stream (`<variant>:<stream>`) and `models.metrics.COLUMNS`.

    cells: rows of a Ref of kind "cells"; names: of the variants. An episode has one number in all variants.
    """
    parts = []
    for row in cells.to_dict("records"):
        table = pd.DataFrame(json.loads(row["exam"]))
        parts.append(table.assign(seed=row["seed"], stream=names[row["variant"]] + ":" + table["stream"]))
    return pd.concat(parts, ignore_index=True)


class Laboratory:
    """Holds the frozen networks; a shard is the cells of one seed, one after the other."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, episodes, *pictures = inputs
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.variants, self.folds = settings["variants"], settings["folds"]
        self.frames, self.encoder = Frames.open(frames), load_encoder(encoder).to(self.device)
        self.episodes = from_rows(pd.read_parquet(episodes / "rows.parquet"))
        self.pictures = [pictures[start : start + 3] for start in range(0, len(pictures), 3)]
        self.desks: dict[tuple, Desk] = {}
        self.seed: int | None = None

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [row | {"exam": self._cell(row, draft)} for row in shard]

    def _cell(self, row: dict, draft: Any) -> str:
        name = f"cells/{row['id']}.json"
        if not draft.exists(name):
            draft.write(name, json.dumps(self.study(self.variants[row["variant"]], row["seed"])).encode())
        return draft.read(name).decode()

    def study(self, variant: Variant, seed: int) -> dict[str, list]:
        """Fit one variant and examine it: columns of its table."""
        meta = replace(variant.meta, seed=seed)
        desk = self._desk(variant, seed)
        experts = fit_experts(desk, self.pictures[variant.pictures][2], self.folds, meta, self.device)
        asked = [(n, key) for n, key in enumerate(self.episodes) if key.seed == seed]
        rows = [row for number, key in asked for row in sit(desk, experts[str(key.fold)], key, number, meta)]
        return pd.DataFrame(rows).to_dict("list")

    def _desk(self, variant: Variant, seed: int) -> Desk:
        """The desk of these pictures at this size; a new seed clears all of them."""
        if seed != self.seed:
            self.desks, self.seed = {}, seed
        key = (variant.pictures, variant.meta.size)
        if key not in self.desks:
            views = Views(self.frames, *self.pictures[variant.pictures][:2])
            budget = int(variant.meta.cache_gb * 2**30)
            self.desks[key] = Desk(FeatureBank(self.encoder, views, Canvas(variant.meta.size), budget))
        return self.desks[key]


def fit_experts(
    desk: Desk, base: Path, folds: Sequence[int], meta: MetaSettings, device: str
) -> nn.ModuleDict:
    """The loop of `tasks.train_meta`, in one process and with the desk's memory: the same losses, the same choice."""
    torch.manual_seed(meta.seed)
    frames, encoder = desk.bank.views.frames, desk.bank.encoder
    experts = nn.ModuleDict({str(f): train_meta.load_expert(frames, f, encoder, meta, base) for f in folds}).to(device)
    learnt = [p for expert in experts.values() for p in expert.ensemble.parameters()]
    optimiser = torch.optim.AdamW(learnt, meta.rate, weight_decay=meta.weight_decay)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, meta.steps, power=0.9)
    lessons = {fold: Lessons(desk.bank.views, int(fold), meta) for fold in experts}
    best = Best(experts)
    for step in range(meta.steps):
        if meta.held_out and step % meta.validate_every == 0:
            best.examine(step, experts, lessons, desk.ask)
        seed_step(meta.seed, step, 0)
        experts.train()
        losses = []
        for fold, lesson in lessons.items():
            episodes, layers = lesson.batch(step, 0)
            out, targets = desk.ask(experts[fold], episodes, layers, lesson.novel, meta.novel_in_train)
            own = experts[fold].own_index([e.label for e in episodes]).to(device)
            losses.append(ensemble_loss(out, targets, own, meta))
        optimiser.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        schedule.step()
    if meta.held_out:
        best.examine(meta.steps, experts, lessons, desk.ask)
        best.load_into(experts)
    return experts.eval()


@torch.no_grad()
def sit(desk: Desk, expert: Expert, key: EpisodeKey, number: int, meta: MetaSettings) -> list[dict]:
    """One episode of the exam: counts of the decision, of each stream, and of the control on each stream."""
    out, _ = desk.ask(expert, [key], [stream.layer for stream in meta.streams])
    truth = episode_mask(desk.bank.views.label(key.query), key.label).numpy()
    answers = {"all": out.final}
    for v, stream in enumerate(meta.streams):
        answers |= {stream.name: out.streams[:, v], f"{CONTROL}_{stream.name}": out.control[:, v]}
    answers[CONTROL] = out.control.sum(1)
    head = {"episode": number, "fold": key.fold, "label": key.label, "query": key.query}
    rows = []
    for stream, logits in answers.items():
        said = desk.bank.canvas.restore(logits.float().cpu(), *truth.shape)[0].argmax(0).numpy()
        rows.append({**head, "stream": stream, **dict(zip(COUNTS, episode_counts(said, truth).values(), strict=True))})
    return rows


class Desk:
    """What episodes look like to learners that read similarity maps alone, each (episode, layer) worked out once.

    Learners that read more (raw features, attention) are asked the long way; the answer is the same either way.
    """

    def __init__(self, bank: FeatureBank) -> None:
        self.bank = bank
        self.maps: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.shares: dict[tuple, Tensor] = {}

    def ask(
        self, expert: Expert, episodes: Sequence[EpisodeKey], layers: Sequence[str], novel: Sequence[int] = (),
        policy: str = "ignore",
    ) -> tuple[EnsembleOut, Tensor]:
        """The expert's answers, and the targets uint8 [V, B, H, W] of each stream's layer."""
        if not reads_evidence_alone(expert):
            return ask(self.bank, expert, episodes, layers, novel, policy)
        own = expert.own_index([e.label for e in episodes]).to(self.bank.device)
        read = [[self._read(expert, e, layer, layers[0], novel, policy) for layer in layers] for e in episodes]
        maps = torch.stack([torch.stack([m for m, _ in row]) for row in read])
        psi = torch.stack([torch.stack([p for _, p in row]) for row in read])
        base = torch.cat([self._share(expert, e.query, layers[0], own[n : n + 1]) for n, e in enumerate(episodes)])
        targets = [[self._mask(e.query, e.label, layer, novel, policy) for e in episodes] for layer in layers]
        stacked = torch.stack([torch.stack(row) for row in targets]).to(self.bank.device)
        return decide(expert, maps, psi, base), stacked

    @torch.no_grad()
    def _read(self, expert: Expert, e: EpisodeKey, layer: str, shown: str, novel, policy) -> tuple[Tensor, Tensor]:
        """Evidence [E, h, w] and ψ [] of one episode on one layer; masks are those of the layer `shown`."""
        every_level = expert.ensemble.learners[0].correct is not None
        key = (e.label, e.query, e.supports, layer, shown, tuple(novel), policy, every_level)
        if key not in self.maps:
            levels = self.bank.get([(id, layer) for id in (e.query, *e.supports)])
            query = to_grid(Features(*(level[:1] for level in levels)), self.bank.grid)
            support = to_grid(Features(*(level[1:][None] for level in levels)), self.bank.grid)
            masks = torch.stack([self._mask(id, e.label, shown, novel, policy) for id in e.supports])[None]
            soft = soft_mask(masks.to(self.bank.device), self.bank.grid)
            psi = style_discrepancy(query[0], support[0]).mean(1)[0]
            self.maps[key] = evidence(query, support, soft, every_level)[0], psi
        return self.maps[key]

    def _share(self, expert: Expert, id: str, layer: str, own: Tensor) -> Tensor:
        key = (id, layer, int(own), expert.base_classes, expert.use_base)
        if key not in self.shares:
            self.shares[key] = expert.base_share(self.bank.get([(id, layer)]), self.bank.grid, own)
        return self.shares[key]

    def _mask(self, id: str, label: int, layer: str, novel: Sequence[int], policy: str) -> Tensor:
        return self.bank.canvas.label(episode_mask(self.bank.views.label(id, layer, novel, policy), label))


def reads_evidence_alone(expert: Expert) -> bool:
    return all(hasattr(one, "from_evidence") and not one.raw_width for one in expert.ensemble.learners)


def decide(expert: Expert, maps: Tensor, psi: Tensor, base: Tensor) -> EnsembleOut:
    """The second half of an expert's forward, from evidence [B, V, E, h, w], ψ [B, V] and P_b [B, 1, h, w]."""
    learners = expert.ensemble.learners
    streams = torch.stack([one.from_evidence(maps[:, v], base) for v, one in enumerate(learners)], 1)
    control = torch.stack([Prototype.from_evidence(maps[:, v]) for v in range(len(learners))], 1)
    return EnsembleOut(expert.ensemble.fusion(streams, psi, base), streams, psi, control)
