"""Make a copy of frames whose infrared test pictures are degraded, as a worse sensor would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.corruptions import corrupt, picture_seed
from models.frames import Frames, layer_name, png_bytes
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Draft, Ref

LAYERS = ("infrared", "visible", "label")


@stage("degrade")
def degrade(frames: Ref, corruption: str, severity: int, compute: Compute, seed: int = 0) -> Ref:
    """Kind "frames": the test split with `corruption` at `severity` (`models.corruptions`), supports and queries alike.

    The visible picture and the label stay as they are. Raises UsageError for a corruption that does not exist.
    """
    store = places.store()
    table, meta = store.rows(frames), store.manifest(frames)["meta"]
    rows = [{"id": id, "row": row} for id, row in _test_rows(table)]
    settings = {"corruption": corruption, "severity": severity, "seed": seed}
    code = ["tasks.degrade", "models.corruptions"]
    return fan_out(Degrade, rows, settings, compute, kind="frames", inputs=[frames], code=code, meta=meta)


def _test_rows(table) -> list[tuple[str, dict]]:
    kept = table[(table["split"] == "test") & table["infrared"].notna()].astype(object)
    return [(row["id"], row) for row in kept.where(kept.notna(), None).to_dict("records")]


class Degrade:
    """Reads a frame, spoils its infrared picture, writes all its layers."""

    def __init__(self, settings: dict[str, Any], inputs: list[Path]) -> None:
        self.settings, self.frames = settings, Frames.open(inputs[0])

    def __call__(self, shard: list[dict], draft: Draft) -> list[dict]:
        return [self._spoil(row["row"], draft) for row in shard]

    def _spoil(self, row: dict, draft: Draft) -> dict:
        for layer in LAYERS:
            if row[layer] is not None:
                draft.write(layer_name(row["id"], layer), self._layer(row["id"], layer))
        return row

    def _layer(self, id: str, layer: str) -> bytes:
        if layer != "infrared":
            return self.frames.path(id, layer).read_bytes()
        seed = picture_seed(self.settings["seed"], id)
        picture = corrupt(self.frames.infrared(id), self.settings["corruption"], self.settings["severity"], seed)
        return png_bytes(picture)
