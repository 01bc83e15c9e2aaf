"""The scenes that a study shows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from models.frames import png_bytes
from tasks import places
from tasks.show_fused import scenes
from tests.tasks.test_fit_translators import commit_frames


def commit_fused(letter: str, ids: list[str], level: int):
    draft, rows = places.store().draft("fused", letter * 16), []
    for id in ids:
        draft.write(f"images/{id}.fused.png", png_bytes(np.full((24, 32, 3), level, np.uint8)))
        rows.append({"id": id, "fused": f"images/{id}.fused.png"})
    return draft.commit(pd.DataFrame(rows), {})


def test_a_scene_shows_the_pair_and_every_fuser(thermofuse_home):
    frames = commit_frames(("train", *["test"] * 5))
    tests = [f"f{n}" for n in range(1, 6)]
    fused = {"one": commit_fused("b", tests, 10), "two": commit_fused("c", tests[1:], 20)}
    shown = scenes(frames, fused, 2)
    assert [list(scene) for scene in shown] == [["infrared", "visible", "one", "two"]] * 2
    assert (shown[0]["one"] == 10).all() and (shown[1]["two"] == 20).all()
    assert not np.array_equal(shown[0]["visible"], shown[1]["visible"]), "scenes differ"
    assert len(scenes(frames, fused, 99)) == 4, "frames that one fuser lacks are left out"
