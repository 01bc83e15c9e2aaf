"""Fits side by side are the night's fits; Stage I may be shared."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from models.errors import StageFailed, UsageError
from models.fusers.base import load_fuser
from models.fusers.cascade import Cascade
from models.fusers.settings import FuserSettings
from tasks import cells, places
from tasks import fit_fusers as stage
from tasks.fanout import Compute
from tasks.fit_fuser import CODE, KIND, job_of
from tasks.store import digest_of
from tests.tasks.test_fit_fuser import SEGMIF, SGDFUSE, frames, run_loop  # noqa: F401


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(cells, "fan_out", lambda worker, rows, settings, *_, **__: worker(settings, [])(rows, None))


def weights(ref) -> dict[str, torch.Tensor]:
    return load_fuser(places.store().local(ref)).state_dict()


@pytest.mark.parametrize("settings", [SEGMIF, SGDFUSE], ids=lambda s: s.fuser)
def test_it_is_the_fit_of_a_night(here, frames, tmp_path, monkeypatch, settings):  # noqa: F811
    ref = stage.fit_fusers(frames, {"a": settings}, Compute())["a"]
    night = load_fuser(run_loop(frames, settings, tmp_path, monkeypatch)).state_dict()
    assert all(torch.equal(night[name], x) for name, x in weights(ref).items())
    assert ref.digest == digest_of(KIND, [frames], job_of(settings), CODE), "found by whoever asks the same"
    history = pd.read_parquet(places.store().local(ref) / "history.parquet")
    assert history["step"].tolist() == [0, 3] and places.store().manifest(ref)["meta"]["steps"] == 4


def test_how_a_fuser_is_used_later_makes_no_other_fit(here, frames):  # noqa: F811
    other = replace(SGDFUSE, splits=("test",), steps=1, visible="rgb")
    found = stage.fit_fusers(frames, {"a": SGDFUSE, "b": other, "c": FuserSettings("maximum")}, Compute())
    assert found["a"] == found["b"] != found["c"] and load_fuser(places.store().local(found["c"])).name == "maximum"


def test_stage_one_is_taken_over_and_stays(here, frames):  # noqa: F811
    first = stage.fit_fusers(frames, {"whole": SGDFUSE}, Compute())["whole"]
    bare = replace(SGDFUSE, first_share=0.0, network={**SGDFUSE.network, "head": "plain"})
    ref = stage.fit_fusers(frames, {"bare": bare}, Compute(), first)["bare"]
    given, taken = weights(first), weights(ref)
    ours = [name for name in given if name.startswith("first.")]
    assert ours and all(torch.equal(given[name], taken[name]) for name in ours)
    assert ref != stage.fit_fusers(frames, {"bare": bare}, Compute())["bare"]


def test_a_loss_that_is_not_finite_stops_the_fit(here, frames, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Cascade, "iterate", lambda *_: {"fusion": torch.tensor(float("nan"))})
    with pytest.raises(StageFailed, match="loss of segmif is not finite at step 0"):
        stage.fit_fusers(frames, {"a": SEGMIF}, Compute())


def test_without_pairs_it_says_so_before_any_actor_starts(thermofuse_home):
    from tests.tasks.test_fit_translators import commit_frames

    bare = commit_frames(drop=["visible"])
    with pytest.raises(UsageError, match="no train frames with infrared and visible;"):
        stage.fit_fusers(bare, {"a": SGDFUSE}, Compute())
