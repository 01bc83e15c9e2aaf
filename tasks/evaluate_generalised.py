"""The generalised exam: every test frame, all classes at once, counted in confusion matrices.

Two matrices come of a frame: with all novel classes in question (CAPL's and DIaM's conventions), and one for each novel
class that the frame shows, the others barred and their pixels ignored (BAM's). Scores name their convention.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.backbone import Encoder, load_encoder
from models.frames import Frames, read_png
from models.generalised_metrics import confusion, score_rows
from models.geometry import Canvas, as_image
from models.pseudolabels import IGNORE
from models.segmenters.generalised import Generalised, load_model, predict, stretched
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref

CODE = ("tasks.evaluate_generalised", "models.generalised_metrics", "models.segmenters.generalised",
        "models.segmenters.pspnet", "models.backbone", "models.geometry")


@stage("evaluate_generalised")
def evaluate_generalised(frames: Ref, encoder: Ref, model: Ref, queries: Sequence[str], compute: Compute) -> Ref:
    """Kind "generalised_exam"; rows: id, `all` and `single`, each JSON of [row, column, pixels] of a matrix."""
    rows = [{"id": id} for id in queries]
    return fan_out(Examiner, rows, {}, compute, kind="generalised_exam", inputs=[frames, encoder, model], code=CODE)


class Exam:
    """One model before the frames it is asked about; one by one, so that no result depends on its neighbours."""

    def __init__(
        self, frames: Frames, encoder: Encoder, model: Generalised, size: tuple[int, int], layer: str,
    ) -> None:
        self.frames, self.encoder, self.model = frames, encoder, model.eval()
        self.canvas, self.layer = Canvas(size), layer

    @torch.inference_mode()
    def logits(self, id: str) -> torch.Tensor:
        """[1, C, H, W] at the frame's own size."""
        picture = read_png(self.frames.path(id, self.layer))
        features = self.encoder(self.canvas.image(as_image(picture)[None]).to(self.encoder.mean.device))
        logits = stretched(self.model.trunk.classify(self.model.embed(features)), self.canvas.size)
        return self.canvas.restore(logits, *picture.shape[:2]).cpu()

    def count(self, id: str) -> dict[str, str]:
        """The two matrices of a frame, sparse."""
        logits, label, space = self.logits(id), self.frames.label(id), self.model.space
        classes = len(self.frames.classes)
        matrices = {"all": confusion(predict(logits, space)[0].numpy(), label, classes)}
        single = np.zeros_like(matrices["all"])
        for k in set(space.novel) & set(self.frames.pixels(id)):
            others = [n for n in space.novel if n != k]
            truth = np.where(np.isin(label, others), IGNORE, label)
            single += confusion(predict(logits, space, (k,))[0].numpy(), truth, classes)
        return {name: sparse(matrix) for name, matrix in (matrices | {"single": single}).items()}


class Examiner(Exam):
    """The worker: one model of the store."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        frames, encoder, model = inputs
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stored = json.loads((model / "config.json").read_text())
        parts = load_encoder(encoder).to(device), load_model(model).to(device)
        super().__init__(Frames.open(frames), *parts, tuple(stored["size"]), stored["layer"])

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [{"id": row["id"]} | self.count(row["id"]) for row in shard]


def sparse(matrix: np.ndarray) -> str:
    rows, columns = np.nonzero(matrix)
    return json.dumps([[int(r), int(c), int(matrix[r, c])] for r, c in zip(rows, columns, strict=True)])


def summed(texts: Sequence[str], classes: int) -> np.ndarray:
    """int64 [classes + 1, classes + 1] of many sparse matrices."""
    total = np.zeros((classes + 1, classes + 1), np.int64)
    for text in texts:
        for row, column, pixels in json.loads(text):
            total[row, column] += pixels
    return total


def grade_generalised(exam: Ref, frames: Ref, fold: int, **head: Any) -> pd.DataFrame:
    """All scores of one exam as rows, in the three conventions (`models.generalised_metrics.score_rows`)."""
    return graded(places.store().rows(exam), open_frames(frames), fold, **head)


def graded(table: pd.DataFrame, opened: Frames, fold: int, **head: Any) -> pd.DataFrame:
    """The same of the rows of an exam and opened frames."""
    base, novel, classes = opened.base(fold), opened.novel(fold), len(opened.classes)
    every, single = (summed(table[name], classes) for name in ("all", "single"))
    bam = score_rows(single, base, novel, ("bam",), fold=fold, **head).query("metric != 'iou'")
    return pd.concat([score_rows(every, base, novel, fold=fold, **head), bam], ignore_index=True)
