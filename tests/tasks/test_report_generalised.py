"""The page of a generalised night: numbers, pictures and labels in it, copies in MLflow, nothing fetched."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from flows import display
from models.plots import contact_sheet, png
from tasks import tracking
from tasks.report import load_outcome
from tasks.report_generalised import GeneralisedOutcome, report_generalised, sentence
from tasks.stage import StageReport
from tasks.tabulate_generalised import step_scores
from tests.tasks.test_report import Text
from tests.tasks.test_tabulate_generalised import STEPS, scores

STAGES = (StageReport("imagine", 12.0, False, 30, 0, 3, 1, 900.0),)


def outcome(seeds=(0, 1), steps=STEPS, **changes):
    parts = {"run_key": "toy-1", "recipe": "toy-gfss", "scores": step_scores(scores(seeds), steps), "stages": STAGES,
             "models": {0: "/s/generalised/1"}}
    return GeneralisedOutcome(**{**parts, **changes})


@pytest.fixture
def night(thermofuse_home, mlflow_uri):
    with tracking.night_run("toy-gfss", "toy-1", {"a": 1}) as run:
        yield run


@pytest.fixture(scope="module")
def pictures():
    sheet = png(contact_sheet([np.zeros((4, 4), np.uint8)], ["a"]), dpi=20)
    return {"steps": sheet, "drawn": sheet, "labels": sheet}


def test_the_page_says_what_each_step_is_worth_and_shows_the_labels(night, pictures):
    done = report_generalised.fn(outcome(), settings={"shots.shots": "1"}, pictures=pictures, run=night)
    page = Text(Path(done.report["report"]).read_text())
    for words in ("novel mIoU 25.0, +10.0 over supports alone, 25 % of the way to real masks", "Over the step before",
                  "Labels, step by step", "imagine", "shots.shots", "/s/generalised/1", "ceiling"):
        assert words in page.text, words
    assert len(page.addresses) == 3 and all(one.startswith("data:image/png;base64,") for one in page.addresses)
    assert page.open == []
    assert json.loads(Path(done.report["scores.json"]).read_text())["protocol"] == "diam"
    assert Path(done.report["scores.md"]).read_text().startswith("| row |")
    client = tracking.client()
    copies = {file.path for file in client.list_artifacts(night.id, "report")}
    assert {"report/report.html", "report/labels.png"} <= copies
    assert client.get_run(night.id).data.metrics["hdig.novel"] == 25.0


def test_the_outcome_is_plain_and_found_again(night, pictures):
    done = report_generalised.fn(outcome(seeds=(0,)), settings={}, pictures=pictures, run=night)
    found = load_outcome("toy-gfss")
    assert found == done.as_dict() and json.dumps(found, allow_nan=False)
    assert {"run_key", "recipe", "scores", "stages", "report", "models"} == set(found)
    assert found["scores"]["rows"][0]["novel_low"] is None


def test_a_foundation_night_has_pictures_and_no_scores(night, pictures):
    made = outcome(scores={}, models={0: "/s/foundation/1"})
    done = report_generalised.fn(made, settings={}, pictures={"drawn": pictures["drawn"]}, run=night)
    assert set(done.report) == {"report", "drawn"} and sentence(done) == "made /s/foundation/1"
    assert "made /s/foundation/1" in Path(done.report["report"]).read_text()


def test_a_foundation_night_says_how_often_its_pictures_are_right(night, pictures):
    from rich.console import Console

    judged = {"recognised": 0.5417, "recognised_real": 0.9067, "chance": 1 / 12}
    made = outcome(scores=judged, models={0: "/s/foundation/1"})
    done = report_generalised.fn(made, settings={}, pictures={"drawn": pictures["drawn"]}, run=night)
    words = "54% of the pictures show what was asked for (real ones 91%, chance 8%)"
    assert sentence(done) == f"made /s/foundation/1; {words}"
    console = Console(file=io.StringIO(), width=120)
    display.outcome(console, done.as_dict())
    assert words in (drawn := console.file.getvalue()) and "/s/foundation/1" in drawn and "mIoU" not in drawn


def test_a_night_of_supports_alone_says_so():
    assert sentence(outcome(steps=STEPS[:1])) == "novel mIoU 15.0 with supports alone"
    assert sentence(outcome(steps=STEPS[:2])) == "novel mIoU 25.0, +10.0 over supports alone"


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_terminal_shows_the_same(seeds):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    display.outcome(console, outcome(seeds).as_dict())
    drawn = console.file.getvalue()
    assert "toy-gfss" in drawn and "imagine" in drawn and "/s/generalised/1" in drawn and "hdig" in drawn
    assert "25 %" in drawn and ("60.0–60.0" in drawn) == (len(seeds) == 2) and "…" not in drawn


def test_a_study_of_steps_is_drawn_by_its_columns():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    rows = outcome().as_dict()["scores"]["rows"]
    display.study(console, {"study": "syn4seg", "key": "k", "rows": rows, "report": {"table.md": "/r/table.md"}})
    assert "novel" in (drawn := console.file.getvalue()) and "+10.0" in drawn and "/r/table.md" in drawn

