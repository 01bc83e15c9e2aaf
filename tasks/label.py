"""Label: every synthetic picture gets the label that the base model, the supports and SAM agree on.

Pictures are a stage of their own with a key of its own (`tasks.imagine`): sweeping β, τ, λ or the band costs labels,
and never a picture. A row of the fan-out is a batch of pictures, which share SAM's encoder; like there, a label depends
on its row alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.backbone import load_encoder
from models.errors import UsageError
from models.frames import Frames, png_bytes, read_png
from models.generators.inspection import QualitySettings
from models.geometry import Canvas
from models.labelling import Labeller, LabelSettings
from models.prototypes import Support
from models.pseudolabels import IGNORE
from models.sam import open_segmenter
from models.segmenters.generalised import load_model
from tasks.fanout import Compute, fan_out
from tasks.imagine import distinct_pictures, pictures_of
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref

KIND = "labelled"
LABEL_COLUMNS = ("id", "class_id", "picture", "labels", "statuses", "kept", "free", "changed", "target")
CODE = ("tasks.label", "models.labelling", "models.boundary", "models.relabel", "models.prototypes",
        "models.pseudolabels", "models.sam", "models.segmenters.generalised", "models.segmenters.pspnet",
        "models.backbone", "models.geometry")


@dataclass(frozen=True)
class LabelStage:
    """rule: how a label is made. sam: weights of SABR's segmenter (a file, folder or id), or "foundation" for the
    recipe's own. batch: pictures of one forward. quality: which pictures are passed over as copies. things: names of
    the classes that SAM outlines (() for all): boxes around roads, sky or grass say little."""

    rule: LabelSettings = field(default_factory=LabelSettings)
    sam: str = "foundation"
    batch: int = 4
    quality: QualitySettings = field(default_factory=QualitySettings)
    things: tuple[str, ...] = ()

    def rule_for(self, frames: Frames) -> LabelSettings:
        """The rule, with the things by their ids. Raises UsageError that lists the classes."""
        if unknown := sorted(set(self.things) - set(frames.classes)):
            raise UsageError(f"There is no class {unknown[0]!r}; label.things may hold {', '.join(frames.classes)}.")
        if not self.things:
            return self.rule
        ids = tuple(frames.classes.index(name) + 1 for name in self.things)
        return replace(self.rule, boundary=replace(self.rule.boundary, scope=ids))


@stage("label")
def label(
    frames: Ref, encoder: Ref, base: Ref, imagined: Ref, foundation: Ref | None,
    supports: Mapping[int, Sequence[str]], settings: LabelStage, compute: Compute,
) -> Ref:
    """Kind "labelled". Rows: id of a batch, and `pictures` (JSON) with LABEL_COLUMNS: `labels` and `statuses` hold a
    file and a status for each step, so that what a step adds can be seen and learnt from without labelling again."""
    rows = batches(distinct_pictures(pictures_of(imagined), settings.quality), settings.batch)
    rule = settings.rule_for(open_frames(frames))
    chosen = {"rule": rule, "sam": settings.sam, "supports": {str(k): list(v) for k, v in supports.items()}}
    needed = settings.rule.upto == "sabr" and settings.sam == "foundation"
    inputs = [frames, encoder, base, imagined, *([foundation] if needed and foundation else [])]
    return fan_out(Label, rows, chosen, compute, kind=KIND, inputs=inputs, code=CODE)


def batches(table: pd.DataFrame, size: int) -> list[dict]:
    jobs = table[["id", "class_id", "picture"]].to_dict("records")
    groups = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return [{"id": f"batch-{n:06d}", "jobs": group} for n, group in enumerate(groups)]


def support_pictures(frames: Frames, layer: str, supports: Mapping[int, Sequence[str]]) -> list[Support]:
    """The supports with what is known of them: pixels of their own class, the rest 255. A frame that supports two
    classes comes twice."""
    listed = [(k, id) for k, ids in supports.items() for id in dict.fromkeys(ids)]
    return [Support(f"{id}-{k}", read_png(frames.path(id, layer)), only(frames.label(id), k)) for k, id in listed]


def only(label: np.ndarray, target: int) -> np.ndarray:
    return np.where(label == target, label, IGNORE).astype(np.uint8)


def open_labeller(
    settings: dict[str, Any], frames: Path, encoder: Path, base: Path, foundation: Path | None = None,
) -> tuple[Labeller, str]:
    """A labeller of what the stages left on disk, and the layer of frames that it knows. settings: rule, sam, and
    supports by class id; a foundation brings its own SAM."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stored = json.loads((base / "config.json").read_text())
    rule: LabelSettings = settings["rule"]
    sam = str(foundation / "sam") if foundation else settings["sam"]
    segmenter = open_segmenter(sam, device) if rule.upto == "sabr" else None
    frozen, canvas = load_encoder(encoder).to(device), Canvas(tuple(stored["size"]))
    supports = {int(k): ids for k, ids in settings["supports"].items()}
    shown = support_pictures(Frames.open(frames), stored["layer"], supports)
    return Labeller(load_model(base).to(device), frozen, shown, canvas, segmenter, rule), stored["layer"]


class Label:
    """The worker: base model, encoder, supports and SAM, loaded once."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, base, self.imagined, *foundation = inputs
        self.labeller, _ = open_labeller(settings, frames, encoder, base, *foundation)

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self.batch(row, draft) for row in shard]

    def batch(self, row: dict, draft: Any) -> dict:
        jobs = row["jobs"]
        pictures = [read_png(self.imagined / job["picture"]) for job in jobs]
        labels = self.labeller.label(pictures, [job["class_id"] for job in jobs])
        kept = [self._keep(job, one, draft) for job, one in zip(jobs, labels, strict=True)]
        return {"id": row["id"], "pictures": json.dumps(kept)}

    def _keep(self, job: dict, labelled: Any, draft: Any) -> dict:
        names = {}
        for step, found in labelled.steps.items():
            names[step] = f"labels/{step}/{job['class_id']:03d}/{job['id']}.png"
            draft.write(names[step], png_bytes(found))
        return {**job, "labels": names, "statuses": labelled.statuses, **labelled.facts}
