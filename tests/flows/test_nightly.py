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

from flows.cli import main
from flows.nightly import nightly
from flows.recipes import named, with_fused
from models.errors import LeaseHeld
from models.fusers.settings import FuserSettings
from tasks import places, tracking
from tasks.judge_pictures import DOMAINS
from tasks.lease import lease
from tasks.register import example_input, load
from tasks.stage import ledger
from tests.flows.conftest import living_in

STAGES = [
    "prepare", "freeze_episodes", "freeze_encoder", "fit_translators", "synthesise", "judge", "refine",
    "train_base", "train_meta", "evaluate", "register", "promote",
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


def test_the_pictures_are_judged_before_use_beside_their_controls(night):
    found, frames, layers = night.pictures, named("smoke").judge.frames, named("smoke").judge.layers
    assert list(found) == [layer for layer in DOMAINS if layer in found] and {*layers, "thermal_rgb"} < set(found)
    assert found["infrared"]["edges"] > 0.99 and all(row["count"] == frames for row in found.values())
    for row in found.values():
        assert 0 <= row["edges"] <= 1 and 0 <= row["agreement"] <= 1 and row["same"] <= 1
    assert all(row["kid_low"] < row["kid"] < row["kid_high"] for layer, row in found.items() if layer != "visible")
    assert night.as_dict()["pictures"]["visible"]["kid"] is None
    logged = tracking.client().get_run(night.version.run_id).data.metrics
    assert logged["pictures/rgb/kid"] == pytest.approx(found["rgb"]["kid"])
    assert logged["pictures/thermal_rgb/edges"] == pytest.approx(100 * found["thermal_rgb"]["edges"])


def test_the_report_is_there(night):
    page = Path(night.report["report"]).read_text()
    assert page.startswith("<!doctype html>") and "data:image/png;base64," in page
    assert "Quality of the pictures" in page


def test_the_same_night_again_reuses_everything_and_registers_nothing_new(night, capfd):
    """Asked on the command line, whose JSON is all that reaches stdout."""
    assert main(["run", "smoke", "--json"]) == 0
    again, first = json.loads(capfd.readouterr().out, parse_constant=pytest.fail), night.as_dict()
    work = [stage for stage in again["stages"] if stage["name"] not in ("register", "promote")]
    assert all(stage["reused"] for stage in work), [stage["name"] for stage in work if not stage["reused"]]
    assert again["version"]["number"] == 1
    for name in ("run_key", "recipe", "scores", "pictures", "report"):
        assert again[name] == first[name], name


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


def test_a_study_takes_the_pictures_of_the_night(night, capfd):
    """mix with one seed; the second time nothing is computed."""
    small = ("meta.steps=4", "meta.validate_every=2", "meta.validation=4")
    asked = ["smoke", "--seeds", "1", *(token for one in small for token in ("--set", one))]
    assert main(["study", "mix", *asked, "--json"]) == 0
    found = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    table = pd.DataFrame(found["rows"])
    assert table["row"].tolist() == ["prototype", *(f"share_{share}" for share in ("0", "0.25", "0.5", "0.75", "0.9"))]
    assert table["episodes"].nunique() == 1 and table["miou"].between(0, 100).all()
    reused = {done.name: done.reused for done in ledger()}
    assert not reused.pop("compare") and reused.pop("synthesise") and reused.pop("train_base")
    assert main(["study", "mix", *asked]) == 0
    assert found["key"] in (again := capfd.readouterr().out) and "share_0.25" in again
    assert {done.name: done.reused for done in ledger()}["compare"]


def test_a_night_with_a_fused_picture_has_one_more_stream(night):
    plain = named("smoke")
    meta = replace(plain.meta, steps=4, validate_every=2, validation=4)
    recipe = with_fused(replace(plain, meta=meta), FuserSettings("maximum", visible="rgb"))
    outcome = nightly(recipe)
    assert set(outcome.scores["streams"]) == STREAMS | {"fused"}
    stages = {stage.name: stage.reused for stage in reversed(outcome.stages)}  # the champion may sit the exam again
    assert [stage.name for stage in outcome.stages][4:8] == ["synthesise", "judge", "fit_fuser", "fuse"]
    assert stages["synthesise"] and stages["train_base"] and not stages["fuse"] and not stages["train_meta"]
    model = places.store().local(outcome.version.model)
    assert (model / "fuser" / "config.json").is_file()
    assert json.loads((model / "config.json").read_text())["fuse"]["visible"] == "rgb"
    example = example_input(1)
    assert load(outcome.version).predict(example)["mask"].shape == example["query"].shape
