"""Imagine: accepted prompts become pictures, batch by batch, on actors that hold the pipeline.

A row of the fan-out is one batch of the pipeline, its prompts and seeds written out. So a picture depends on its row
alone, to the bit, whatever the number of actors and the shard size; and what a killed run has committed is never drawn
again. Batches take the classes in turns: a run that is cut short is balanced.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.distinct import choose_distinct
from models.errors import UsageError
from models.frames import png_bytes
from models.generators.inspection import QualitySettings, is_collage, open_judge, perceptual_hash
from models.generators.text2image import PictureSettings, TextToImage, picture_seed
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.propose import accepted_prompts
from tasks.stage import stage
from tasks.store import Ref

KIND = "imagined"
PICTURE_COLUMNS = ("id", "class_id", "text", "seed", "status", "attempts", "picture", "hash", "margin", "embedding")
CODE = ("tasks.imagine", "models.generators.text2image", "models.generators.inspection",
        "models.generators.recognition", "models.generators.words", "models.frames")


@dataclass(frozen=True)
class ImagineSettings:
    """per_class: pictures of each novel class; prompts are reused with other seeds until there are enough.

    picture: how one is drawn; its pipeline "foundation" is the recipe's own. quality: which are set aside. judge: id or
    folder of a CLIP that says whether a picture shows its class, and which are copies; "foundation" for the recipe's
    own, "" for none.
    """

    per_class: int = 400
    picture: PictureSettings = field(default_factory=PictureSettings)
    quality: QualitySettings = field(default_factory=QualitySettings)
    judge: str = ""


@stage("imagine")
def imagine(prompts: Ref, foundation: Ref | None, settings: ImagineSettings, compute: Compute) -> Ref:
    """Pictures of kind "imagined". Rows: id of a batch, and `pictures` (JSON), which `pictures_of` unfolds."""
    rows = batches(accepted_prompts(prompts), settings)
    chosen = {"picture": settings.picture, "quality": settings.quality, "judge": settings.judge,
              "classes": classes_of(prompts) if settings.judge else []}
    inputs = [foundation] if foundation and "foundation" in (settings.picture.pipeline, settings.judge) else []
    return fan_out(Imagine, rows, chosen, compute, kind=KIND, inputs=inputs, code=CODE,
                   extra={"prompts": prompts.digest})


def classes_of(prompts: Ref) -> list[str]:
    """The dataset's classes, by class id - 1."""
    return list(places.store().manifest(prompts)["meta"]["classes"])


def batches(prompts: pd.DataFrame, settings: ImagineSettings) -> list[dict]:
    """Rows of batches: each {"id", "jobs": [{"id", "class_id", "text", "seed"}, ...]}; classes take turns."""
    per_class = {k: _jobs(part, settings) for k, part in prompts.groupby("class_id")}
    turns = [per_class[k][n] for n in range(settings.per_class) for k in sorted(per_class)]
    size = settings.picture.batch
    groups = [turns[start : start + size] for start in range(0, len(turns), size)]
    return [{"id": f"batch-{n:06d}", "jobs": jobs} for n, jobs in enumerate(groups)]


def _jobs(prompts: pd.DataFrame, settings: ImagineSettings) -> list[dict]:
    rows, jobs = prompts.to_dict("records"), []
    for n in range(settings.per_class):
        row, turn = rows[n % len(rows)], n // len(rows)
        jobs.append({"id": f"{row['prompt_uid']}-{turn:02d}", "class_id": int(row["class_id"]), "text": row["text"],
                     "seed": picture_seed(settings.picture.seed, row["prompt_uid"], turn)})
    return jobs


def own(name: str, inputs: Sequence[Path], part: str) -> str:
    """A name, or the part of the run's own foundation models that "foundation" stands for."""
    if name != "foundation":
        return name
    if not inputs:
        raise UsageError(f"There are no foundation models in this run; name a {part} by folder or id.")
    return str(inputs[0] / part)


