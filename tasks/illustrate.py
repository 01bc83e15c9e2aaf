"""What the report shows beside its numbers: a grid of episodes, a sheet of synthetic pictures, what refinement did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.plots import grid, png, score_bars
from tasks import places
from tasks.evaluate import examples
from tasks.prepare import open_frames
from tasks.report import refine_rows
from tasks.store import Ref
from tasks.tracking import flat

ROWS = 8


def illustrate(
    settings: Any, exam: Ref, frames: Ref, translators: Ref, labels: Ref, scores: Mapping[str, Any]
) -> dict[str, Any]:
    """The pictures and tables of `tasks.report.report`: settings, pictures (PNG bytes by name), refined."""
    store = places.store()
    rows = examples(exam, frames)
    return {
        "settings": flat(settings),
        "pictures": {
            "grid": png(grid(rows[:: max(1, len(rows) // ROWS)][:ROWS])),
            "scores": png(score_bars(scores["streams"])),
            "synthetic": (store.local(translators) / "contact.png").read_bytes(),
        },
        "refined": refine_rows(store.rows(labels), open_frames(frames).classes),
    }
