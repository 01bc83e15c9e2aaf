"""The page, the tables and the outcome of a night."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from models.errors import UsageError
from models.metrics import score
from models.plots import contact_sheet, png
from tasks import tracking
from tasks.promote import Verdict
from tasks.register import Version
from tasks.report import (
    Outcome,
    duration,
    layer_table,
    load_outcome,
    markdown,
    refine_rows,
    report,
    run_folder,
    save_outcome,
    score_table,
)
from tasks.stage import StageReport

FOLDS = {0: [1], 1: [2, 3]}
NAMES = {1: "person", 2: "car", 3: "<b>bike</b>"}
STREAMS = {"prototype": 20, "fusion": 60, "extra": 30, "infrared": 50}


def scores(folds: dict = FOLDS, skip: int | None = None) -> dict:
    rows = [
        {"episode": 10 * label + i, "fold": fold, "label": label, "query": f"q{i}", "stream": stream,
         "inter_fg": value + i, "union_fg": 100, "inter_bg": 80, "union_bg": 100}
        for fold, labels in folds.items() for label in labels for i in range(4) if label != skip
        for stream, value in STREAMS.items()
    ]  # fmt: skip
    pairs = [("fusion", "infrared"), ("fusion", "prototype")]
    return score(pd.DataFrame(rows), folds, names=NAMES, pairs=pairs, resamples=50).as_dict()


LAYERS = {
    "infrared": {"kid": 0.51234, "kid_low": 0.4, "kid_high": 0.6, "fid": 123.456, "edges": 1.0, "agreement": 1.0,
                 "same": 1.0, "count": 8, "real": 5},
    "thermal_rgb": {"kid": float("nan"), "kid_low": float("nan"), "kid_high": float("nan"), "fid": float("nan"),
                    "edges": 0.25, "agreement": float("nan"), "same": 0.5, "count": 7, "real": 0},
}  # fmt: skip


def outcome(**changes) -> Outcome:
    name = "thermofuse-toy-1shot"
    parts = {
        "run_key": "abc123", "recipe": "smoke", "verdict": Verdict(True, "promoted v2 over v1", name, 2, 2, gain=1.25),
        "version": Version(name, 2, exam="exam1"), "scores": scores(),
        "stages": (StageReport("prepare", 3.25, True, 40, 1, 5, 4, 123.4),
                   StageReport("train_base", 200.0, False, 2, 0, 0, 0, 1234.5)),
    }  # fmt: skip
    return Outcome(**{**parts, **changes})


class Text(HTMLParser):
    """The words of a page, and every address in its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.addresses, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def pictures() -> dict[str, bytes]:
    sheet = png(contact_sheet([np.zeros((4, 4), np.uint8)], ["a"]), dpi=20)
    return {"grid": sheet, "synthetic": sheet, "scores": sheet}


