"""Sit the frozen exam: every episode, every stream, the control beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.episode import EpisodeKey
from models.errors import UsageError
from models.frames import Frames, png_bytes, read_png
from models.generators.settings import TranslateSettings
from models.metrics import COUNTS, Scores, episode_counts, score
from models.plots import Example
from models.segmenters.episodes import BaseMemory, Batch, gather
from models.segmenters.predictor import load_experts, model_canvas
from models.views import FeatureBank, Stream, Views, episode_mask
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.fuse import Fused, fuse_again
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref
from tasks.synthesise import synthesise

CODE = (
    "tasks.evaluate", "models.backbone", "models.encoders", "models.views", "models.geometry", "models.metrics",
    "models.segmenters.episodes", "models.segmenters.expert", "models.segmenters.fusion", "models.segmenters.anchored",
    "models.segmenters.metric", "models.segmenters.msanet", "models.segmenters.prototype", "models.segmenters.pspnet",
    "models.segmenters.similarity",
)


CONTROLS = ("prototype", "prototype_both")


@dataclass(frozen=True)
class ExamSettings:
    """resamples: bootstrap draws. cache_gb: features an actor keeps. shown: episodes per class whose masks are kept."""

    resamples: int = 10_000
    cache_gb: float = 2.0
    shown: int = 1


@stage("evaluate")
def evaluate(
    model: Ref, frames: Ref, synthetic: Ref, episodes: Ref, settings: ExamSettings, compute: Compute,
    fused: Fused | None = None,
) -> Ref:
    """Kind "exam": one row per episode with counts per stream (`models.metrics.COUNTS`); masks of the shown ones.

    Streams: "prototype" (training-free, infrared), "prototype_both" (the control summed over all streams), each of the
    model's streams alone, and "fusion".
    """
    listed = places.store().rows(episodes)
    of_class = listed.groupby(["fold", "label"])["episode"]
    from_middle = of_class.cumcount() - of_class.transform("size") // 2  # the first queries of all classes are the same
    rows = [
        {"id": f"e{row['episode']:06d}", "shown": 0 <= n < settings.shown, "supports": list(map(str, row["supports"]))}
        | {key: (str if key == "query" else int)(row[key]) for key in ("episode", "fold", "label", "query", "seed")}
        for row, n in zip(listed.to_dict("records"), from_middle, strict=True)
    ]
    inputs = [frames, synthetic, model, *([fused.pictures] if fused else [])]
    return fan_out(Examiner, rows, {"cache_gb": settings.cache_gb}, compute, kind="exam", inputs=inputs, code=CODE)


class Examiner:
    """Holds the model; a shard is a list of episodes, one at a time, so that no result depends on its neighbours."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, synthetic, model, *fused = inputs
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config, encoder, experts = load_experts(model)
        self.experts = {fold: expert.to(device) for fold, expert in experts.items()}
        self.streams = [Stream(**stream) for stream in config["streams"]]
        self.views = Views(Frames.open(frames), synthetic, fused=fused[0] if fused else None)
        budget = int(settings["cache_gb"] * 2**30)
        self.bank = FeatureBank(encoder.to(device), self.views, model_canvas(config), budget, batch=1)
        self.memory = BaseMemory()

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        """By query, whose features and base map then serve all its classes and seeds; answers in the order asked."""
        order = sorted(range(len(shard)), key=lambda n: (shard[n]["fold"], shard[n]["query"], n))
        answers = {n: self.sit(shard[n], draft) for n in order}
        return [answers[n] for n in range(len(shard))]

    @torch.inference_mode()
    def sit(self, row: dict, draft: Any) -> dict:
        key = EpisodeKey(row["fold"], row["label"], row["query"], tuple(row["supports"]), row["seed"])
        batch = gather(self.bank, [key], [stream.layer for stream in self.streams])
        truth = episode_mask(self.views.label(key.query), key.label).numpy()
        result = {name: row[name] for name in ("id", "episode", "fold", "label", "query", "shown")}
        for stream, logits in self.answers(key, batch).items():
            scores = self.bank.canvas.restore(logits.float().cpu(), *truth.shape)
            mask = (scores[0, 1] > scores[0, 0]).numpy().astype(np.uint8)
            result |= {f"{stream}:{name}": count for name, count in episode_counts(mask, truth).items()}
            if row["shown"]:
                draft.write(f"masks/{row['id']}.{stream}.png", png_bytes(mask * 255))
        return result | {"supports": json.dumps(row["supports"])}

    def answers(self, key: EpisodeKey, batch: Batch) -> dict[str, torch.Tensor]:
        """Logits [1, 2, h, w] of the controls, of each stream, and fused."""
        expert = self.experts[key.fold]
        base = self.memory.logits(expert, key.fold, [(key.query, self.streams[0].layer)], batch.query[0])
        out = expert(batch.query, batch.support, batch.masks, base=base)
        control = {"prototype": out.control[:, 0], "prototype_both": out.control.sum(1)}
        alone = {stream.name: out.streams[:, v] for v, stream in enumerate(self.streams)}
        return {**control, **alone, "fusion": out.final}


