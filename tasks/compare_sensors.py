"""Train one segmentation network on what each sensor, each fuser, or SegMiF itself shows, and test all of them alike.

Every row has the same network, start, rates, crops and number of steps; only the picture differs. Where SegMiF is
trained jointly its fusion network learns beside the segmentation network, from both losses. Novel classes do not exist
here: this is closed-set segmentation of all classes, on train, measured on test.

Legend: K classes with background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.frames import Frames
from models.fusers.settings import FuserSettings
from models.metrics import COUNTS
from models.views import FUSED, Views
from tasks import places
from tasks.cells import Cell, side_by_side
from tasks.checkpoints import seed_step
from tasks.fanout import Compute
from tasks.fit_fuser import CODE as FITTED
from tasks.fit_fuser import FuserJob, PairCrops, build, job_of
from tasks.stage import stage
from tasks.store import Ref

KIND = "segmented"
CODE = (*FITTED, "tasks.compare_sensors", "models.losses", "models.backbone", "models.encoders")
JOINT = "joint"
SEEDS_APART = 10**6  # numbers of episodes


@dataclass(frozen=True)
class Sensor:
    """One row of the study.

    settings: of SegMiF, whose segmentation network all rows train. layer: "infrared", "visible", "fused", or "joint":
    what SegMiF fuses meanwhile. fused: which fuser's pictures.
    """

    name: str
    about: str
    settings: FuserSettings
    layer: str
    fused: str = ""


@stage("compare_sensors")
def compare_sensors(
    frames: Ref, sensors: Sequence[Sensor], seeds: Sequence[int], fused: Mapping[str, Ref], compute: Compute
) -> pd.DataFrame:
    """`models.metrics.COLUMNS`, seed and truth (pixels): one row per test frame, class (0: background), seed and
    sensor, whose name is the stream; ready for `tasks.tabulate`. fused: name -> pictures of kind "fused"."""
    cells = {(n, s): _cell(frames, sensor, seed, fused)
             for n, seed in enumerate(seeds) for s, sensor in enumerate(sensors)}
    made, parts = side_by_side(list(cells.values()), compute), []
    for (n, s), cell in cells.items():
        rows = places.store().rows(made[cell.name])
        parts.append(rows.assign(stream=sensors[s].name, seed=seeds[n], fold=0,
                                 episode=SEEDS_APART * n + np.arange(len(rows))))
    return pd.concat(parts, ignore_index=True)


def _cell(frames: Ref, sensor: Sensor, seed: int, fused: Mapping[str, Ref]) -> Cell:
    layer = "visible" if sensor.layer == JOINT else sensor.layer
    asked = {"job": job_of(replace(sensor.settings, seed=seed), (), layer), "joint": sensor.layer == JOINT}
    inputs = (frames, fused[sensor.fused]) if layer == FUSED else (frames,)
    return Cell(f"{sensor.name}.{seed}", KIND, f"{__name__}:segment_one", asked, inputs, CODE)


def segment_one(asked: dict[str, Any], inputs: list[Path], draft: Any) -> tuple[pd.DataFrame, dict]:
    """Train on the train split, label the test split; rows query, label, truth and COUNTS."""
    job: FuserJob = asked["job"]
    views = Views(Frames.open(inputs[0]), fused=inputs[1] if len(inputs) > 1 else None)
    seed_step(job.seed, -1)
    trainer = build(job.settings, views.frames, None if asked["joint"] else "models.fusers.cascade:Alone")
    draw = PairCrops(views, job)
    for step in range(job.settings.iterations):
        rng = seed_step(job.seed, step)
        losses = trainer.iterate(draw(rng), step)
    meta = {name: float(value) for name, value in losses.items()}
    return pd.DataFrame(_tested(trainer.fuser, views, job.layer, asked["joint"])), meta


def _tested(model: Any, views: Views, layer: str, joint: bool) -> list[dict]:
    import torch

    from models.fusers.base import to_unit

    rows = []
    for id in views.frames.ids("test"):
        if not (views.has(id, layer) and views.frames.has(id, "label")):
            continue
        picture = to_unit(views.picture(id, layer))[None]
        with torch.inference_mode():
            if joint:
                picture = model.fuse(to_unit(views.frames.infrared(id))[None], picture).image
            said = model.segment(picture.expand(-1, 3, -1, -1)).argmax(1)
        rows += class_rows(id, said, torch.from_numpy(views.frames.label(id))[None], len(views.frames.classes) + 1)
    return rows


def class_rows(id: str, said: Any, label: Any, classes: int) -> list[dict]:
    """One row per class of one picture, [1,H,W] class ids each; unknown pixels (255) count nowhere."""
    from models.fusers.segmentation_metrics import confusion

    counts = confusion(said, label, classes)
    both, truth, told, known = counts.diagonal(), counts.sum(1), counts.sum(0), counts.sum()
    either = truth + told - both
    pixels = zip(both.tolist(), either.tolist(), (known - either).tolist(), (known - both).tolist(), strict=True)
    return [
        {"query": id, "label": k, "truth": int(truth[k]), **dict(zip(COUNTS, found, strict=True))}
        for k, found in enumerate(pixels)
    ]


def by_protocol(table: pd.DataFrame) -> pd.DataFrame:
    """Rows are streams; mIoU in points under `models.fusers.segmentation_metrics.PROTOCOLS`, over all seeds."""
    sums = table.groupby(["stream", "label"], sort=False)[["inter_fg", "union_fg", "truth"]].sum()
    sums["iou"] = 100 * sums["inter_fg"] / sums["union_fg"].where(sums["union_fg"] > 0)
    sums = sums.reset_index()
    front = sums[sums["label"] > 0]
    kept = {"all": sums, "fg": front, "present": front[front["truth"] > 0]}
    means = {f"miou_{name}": rows.groupby("stream", sort=False)["iou"].mean() for name, rows in kept.items()}
    return pd.DataFrame(means).round(2)