def test_the_page_says_what_the_night_found_and_fetches_nothing(thermofuse_home, pictures):
    refined = [{"layer": "rgb", "name": "person", "kept": 7500, "freed": 2500}]
    done = report(outcome(), settings={"data.fold": "None"}, pictures=pictures, refined=refined)
    html = (run_folder("abc123") / "report.html").read_text()
    page = Text(html)
    assert not page.open, "every element is closed"
    for words in ("promoted v2 over v1", "Promoted", "smoke", "run abc123", "+1.2", "61.5", "Fold 1", "person",
                  "<b>bike</b>", "Fused − Infrared only", "+10.0", "3 min 20 s", "reused", "25.0 %", "data.fold",
                  "(4 reused)", "exam1"):  # fmt: skip
        assert words in page.text, words
    assert len(page.addresses) == 2, "the page draws the scores itself"
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(|<script|<link", html)
    assert "prefers-color-scheme: dark" in html
    assert done.report["report"] == str(thermofuse_home / "runs" / "abc123" / "report.html")
    assert {path.name for path in run_folder("abc123").iterdir()} == {
        "report.html", "scores.json", "scores.md", "grid.png", "synthetic.png", "scores.png", "outcome.json",
    }  # fmt: skip


def test_a_night_without_pictures_champion_or_pseudo_labels_has_a_page_too(thermofuse_home):
    verdict = Verdict(False, "v1 stays challenger: it is bad", "thermofuse-toy-1shot", 1, None)
    pending = Version("thermofuse-toy-1shot", None)
    report(outcome(verdict=verdict, version=pending, stages=(), scores=scores({0: [1]})), settings={})
    page = Text((run_folder("abc123") / "report.html").read_text())
    assert "Not promoted" in page.text
    for absent in ("Episodes of the exam", "Synthetic pictures", "Quality of", "Pseudo-labels", "Gain over",
                   "All folds", "vNone"):  # fmt: skip
        assert absent not in page.text, absent


def test_a_class_without_episodes_is_a_dash_and_not_a_crash(thermofuse_home):
    report(outcome(scores=scores(skip=3)), settings={})
    assert "–" in (run_folder("abc123") / "report.html").read_text()
    assert "| <b>bike</b> | – | – | – | – |" in markdown(scores(skip=3))
    json.loads((run_folder("abc123") / "scores.json").read_text(), parse_constant=pytest.fail)


def test_the_page_and_the_json_say_how_good_the_pictures_are(thermofuse_home):
    done = report(outcome(pictures=LAYERS), settings={})
    page = Text((run_folder("abc123") / "report.html").read_text()).text
    assert "Quality of the pictures 8 held-out frames" in page and "5 real ones" in page
    assert "Infrared as it is 0.512 0.4 to 0.6 123 100.0" in page
    assert "Colour map (control) – – 25.0 – 50.0 7" in page
    assert done.as_dict()["pictures"]["infrared"] == LAYERS["infrared"]
    assert done.as_dict()["pictures"]["thermal_rgb"]["kid"] is None, "NaN is no JSON"
    assert load_outcome()["pictures"] == done.as_dict()["pictures"]


def test_a_layer_without_a_title_goes_by_its_name():
    (row,) = layer_table({"depth": LAYERS["infrared"]})
    assert row["title"] == "depth" and row["edges"] == 100 and (row["count"], row["real"]) == (8, 5)


def test_mlflow_gets_copies(thermofuse_home, mlflow_uri, pictures):
    with tracking.night_run("smoke", "abc123", {}) as run:
        report(outcome(), settings={}, pictures=pictures, run=run)
    copies = {info.path for info in tracking.client().list_artifacts(run.id, "report")}
    assert {"report/report.html", "report/scores.json", "report/scores.md", "report/grid.png"} <= copies
    page = (run_folder("abc123") / "report.html").read_text()
    assert run.labels["git_sha"][:16] in page


def test_prefect_shows_the_scores_when_a_flow_runs(thermofuse_home, monkeypatch):
    import prefect.artifacts
    from prefect.context import FlowRunContext

    shown = []
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", lambda text, **_: shown.append(text))
    report.fn(outcome(), settings={})
    assert not shown, "outside a flow there is nobody to tell"
    monkeypatch.setattr(FlowRunContext, "get", classmethod(lambda _: object()))
    report.fn(outcome(), settings={})
    assert shown[0].startswith("**promoted v2 over v1**")


def test_score_table_orders_streams_and_names_the_best():
    table = score_table(scores())
    assert table["streams"] == ["fusion", "infrared", "prototype", "extra"]
    assert [(row["kind"], row["name"]) for row in table["rows"]] == [
        ("mean", "All folds"), ("fold", "Fold 0"), ("class", "person"),
        ("fold", "Fold 1"), ("class", "car"), ("class", "<b>bike</b>"),
    ]  # fmt: skip
    assert {row["best"] for row in table["rows"]} == {"fusion"}
    assert table["rows"][0]["cells"]["fusion"]["value"] == pytest.approx(61.5)
    assert table["rows"][0]["episodes"] == 12
    assert table["top"] == 70


def test_markdown_has_a_row_per_class_and_fb_iou():
    lines = markdown(scores()).splitlines()
    assert lines[0] == "| mIoU, points | Fused | Infrared only | Prototype (control) | extra |"
    assert lines[2].startswith("| **All folds** | 61.5 (6")
    assert lines[8].startswith("| FB-IoU | 70.8 (")
    assert lines[-1] == "95 % intervals from 50 resamples of 4 queries."


def test_refine_rows_add_up_over_frames():
    rows = pd.DataFrame({"counts": [
        json.dumps({"rgb": {"1": {"kept": 5, "freed": 1}, "2": {"kept": 0, "freed": 0}, "0": {"kept": 9, "freed": 9}}}),
        json.dumps({"rgb": {"1": {"kept": 2, "freed": 2}}, "lightness": {"2": {"kept": 3, "freed": 0}}}),
    ]})  # fmt: skip
    assert refine_rows(rows, ("person", "car")) == [
        {"layer": "lightness", "name": "car", "kept": 3, "freed": 0},
        {"layer": "rgb", "name": "person", "kept": 7, "freed": 3},
    ]


def test_an_outcome_survives_the_disk(thermofuse_home):
    verdict = replace(outcome().verdict, low=float("nan"))
    save_outcome(outcome(verdict=verdict))
    found = load_outcome()
    assert found == outcome().as_dict()
    assert found["verdict"]["low"] is None, "NaN is no JSON"
    assert found["stages"][1]["seconds"] == 200.0
    assert str(outcome()) == "promoted v2 over v1"


def test_load_outcome_takes_the_newest_a_key_or_a_recipe(thermofuse_home):
    for age, (key, recipe) in enumerate([("new1", "smoke"), ("mid2", "msrs"), ("old3", "smoke")]):
        path = save_outcome(outcome(run_key=key, recipe=recipe))
        os.utime(path, (1000 - age, 1000 - age))
    assert load_outcome()["run_key"] == "new1"
    assert load_outcome("old")["run_key"] == "old3"
    assert load_outcome("msrs")["run_key"] == "mid2"
    with pytest.raises(UsageError, match="no run 'other'; the runs here are mid2, new1, old3"):
        load_outcome("other")


def test_without_any_run_the_message_says_how_to_start_one(thermofuse_home):
    with pytest.raises(UsageError, match="thermofuse run smoke"):
        load_outcome()


@pytest.mark.parametrize(("seconds", "words"), [
    (0.04, "0.0 s"), (8.44, "8.4 s"), (200, "3 min 20 s"), (3599.9, "1 h 0 min"), (7500, "2 h 5 min"),
])  # fmt: skip
def test_durations_read_as_people_say_them(seconds, words):
    assert duration(seconds) == words
