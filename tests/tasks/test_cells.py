"""Cells: each is an output of its own, made once, found by anybody who asks the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from models.errors import StageFailed
from tasks import cells, places
from tasks.cells import Bench, Cell, side_by_side
from tasks.fanout import Compute
from tasks.store import digest_of

MADE: list[str] = []


def note(settings, inputs, draft):
    MADE.append(settings["word"])
    draft.write("word.txt", settings["word"].encode())
    return (pd.DataFrame({"id": list(settings["word"])}) if settings.get("rows") else None), {"inputs": len(inputs)}


def cell(name: str, **settings) -> Cell:
    return Cell(name, "note", f"{__name__}:note", {"word": name, **settings}, (), ("tasks.cells",))


@pytest.fixture
def here(monkeypatch, thermofuse_home):
    """Fan-outs run in this process; yields what was asked of them."""
    asked = []

    def in_process(worker, rows, settings, compute, **rest):
        asked.append((rows, compute, rest))
        worker(settings, [])(rows, None)

    monkeypatch.setattr(cells, "fan_out", in_process)
    MADE.clear()
    return asked


def test_a_cell_is_made_once_and_committed_as_its_own_output(here):
    found = side_by_side([cell("one"), cell("two", rows=True)], Compute())
    store = places.store()
    assert MADE == ["one", "two"] and found["one"].count == 1 and found["two"].count == 3
    assert (Path(store.local(found["one"])) / "word.txt").read_text() == "one"
    assert store.rows(found["two"])["id"].tolist() == ["t", "w", "o"]
    assert store.manifest(found["one"])["meta"] == {"inputs": 0}
    assert side_by_side([cell("one"), cell("two", rows=True)], Compute()) == found
    assert len(here) == 1 and MADE == ["one", "two"]


def test_one_more_row_costs_one_more_cell(here):
    side_by_side([cell("one")], Compute())
    side_by_side([cell("one"), cell("three")], Compute())
    assert MADE == ["one", "three"] and [row["id"] for row in here[1][0]] == ["three"]


def test_a_name_is_no_part_of_the_question(here):
    first = side_by_side([cell("one")], Compute())["one"]
    assert side_by_side([replace(cell("one"), name="another")], Compute()) == {"another": first}
    assert first.digest == digest_of("note", [], {"word": "one"}, ("tasks.cells",))
    assert side_by_side([cell("one", rows=True)], Compute())["one"] != first


def test_cells_are_shards_of_their_own_and_may_take_long(here):
    side_by_side([cell("one")], Compute(shard_size=99, max_quarantined=0.5))
    compute = here[0][1]
    assert compute.shard_size == 1 and compute.max_quarantined == 0 and compute.shard_deadline_seconds > 3600


def test_what_another_worker_made_meanwhile_is_taken(here):
    made = Bench.make(cell("one"))
    assert Bench.make(cell("one")) == made and MADE == ["one"]


def test_a_lost_cell_is_told(monkeypatch, thermofuse_home):
    kept = places.store().draft("made", "0" * 16).commit(None, {})
    monkeypatch.setattr(cells, "fan_out", lambda *_, **__: kept)
    with pytest.raises(StageFailed, match=r"has lost one; delete .*made"):
        side_by_side([cell("one")], Compute())
