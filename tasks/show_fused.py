"""Show fused pictures: a few test scenes as every fuser sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.frames import read_png
from models.plots import stretch
from tasks import places
from tasks.prepare import open_frames
from tasks.store import Ref

if TYPE_CHECKING:
    import numpy as np


def scenes(frames: Ref, fused: Mapping[str, Ref], count: int) -> list[dict[str, np.ndarray]]:
    """Name -> picture of `count` test frames, evenly spread: infrared (stretched for the eye), visible, then each of
    `fused` as it is."""
    store, opened = places.store(), open_frames(frames)
    files = {name: (store.local(ref), store.rows(ref).set_index("id")["fused"]) for name, ref in fused.items()}
    ids = [id for id in opened.ids("test") if all(id in rows.index for _, rows in files.values())]
    chosen = ids[:: max(1, len(ids) // count)][:count]
    return [
        {"infrared": stretch(opened.infrared(id)), "visible": opened.visible(id)}
        | {name: read_png(folder / rows[id]) for name, (folder, rows) in files.items()}
        for id in chosen
    ]
