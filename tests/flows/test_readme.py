"""The commands of README on the home of the first night, word for word but for the names of its recipe and its model.

`run` and `study` take minutes: tests/flows/test_nightly.py asks for them there.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cli import main
from models.frames import Frames
from tasks import places, tracking
from tasks.register import find_version
from tests.flows.conftest import living_in
from tests.models.datasets.miniatures import save

README = (Path(__file__).parents[2] / "README.md").read_text()
MODEL = "thermofuse-toy-1shot"
COMMANDS = {line.split()[1]: line for line in re.findall(r"^\| `(thermofuse [^`]+)`", README, re.MULTILINE)}


def tokens(verb: str) -> list[str]:
    line = COMMANDS[verb].replace("thermofuse-msrs-1shot", MODEL).replace("msrs-1shot", "smoke")
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def frames(first_night, night_place):
    """The frames of the first night, in its home."""
    with living_in(night_place):
        yield Frames.open(next((night_place / "store" / "frames").glob("*/manifest.json")).parent)


@pytest.fixture
def here(frames, tmp_path, monkeypatch):
    """A folder with the files that README names: `frame.png`, `example.png` with its `mask.png`, and `pairs`."""
    monkeypatch.chdir(tmp_path)
    shown = next(id for id in frames.ids("test") if frames.pixels(id))
    save(Path("frame.png"), frames.infrared(frames.ids("test")[-1]))
    save(Path("example.png"), frames.infrared(shown))
    save(Path("mask.png"), (frames.label(shown) == next(iter(frames.pixels(shown)))).astype(np.uint8) * 255)
    for id in frames.ids("test")[:2]:
        save(Path("pairs", "infrared", f"{id}.png"), frames.infrared(id))
        save(Path("pairs", "visible", f"{id}.png"), frames.visible(id))
    return tmp_path


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_is_run_somewhere(verb):
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert re.search(rf"""(main\(\[|tokens\()["']{verb}["']""", tests)


def test_show_as_in_readme(here, first_night, capfd):
    assert main(tokens("show")) == 0
    out = capfd.readouterr().out
    assert "smoke" in out and "Infrared only" in out and "synthesise" in out


def test_promote_and_rollback_as_in_readme(here, capfd):
    """Version 2 is the first one again, under another number."""
    client = tracking.client()
    first = client.get_model_version(MODEL, "1")
    if len(client.search_model_versions(f"name = '{MODEL}'")) == 1:
        client.create_model_version(MODEL, first.source, first.run_id, tags=first.tags)
    assert main(["promote", MODEL, "1"]) == 0
    assert main(tokens("promote")) == 0 and tokens("promote")[-1] == "2"
    assert "v2" in capfd.readouterr().out and find_version(MODEL).number == 2
    assert main(tokens("rollback")) == 0
    assert "v1" in capfd.readouterr().out and find_version(MODEL).number == 1


def test_predict_as_in_readme(here, frames, capfd):
    assert main(["promote", MODEL, "1"]) == 0
    assert main(tokens("predict")) == 0
    assert "found.png" in capfd.readouterr().out
    found = np.asarray(Image.open("found.png"))
    assert found.shape == frames.infrared(frames.ids("test")[-1]).shape and set(np.unique(found)) <= {0, 255}


def test_fuse_as_in_readme(here, frames, capfd):
    assert main(tokens("fuse")) == 0
    assert "2 of 2 pairs fused" in capfd.readouterr().out
    assert {path.stem for path in Path("fused").glob("*.png")} == set(frames.ids("test")[:2])


def test_nothing_of_it_touches_the_place_where_it_runs(here, night_place):
    assert main(tokens("show")) == 0
    assert {path.name for path in here.iterdir()} == {"frame.png", "example.png", "mask.png", "pairs"}
    assert places.home() == night_place / "home"
