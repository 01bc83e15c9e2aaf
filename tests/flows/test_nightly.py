"""One whole night on toy scenes: real Prefect, real Ray, real Ray Train, real MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flows.nightly import nightly
from flows.recipes import named, with_fused
from flows.studies import SEEDS, study
from models.errors import LeaseHeld
from models.fusers.settings import FuserSettings
from tasks import places
from tasks.lease import lease
from tasks.register import example_input, load
from tasks.stage import ledger
from tests.flows.conftest import living_in

STAGES = [
    "prepare", "freeze_episodes", "freeze_encoder", "fit_translators", "synthesise", "refine", "train_base",
    "train_meta", "evaluate", "register", "promote",
]  # fmt: skip
STREAMS = {"prototype", "prototype_both", "infrared", "rgb", "fusion"}
# Nothing of the checkout may be importable: the artefact has to bring the `models` package itself.
ELSEWHERE = """
    import sys
    sys.path = [p for p in sys.path if p != {checkout!r}]
    import mlflow, numpy as np
    mlflow.set_tracking_uri({uri!r})
    served = mlflow.pyfunc.load_model("models:/thermofuse-toy-1shot/1")
    rng = np.random.default_rng(0)
    query = rng.integers(0, 255, (60, 90), dtype=np.uint8)
    mask = np.zeros((1, 60, 90), np.uint8); mask[0, 20:40, 30:60] = 1
    answer = served.predict({{"query": query, "support": query[None], "support_mask": mask}})
    import models
    assert not models.__file__.startswith({checkout!r}), models.__file__
    print(answer["mask"].shape, answer["mask"].dtype, float(answer["probability"].max()) <= 1)
"""


@pytest.fixture(scope="module")
def night(first_night, night_place):
    """The first night, in the home that the tests of this module share."""
    with living_in(night_place):
        yield first_night


def test_every_stage_really_ran(night):
    assert [stage.name for stage in night.stages] == STAGES
    assert not any(stage.reused for stage in night.stages)
    assert not any(stage.quarantined for stage in night.stages)


def test_every_stream_is_scored_on_the_same_episodes_with_an_interval(night):
    streams = night.scores["streams"]
    assert set(streams) == STREAMS
    assert len({tree["miou"]["episodes"] for tree in streams.values()}) == 1
    for tree in streams.values():
        assert 0 <= tree["miou"]["low"] <= tree["miou"]["value"] <= tree["miou"]["high"] <= 1
        assert set(tree["folds"]) == {"0"} and tree["folds"]["0"]["classes"]


def test_the_verdict_is_one_sentence_about_version_1(night):
    assert night.version.number == 1
    assert "v1" in night.verdict.sentence and "\n" not in night.verdict.sentence


def test_the_report_is_there(night):
    page = Path(night.report["report"]).read_text()
    assert page.startswith("<!doctype html>") and "data:image/png;base64," in page


def test_the_same_night_again_reuses_everything_and_registers_nothing_new(night):
    again = nightly("smoke")
    work = [stage for stage in again.stages if stage.name not in ("register", "promote")]
    assert all(stage.reused for stage in work), [stage.name for stage in work if not stage.reused]
    assert again.version.number == 1 and again.run_key == night.run_key
    assert again.scores == night.scores


def test_another_exam_makes_the_champion_sit_it_too(night):
    recipe = named("smoke")
    other = replace(recipe, episodes=replace(recipe.episodes, seeds=(7,)))
    outcome = nightly(replace(other, gate=replace(recipe.gate, beat_control=False, min_gain=-100.0)))
    assert outcome.version.number == 2
    reused = {stage.name: stage.reused for stage in outcome.stages}
    assert reused["train_meta"] and not reused["evaluate"], "only the exam is new"


def test_the_registered_model_runs_outside_the_checkout(night, tmp_path):
    checkout = str(Path(__file__).parents[2])
    script = textwrap.dedent(ELSEWHERE).format(checkout=checkout, uri=places.tracking_uri())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("(60, 90) uint8 True")


def test_a_second_night_at_the_same_time_is_refused(night):
    with lease(places.store(), "nightly-smoke"), pytest.raises(LeaseHeld, match=str(os.getpid())):
        nightly("smoke")


def test_a_study_takes_the_pictures_of_the_night(night):
    """mix with one seed; the second time nothing is computed."""
    meta = replace(named("smoke").meta, steps=4, validate_every=2, validation=4)
    small = replace(named("smoke"), meta=meta)
    found = study("mix", small, SEEDS[:1])
    table = pd.DataFrame(list(found.rows))
    assert table["row"].tolist() == ["prototype", *(f"share_{share}" for share in ("0", "0.25", "0.5", "0.75", "0.9"))]
    assert table["episodes"].nunique() == 1 and table["miou"].between(0, 100).all()
    reused = {done.name: done.reused for done in ledger()}
    assert not reused.pop("compare") and reused.pop("synthesise") and reused.pop("train_base")
    again = study("mix", small, SEEDS[:1])
    assert again.key == found.key and again.rows == found.rows
    assert {done.name: done.reused for done in ledger()}["compare"]


def test_a_night_with_a_fused_picture_has_one_more_stream(night):
    plain = named("smoke")
    meta = replace(plain.meta, steps=4, validate_every=2, validation=4)
    recipe = with_fused(replace(plain, meta=meta), FuserSettings("maximum", visible="rgb"))
    outcome = nightly(recipe)
    assert set(outcome.scores["streams"]) == STREAMS | {"fused"}
    stages = {stage.name: stage.reused for stage in outcome.stages}
    assert list(stages)[4:7] == ["synthesise", "fit_fuser", "fuse"]
    assert stages["synthesise"] and stages["train_base"] and not stages["fuse"] and not stages["train_meta"]
    model = places.store().local(outcome.version.model)
    assert (model / "fuser" / "config.json").is_file()
    assert json.loads((model / "config.json").read_text())["fuse"]["visible"] == "rgb"
    example = example_input(1)
    assert load(outcome.version).predict(example)["mask"].shape == example["query"].shape
