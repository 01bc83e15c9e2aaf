"""Fan-out over real Ray actors: the same bytes at any width, what is done stays done, who is to blame for a loss."""

from __future__ import annotations

from pathlib import Path

from tasks import places
from tasks.fanout import Compute, fan_out


class Square:
    """Writes the square of a number; leaves a mark per call in the folder named by the settings."""

    def __init__(self, settings: dict, inputs: list[Path]):
        self.marks = Path(settings["marks"])

    def __call__(self, shard: list[dict], draft) -> list[dict]:
        for row in shard:
            with open(self.marks / row["id"], "a") as file:
                file.write("x")
            draft.write(f"images/{row['id']}.txt", str(row["value"] ** 2).encode())
        return [{"id": row["id"], "square": row["value"] ** 2} for row in reversed(shard)]


def run(rows, marks, worker=Square, **compute):
    return fan_out(worker, rows, {"marks": str(marks)}, Compute(**compute), kind="squares", inputs=[], code=[])


def test_rows_come_back_in_order(ray_local, thermofuse_home, tmp_path):
    rows = [{"id": f"n{i}", "value": i} for i in (3, 1, 2, 5, 4)]
    ref = run(rows, tmp_path, actors=2, shard_size=2)
    frame = places.store().rows(ref)
    assert list(frame["id"]) == ["n3", "n1", "n2", "n5", "n4"]
    assert list(frame["square"]) == [9, 1, 4, 25, 16]
    assert (places.store().local(ref) / "images/n5.txt").read_text() == "25"
