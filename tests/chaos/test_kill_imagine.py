"""kill -9 while four actors draw pictures, and run the same command again.

Nothing that was finished is drawn twice, and the tree is, byte for byte, that of a run which was left alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.chaos.test_kill import Trial
from tests.models.generators.tiny import pipeline

pytestmark = pytest.mark.chaos

ACTORS, PER_CLASS, BATCH = 4, 16, 2
DRIVER = """
import json, sys
from flows.streams import Stdout

stdout = Stdout()
from tasks import places

places.prepare_environment()
import pandas as pd

from models.generators.text2image import PictureSettings
from tasks.fanout import Compute
from tasks.imagine import ImagineSettings, imagine
from tasks.stage import ledger

folder, actors, per_class, batch = sys.argv[1], *map(int, sys.argv[2:])
prompts = pd.DataFrame({
    "prompt_uid": ["a0", "a1", "b0"], "class_id": [3, 3, 7], "accepted": [True] * 3,
    "text": ["a car", "an old car", "a dog"],
})
ref = places.store().draft("prompts", "a" * 16).commit(prompts, {})
picture = PictureSettings(folder, dtype="float32", size=(32, 32), steps=40, batch=batch)
compute = Compute(actors=actors, cpus_per_actor=0.5, shard_size=1)
imagine(ref, None, ImagineSettings(per_class=per_class, picture=picture), compute)
one = ledger()[-1]
stdout.file.write(json.dumps({"shards": one.shards, "shards_reused": one.shards_reused, "reused": one.reused}))
stdout.close(give_back=False)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline("sd15").save_pretrained(folder)
    return [sys.executable, "-c", DRIVER, str(folder), *map(str, (ACTORS, PER_CLASS, BATCH))]


def tree(trial: Trial) -> dict[str, bytes]:
    """Name -> bytes of all that lies in the output's folder, receipts and manifest included."""
    (folder,) = trial.store.glob("imagined/*")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(trial: Trial) -> dict[Path, int]:
    """The pictures of committed batches, and when each was written."""
    found = {}
    for receipt in trial.shards("imagined"):
        for name in json.loads(receipt.read_text())["files"]:
            path = receipt.parents[1] / name
            found[path] = path.stat().st_mtime_ns
    return found


def test_killed_while_four_actors_draw(tmp_path: Path, command: list[str]) -> None:
    trial, alone = Trial(tmp_path / "killed", command), Trial(tmp_path / "alone", command)
    total = 2 * PER_CLASS // BATCH
    try:
        trial.kill_when(lambda: len(trial.shards("imagined")) >= 3, least=ACTORS)
        assert not trial.done("imagined")
        before = finished(trial)
        assert BATCH * 3 <= len(before) < BATCH * total

        again = trial.finish(trial.start())
        assert (again["shards"], again["shards_reused"]) == (total, len(before) // BATCH)
        assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished picture was drawn again"

        assert alone.finish(alone.start())["shards_reused"] == 0
        assert tree(trial) == tree(alone) and len(tree(alone)) > 2 * PER_CLASS
        assert trial.finish(trial.start())["reused"], "a bank that is drawn is not drawn again"
    finally:
        trial.kill()
        alone.kill()