class Imagine:
    """The worker: one pipeline; a shard is some batches."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        import torch

        chosen: PictureSettings = settings["picture"]
        folder, judge = (own(name, inputs, part) for name, part in
                         ((chosen.pipeline, "pipeline"), (settings["judge"], "judge")))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.quality: QualitySettings = settings["quality"]
        self.classes = settings["classes"]
        self.judge = open_judge(judge, device) if judge else None
        self.generator = TextToImage.open(chosen, device, folder)

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self.batch(row, draft) for row in shard]

    def batch(self, row: dict, draft: Any) -> dict:
        jobs = row["jobs"]
        drawn = self.generator.draw([job["text"] for job in jobs], [job["seed"] for job in jobs])
        kept = [self._keep(job, one, draft) for job, one in zip(jobs, drawn, strict=True)]
        return {"id": row["id"], "pictures": json.dumps(kept)}

    def _keep(self, job: dict, drawn: Any, draft: Any) -> dict:
        facts = dict.fromkeys(PICTURE_COLUMNS) | job | {"status": drawn.status, "attempts": drawn.attempts}
        if drawn.picture is None:
            return facts
        name = f"images/{job['class_id']:03d}/{job['id']}.png"
        draft.write(name, png_bytes(drawn.picture))
        seen = {"picture": name, "hash": f"{perceptual_hash(drawn.picture):016x}"} | self._judged(drawn.picture, job)
        if is_collage(drawn.picture, self.quality):
            return facts | seen | {"status": "collage"}
        least = self.quality.margin
        wrong = None not in (least, seen.get("margin")) and seen["margin"] <= least
        return facts | seen | {"status": "wrong class" if wrong else "ok"}

    def _judged(self, picture: np.ndarray, job: dict) -> dict:
        """margin: the asked class's lead over all others; embedding: of the picture, float16 in base64. Alone, so that
        neither depends on what else is in the batch."""
        if self.judge is None:
            return {}
        (margin,), (embedding,) = self.judge.margins([picture], self.classes, job["class_id"] - 1)
        stored = base64.b64encode(embedding.astype(np.float16).tobytes()).decode()
        return {"margin": round(float(margin), 6), "embedding": stored}


def pictures_of(imagined: Ref) -> pd.DataFrame:
    """One row per picture: id, class_id, text, seed, status, attempts, picture (file name or None), hash."""
    return unfold(places.store().rows(imagined))


def unfold(rows: pd.DataFrame, columns: Sequence[str] = PICTURE_COLUMNS) -> pd.DataFrame:
    """The rows of batches as one row per picture."""
    listed = [picture for text in rows.get("pictures", ()) for picture in json.loads(text)]
    return pd.DataFrame(listed, columns=list(columns))


def distinct_pictures(table: pd.DataFrame, quality: QualitySettings) -> pd.DataFrame:
    """The good pictures, less those whose hash or embedding is near that of an earlier one of their class, in order."""
    from models.generators.inspection import hamming

    held: dict[int, list[int]] = {}
    kept = []
    for row in table.to_dict("records"):
        own = int(row["hash"], 16) if row["status"] == "ok" else None
        seen = held.setdefault(row["class_id"], [])
        kept.append(own is not None and all(hamming(own, other) > quality.hash_distance for other in seen))
        if kept[-1]:
            seen.append(own)
    return _without_copies(table[kept].reset_index(drop=True), quality.copy)


def _without_copies(table: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Less those whose embedding (float16 in base64) has a cosine of `threshold` with an earlier one of their class."""
    fresh = pd.Series(True, table.index)
    for _, part in table[table["embedding"].notna()].groupby("class_id"):
        rows = np.stack([np.frombuffer(base64.b64decode(text), np.float16) for text in part["embedding"]])
        rows = rows.astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        fresh[part.index] = choose_distinct(rows, threshold).accepted
    return table[fresh].reset_index(drop=True)