def sit_again(
    frames: Ref, episodes: Ref, translate: TranslateSettings, settings: ExamSettings, compute: Compute
) -> Callable[[Any], pd.DataFrame]:
    """How an earlier version sits this exam: with its own learners, on pictures from the translators and the fuser it
    came with.

    Returns the function that `tasks.promote` calls with the version. It raises UsageError when the version's model is
    no longer in the store.
    """

    def rescore(version: Any) -> pd.DataFrame:
        store = places.store()
        if version.model is None or store.find(version.model.kind, version.model.digest) is None:
            raise UsageError(f"{version} is not in this store; point THERMOFUSE_STORE to the one that trained it.")
        generator = json.loads((store.local(version.model) / "config.json").read_text())["generator"]
        own = replace(translate, generator=generator, splits=("test",))
        synthetic = synthesise(frames, version.model, own, compute)
        fused = fuse_again(frames, version.model, synthetic, compute)
        return exam_table(evaluate(version.model, frames, synthetic, episodes, settings, compute, fused))

    return rescore


def exam_table(exam: Ref) -> pd.DataFrame:
    """One row per episode and stream (`models.metrics.COLUMNS`)."""
    rows = places.store().rows(exam)
    parts = []
    for stream in stream_names(rows.columns):
        part = rows[["episode", "fold", "label", "query"]].assign(stream=stream)
        parts.append(part.assign(**{name: rows[f"{stream}:{name}"] for name in COUNTS}))
    return pd.concat(parts, ignore_index=True)


def stream_names(columns: Iterable[str]) -> list[str]:
    """The streams of an exam's columns: controls, single modalities, then the fusion of them."""
    names = {column.rpartition(":")[0] for column in columns if ":" in column}
    return sorted(names, key=lambda name: (name == "fusion", name not in CONTROLS, name))


def grade(exam: Ref, frames: Ref, settings: ExamSettings) -> Scores:
    """mIoU, FB-IoU and their intervals for every stream, and the paired differences that matter."""
    opened, table = open_frames(frames), exam_table(exam)
    classes = {int(fold): opened.novel(int(fold)) for fold in sorted(table["fold"].unique())}
    alone = [s for s in dict.fromkeys(table["stream"]) if s not in (*CONTROLS, "fusion")]
    pairs = [(stream, "prototype") for stream in (*alone, "fusion")] + [("fusion", stream) for stream in alone]
    names = dict(enumerate(opened.classes, start=1))
    pairs.append(("fusion", "prototype_both"))
    return score(table, classes, names=names, pairs=pairs, resamples=settings.resamples)


def examples(exam: Ref, frames: Ref) -> list[Example]:
    """The shown episodes as rows of the qualitative grid."""
    store = places.store()
    folder, rows, opened = store.local(exam), store.rows(exam), open_frames(frames)
    return [_example(row, folder, opened) for row in rows[rows["shown"]].to_dict("records")]


def _example(row: dict, folder: Path, frames: Frames) -> Example:
    support = json.loads(row["supports"])[0]
    wanted = [name for name in stream_names(row) if name not in CONTROLS]
    return Example(
        name=frames.class_name(row["label"]),
        colour=frames.palette[row["label"] - 1],
        support=frames.infrared(support),
        support_mask=episode_mask(frames.label(support), row["label"]).numpy(),
        query=frames.infrared(row["query"]),
        truth=episode_mask(frames.label(row["query"]), row["label"]).numpy(),
        predictions={name: read_png(folder / f"masks/{row['id']}.{name}.png") // 255 for name in wanted},
    )
