"""The table of a study against numbers worked out by hand, on disk and in MLflow."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from models.metrics import COUNTS
from tasks import tracking
from tasks.tabulate import Row, markdown, tabulate, write_study

CLASSES = {0: (1, 2)}
ROWS = (Row("control", "no training", "a:prototype"), Row("plain", "one look", "a:all"), Row("twice", "two", "b:all"))
FOUND = {"a:prototype": 10, "a:all": 20, "b:all": 30}  # of 50 pixels, on each query; the second seed finds 5 more


@pytest.fixture
def episodes():
    rows = []
    for seed, more in ((1, 0), (2, 5)):
        for number, (query, label) in enumerate([("x", 1), ("y", 1), ("z", 2)]):
            for stream, found in [*FOUND.items(), ("b:rgb", 1)]:
                both = found + more
                counts = dict(zip(COUNTS, (both, 50, 50 + both, 100 - both), strict=True))
                rows.append({"episode": number + 10 * seed, "seed": seed, "fold": 0, "label": label, "query": query,
                             "stream": stream, **counts})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def table(episodes):
    return tabulate(episodes, ROWS, ("control", "plain"), CLASSES, resamples=200)


def test_rows_are_miou_over_all_seeds_with_gains_over_the_references(table):
    assert table["row"].tolist() == ["control", "plain", "twice"]
    assert table["miou"].tolist() == [25.0, 45.0, 65.0]  # (10 + 15) / 100, and so on
    assert table["over_control"].tolist()[1:] == [20.0, 40.0] and pd.isna(table["over_control"][0])
    assert table["over_plain"][2] == 20.0 and pd.isna(table["over_plain"][1])
    assert table["episodes"].tolist() == [6, 6, 6]


def test_equal_gains_on_every_query_have_a_point_as_interval(table):
    twice = table.iloc[2]
    assert twice["over_plain_low"] == twice["over_plain_high"] == 20.0
    assert (table["low"] <= table["miou"]).all() and (table["miou"] <= table["high"]).all()


def test_the_spread_of_the_seeds_is_shown(table):
    assert table["seed_low"].tolist() == [20.0, 40.0, 60.0]
    assert table["seed_high"].tolist() == [30.0, 50.0, 70.0]


def test_a_class_that_no_pixel_is_or_is_called_lowers_no_seed(episodes):
    nowhere = episodes[episodes["query"] == "z"].assign(label=3, episode=lambda t: t["episode"] + 100)
    nowhere = nowhere.assign(**dict.fromkeys(COUNTS[:2], 0))
    table = tabulate(pd.concat([episodes, nowhere]), ROWS, ("control",), {0: (1, 2, 3)}, resamples=20)
    assert table["miou"].tolist() == [25.0, 45.0, 65.0]
    assert table["seed_low"].tolist() == [20.0, 40.0, 60.0] and table["seed_high"].tolist() == [30.0, 50.0, 70.0]


def test_the_text_has_a_line_per_row(table):
    lines = markdown(table, ("control", "plain")).splitlines()
    assert lines[0] == "| row | mIoU | FB-IoU | seeds | over control | over plain | what it is |"
    assert lines[2].startswith("| control | 25.00 [25.00, 25.00] |") and "| – |" in lines[2]
    assert "| +20.00 [+20.00, +20.00] |" in lines[4] and lines[4].endswith("| two |")


def test_what_variants_may_be_chosen_by_is_a_column_of_its_own(episodes):
    table = tabulate(episodes, ROWS, ("control",), CLASSES, resamples=20, held_out={"plain": 12.34, "twice": 5.0})
    assert pd.isna(table["held_out"][0]) and table["held_out"].tolist()[1:] == [12.34, 5.0]
    lines = markdown(table, ("control",)).splitlines()
    assert "| held-out base classes |" in lines[0]
    assert "| 20.0 to 30.0 | – | – |" in lines[2] and "| 40.0 to 50.0 | 12.3 | +20.00" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_files_and_runs_of_a_study(table, thermofuse_home, mlflow_uri):
    with tracking.night_run("study", "key", {"a": 1}) as run:
        report = write_study("ablation", None, "key", table, ("control",), b"chart", run)
    assert set(report) == {"table.parquet", "table.md", "chart"}
    assert pd.read_parquet(report["table.parquet"]).equals(table)
    assert Path(report["chart"]).read_bytes() == b"chart"
    client = tracking.client()
    found = client.search_runs([client.get_run(run.id).info.experiment_id])
    children = {r.data.tags["row"]: r for r in found if r.data.tags.get("mlflow.parentRunId") == run.id}
    assert set(children) == {"control", "plain", "twice"}
    assert children["twice"].data.metrics["miou"] == 65.0 and children["twice"].data.metrics["over_control"] == 40.0
    assert "over_control" not in children["control"].data.metrics
    assert {r.path for r in client.list_artifacts(run.id, "study")} == {"study/" + n for n in
                                                                       ("table.parquet", "table.md", "chart.png")}


def test_a_study_may_bring_its_own_text_and_more_pictures(table, thermofuse_home, mlflow_uri):
    with tracking.night_run("study", "key", {"a": 1}) as run:
        report = write_study("fusers", None, "key", table, (), b"chart", run, "| own |\n", {"scenes": b"sheet"})
    assert Path(report["table.md"]).read_text() == "| own |\n" and Path(report["scenes"]).read_bytes() == b"sheet"
