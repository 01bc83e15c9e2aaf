"""Carry: labelled visible pictures become infrared ones, and keep of their labels what infrared still shows.

Syn4Seg spec §7: pictures are drawn and labelled where generators, base models and SAM are at their best, in visible
light; then each is made infrared, pixel by pixel, its label goes with it, and regions of novel classes that are unlike
the supports in infrared are freed. Infrared comes of a fitted translator (route A) or, as its control, of the warmth of
each class (route C). The output is pictures and labels in one, and stands for both wherever "imagined" and "labelled"
are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.episode import draw, train_label
from models.frames import Frames, png_bytes, read_png
from models.generators.pictures import lightness_picture
from models.generators.syndiff import SynDiff
from models.generators.text2image import picture_seed
from models.generators.warmth import Warmth
from models.labelling import LabelSettings
from models.pseudolabels import IGNORE
from models.relabel import accept
from tasks import label as labelling
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.imagine import unfold
from tasks.label import LABEL_COLUMNS, open_labeller, support_pictures
from tasks.stage import stage
from tasks.store import Ref

KIND = "carried"
CODE = ("tasks.carry", "models.generators.warmth", "models.generators.pictures", "models.generators.syndiff",
        "models.generators.networks", *labelling.CODE)


@dataclass(frozen=True)
class CarrySettings:
    """blur, noise: of the control's camera, in pixels and grey levels. frames: how many training frames it reads the
    tones of base classes of. rule: the filter that checks labels again, against infrared supports. batch: pictures of
    one row. seed: of the noise."""

    blur: float = 0.8
    noise: float = 2.0
    frames: int = 64
    rule: LabelSettings = field(default_factory=lambda: LabelSettings(upto="ape"))
    batch: int = 16
    seed: int = 0


@stage("carry")
def carry(
    frames: Ref, encoder: Ref, base: Ref, imagined: Ref, labelled: Ref, translators: Ref | None,
    supports: Mapping[int, Sequence[str]],
    settings: CarrySettings, compute: Compute,
) -> Ref:
    """Kind "carried": rows as those of `tasks.label`, with infrared pictures. base: a base model of infrared frames.
    translators: with the direction "thermal"; None for the control."""
    jobs = unfold(places.store().rows(labelled), LABEL_COLUMNS)[["id", "class_id", "picture", "labels"]]
    listed = jobs.to_dict("records")
    groups = [listed[start : start + settings.batch] for start in range(0, len(listed), settings.batch)]
    rows = [{"id": f"batch-{n:06d}", "jobs": group} for n, group in enumerate(groups)]
    chosen = {"carry": settings, "rule": settings.rule, "sam": "none",
              "supports": {str(k): list(v) for k, v in supports.items()}}
    inputs = [frames, encoder, base, imagined, labelled, *([translators] if translators else [])]
    return fan_out(Carry, rows, chosen, compute, kind=KIND, inputs=inputs, code=CODE)


class Carry:
    """The worker: a translator or the tones of the classes, and a labeller that knows the supports in infrared."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, base, self.imagined, self.labelled, *translators = inputs
        self.settings: CarrySettings = settings["carry"]
        self.labeller, layer = open_labeller(settings, frames, encoder, base)
        supports = {int(k): ids for k, ids in settings["supports"].items()}
        self.translator = SynDiff.load(translators[0] / "thermal") if translators else None
        self.warmth = None if translators else self._read_tones(Frames.open(frames), layer, supports)

    def _read_tones(self, frames: Frames, layer: str, supports: Mapping[int, Sequence[str]]) -> Warmth:
        chosen, novel = self.settings, self.labeller.model.space.novel
        shown = [(one.picture, one.label) for one in support_pictures(frames, layer, supports)]
        shown += examples(frames, layer, novel, chosen.frames)
        return Warmth.fit(shown, len(frames.classes), blur=chosen.blur, noise=chosen.noise)

    def infrared(self, picture: np.ndarray, label: np.ndarray, seed: int) -> np.ndarray:
        """uint8 [H, W] of a visible picture uint8 [H, W, 3]; the control also asks its label."""
        if self.translator is None:
            return self.warmth.translate(picture, label, seed)
        return self.translator.translate([lightness_picture(picture)], [seed])[0]

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [{"id": row["id"], "pictures": json.dumps([self.carry(job, draft) for job in row["jobs"]])}
                for row in shard]

    def carry(self, job: dict, draft: Any) -> dict:
        """One picture and its label after each step; the last label says what is where."""
        k, relabel = job["class_id"], self.settings.rule.relabel
        labels = {step: read_png(self.labelled / name) for step, name in job["labels"].items()}
        last = list(labels.values())[-1]
        seed = picture_seed(self.settings.seed, job["id"], 0)
        infrared = self.infrared(read_png(self.imagined / job["picture"]), last, seed)
        gated = {step: self.labeller.gate(infrared, label) for step, label in labels.items()}
        row = {"id": job["id"], "class_id": k, "picture": f"infrared/{k:03d}/{job['id']}.png", "labels": {},
               "statuses": {step: accept(label, k, relabel) for step, label in gated.items()}}
        draft.write(row["picture"], png_bytes(infrared))
        for step, label in gated.items():
            row["labels"][step] = f"labels/{step}/{k:03d}/{job['id']}.png"
            draft.write(row["labels"][step], png_bytes(label))
        after = list(gated.values())[-1]
        return row | {"kept": _share(after == last), "free": _share(after == IGNORE), "changed": _share(after != last),
                      "target": _share(after == k)}


def examples(frames: Frames, layer: str, novel: Sequence[int], count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training frames with their base labels; what is novel in them is unknown."""
    ids = [id for id in frames.ids("train") if frames.has(id, layer) and frames.has(id, "label")]
    chosen = draw(ids, min(count, len(ids)), "warmth")
    return [(read_png(frames.path(id, layer)), train_label(frames.label(id), novel, "ignore")) for id in chosen]


def _share(mask: np.ndarray) -> float:
    return round(float(np.count_nonzero(mask) / mask.size), 6)
