"""What the report of a generalised night shows beside its numbers: drawn pictures, and labels step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from models.charts import dots
from models.frames import read_png
from models.plots import label_sheet, png
from tasks import places
from tasks.imagine import unfold
from tasks.label import LABEL_COLUMNS
from tasks.prepare import open_frames
from tasks.store import Ref
from tasks.tracking import flat

PER_CLASS = 3
TITLES = {"predict": "Predicted", "apf": "Filtered (APF)", "apr": "Relabelled (APR)", "sabr": "Sharpened (SABR)"}


def illustrate_foundation(settings: Any, foundation: Ref) -> dict[str, Any]:
    """Settings and pictures of `tasks.report_generalised`: what the fitted pipeline draws."""
    drawn = (places.store().local(foundation) / "contact.png").read_bytes()
    return {"settings": flat(settings), "pictures": {"drawn": drawn}}


def foundation_quality(foundation: Ref) -> dict[str, float]:
    """What the judge says of the fitted pipeline's pictures (`tasks.fit_foundation.judged`)."""
    return json.loads((places.store().local(foundation) / "quality.json").read_text())


def illustrate_lesson(
    settings: Any, frames: Ref, synthetic: Mapping[str, tuple[Ref, Ref]], foundation: Ref | None, scores: Mapping,
) -> dict[str, Any]:
    """The same of a generalised night: the steps' scores, drawn pictures, and the labels of some of them.

    synthetic: source -> pictures and labels, of which the last source is shown.
    """
    pictures = {"steps": png(step_chart(scores["rows"]))}
    if foundation:
        pictures |= illustrate_foundation(settings, foundation)["pictures"]
    if synthetic:
        pictures["labels"] = png(labels_shown(frames, *list(synthetic.values())[-1]))
    return {"settings": flat(settings), "pictures": pictures}


def labels_shown(frames: Ref, imagined: Ref, labelled: Ref, per_class: int = PER_CLASS):
    """A sheet of pictures, some of each class, evenly from the first to the last, with the label after each step."""
    store, opened = places.store(), open_frames(frames)
    table = unfold(store.rows(labelled), LABEL_COLUMNS)
    chosen = [part.iloc[:: max(1, len(part) // per_class)][:per_class] for _, part in table.groupby("class_id")]
    rows = []
    for row in pd.concat(chosen).to_dict("records"):
        labels = {TITLES[step]: read_png(store.local(labelled) / name) for step, name in row["labels"].items()}
        name = f"{opened.class_name(row['class_id'])}, {list(row['statuses'].values())[-1].replace('_', ' ')}"
        rows.append((name, read_png(store.local(imagined) / row["picture"]), labels))
    return label_sheet(rows, opened.palette)


def step_chart(rows: list[dict[str, Any]]):
    """A dot for each step's novel mIoU, with its interval where it has one."""
    points = [{"row": row["row"], "miou": row["novel"], **{end: _known(row[f"novel_{end}"], row["novel"])
                                                           for end in ("low", "high")}} for row in rows]
    return dots(points, rows[0]["row"])


def _known(value: float, otherwise: float) -> float:
    return otherwise if pd.isna(value) else value
