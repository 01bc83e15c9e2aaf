"""Cells: many outputs that need nothing of each other, made side by side on Ray, each kept as soon as it is there.

A cell is an output of the store like any other, named by the digest of its own question. So a study that was killed
goes on with the next cell, one more row costs one more cell, and what a night or another study has made is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from models.errors import StageFailed
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.store import Ref, digest_of

DEADLINE_SECONDS = 12 * 3600


@dataclass(frozen=True)
class Cell:
    """One output to be made.

    name: what it is called among its neighbours. kind, inputs, settings, code: of its digest, as in
    `tasks.store.digest_of`. work: "module:function" of (settings, inputs as local folders, draft) that writes files and
    returns its rows (a frame, or None) and meta.
    """

    name: str
    kind: str
    work: str
    settings: Any
    inputs: tuple[Ref, ...]
    code: tuple[str, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.kind, self.inputs, self.settings, self.code)

    def find(self) -> Ref | None:
        return places.store().find(self.kind, self.digest)


def side_by_side(cells: Sequence[Cell], compute: Compute) -> dict[str, Ref]:
    """Name -> output of each cell, made by one actor each or found. Raises StageFailed when one cannot be made."""
    missing = {cell.name: cell for cell in cells if cell.find() is None}
    if missing:
        rows = [{"id": name, "digest": cell.digest} for name, cell in missing.items()]
        wide = replace(compute, shard_size=1, shard_deadline_seconds=DEADLINE_SECONDS, max_quarantined=0.0)
        inputs = sorted({ref.digest for cell in missing.values() for ref in cell.inputs})
        done = fan_out(Bench, rows, missing, wide, kind="made", inputs=[], code=("tasks.cells",), extra=inputs)
        if gone := [name for name, cell in missing.items() if cell.find() is None]:
            raise StageFailed(f"The store has lost {', '.join(gone)}; delete {done.uri} and run again.")
    return {cell.name: cell.find() for cell in cells}


class Bench:
    """The worker: does a cell and commits it, unless it is there."""

    def __init__(self, settings: dict[str, Cell], inputs: Sequence[Path]) -> None:
        self.cells = settings

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        for row in shard:
            self.make(self.cells[row["id"]])
        return shard

    @staticmethod
    def make(cell: Cell) -> Ref:
        if found := cell.find():
            return found
        store = places.store()
        made = store.draft(cell.kind, cell.digest)
        rows, meta = resolve_name(cell.work)(cell.settings, [store.local(ref) for ref in cell.inputs], made)
        return made.commit(rows, meta, count=None if rows is not None else 1)
