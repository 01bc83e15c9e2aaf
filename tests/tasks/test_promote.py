"""The gate: who becomes champion, on what grounds, and that it can be undone and read about later."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.errors import StageFailed, UsageError
from tasks import promote as module
from tasks import tracking
from tasks.promote import Gate, Verdict, appoint, promote, rollback
from tasks.register import Version, exam_table, find_version, save_exam

NAME = "thermofuse-toy-1shot"
LOOSE = Gate(min_gain=0.3, beat_control=False)


def episodes(fusion: float, prototype: float = 10.0, noise: float = 0.0) -> pd.DataFrame:
    """Twenty episodes of two folds whose mIoU is what is asked for, in points."""
    rng = np.random.default_rng(0)
    wobble = noise * rng.permutation(np.linspace(-1, 1, 20))
    return pd.DataFrame(
        {"episode": i, "fold": i % 2, "label": 1 + i % 2, "query": f"q{i}", "stream": stream,
         "inter_fg": round(100 * (value + wobble[i])), "union_fg": 10_000, "inter_bg": 9, "union_bg": 10}
        for i in range(20) for stream, value in (("fusion", fusion), ("prototype", prototype))
    )  # fmt: skip


@pytest.fixture
def registry(thermofuse_home: Path, mlflow_uri: str):
    """Registers versions that are nothing but a run, an exam and tags."""
    client = tracking.client()
    client.create_registered_model(NAME)

    def add(table: pd.DataFrame, exam: str = "exam1") -> Version:
        with tracking.night_run("smoke", f"k{exam}{len(client.search_model_versions(f'name={NAME!r}'))}", {}) as run:
            pass
        made = client.create_model_version(NAME, str(thermofuse_home), run.id, tags={"exam": exam})
        version = Version(NAME, int(made.version), run.id, exam=exam)
        save_exam(version, exam, table)
        return version

    return add


def alias(name: str) -> int | None:
    found = find_version(NAME, alias=name)
    return found and found.number


def aliases() -> tuple[int | None, int | None, int | None]:
    return alias("champion"), alias("previous"), alias("challenger")


def log_of(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "promotions.jsonl").read_text().splitlines()]


def test_the_first_version_must_beat_the_control(registry):
    table = episodes(9.9, prototype=12.0)
    verdict = promote(registry(table), table)
    assert str(verdict) == "v1 stays challenger: mIoU 9.9 of v1 does not beat the prototype control at 12.0"
    assert aliases() == (None, None, 1)
    better = episodes(20.5, prototype=12.0)
    verdict = promote(registry(better), better)
    assert str(verdict) == "promoted v2, the first: mIoU 20.5 > 12.0 of the prototype control"
    assert (verdict.promoted, verdict.champion, verdict.champion_miou) == (True, 2, None)
    assert aliases() == (2, None, 1)


@pytest.mark.parametrize(("new", "promoted"), [(48.4, True), (48.39, False), (30.0, False), (48.9, True)])
def test_the_gain_decides(registry, new, promoted):
    first, second = episodes(48.1), episodes(new)
    promote(registry(first), first, LOOSE)
    verdict = promote(registry(second), second, LOOSE)
    assert verdict.promoted is promoted
    assert verdict.gain == pytest.approx(new - 48.1, abs=0.01)
    assert aliases() == ((2, 1, None) if promoted else (1, None, 2))


def test_the_verdict_is_one_sentence(registry):
    tables = [episodes(48.1), episodes(48.9), episodes(49.0)]
    sentences = [str(promote(registry(table), table, LOOSE)) for table in tables]
    assert sentences == [
        "promoted v1, the first: mIoU 48.1",
        "promoted v2 over v1: mIoU 48.9 > 48.1 (gate +0.3)",
        "kept v2: mIoU 49.0 of v3 is not 0.3 above 48.9",
    ]
    tags = [tracking.client().get_model_version(NAME, str(n)).tags for n in (1, 2, 3)]
    assert [tag["verdict"] for tag in tags] == sentences
    assert [tag["validation_status"] for tag in tags] == ["passed", "passed", "rejected"]
    assert ["promoted_at" in tag for tag in tags] == [True, True, False]


def test_the_control_must_be_beaten_even_by_a_better_challenger(registry):
    first, second = episodes(11.0), episodes(13.0, prototype=14.0)
    promote(registry(first), first)
    verdict = promote(registry(second), second)
    assert str(verdict) == "kept v1: mIoU 13.0 of v2 does not beat the prototype control at 14.0"
    assert promote(registry(second), second, Gate(beat_control=False)).promoted


def test_an_interval_that_reaches_zero_stops_a_careful_gate(registry):
    first, noisy = episodes(40.0), episodes(41.0, noise=20)
    promote(registry(first), first)
    verdict = promote(registry(noisy), noisy, Gate(require_interval=True))
    assert "may be chance, +1.0 (-" in str(verdict)
    assert verdict.low < 0 < verdict.high
    assert promote(registry(noisy), noisy, Gate(require_interval=False)).promoted


def test_a_champion_of_another_exam_is_scored_on_this_one_and_only_once(registry):
    promote(registry(episodes(90.0), exam="easy"), episodes(90.0))
    asked = []

    def rescore(champion: Version) -> pd.DataFrame:
        asked.append(champion.number)
        return episodes(30.0)

    table = episodes(31.0)
    assert str(promote(registry(table, exam="hard"), table, rescore=rescore)) == (
        "promoted v2 over v1: mIoU 31.0 > 30.0 (gate +0.3)"
    )
    assert asked == [1]
    champion = find_version(NAME, number=1)
    pd.testing.assert_frame_equal(exam_table(champion, "hard"), episodes(30.0))
    appoint(champion)
    promote(registry(table, exam="hard"), table, rescore=rescore)
    assert asked == [1], "its table on the hard exam was kept"


def test_without_a_way_to_rescore_nothing_moves(registry, caplog, monkeypatch):
    # MLflow's migrations switch off every logger that was there before them, whichever test ran them first.
    monkeypatch.setattr(logging.getLogger("tasks.promote"), "disabled", False)
    promote(registry(episodes(50.0), exam="easy"), episodes(50.0))
    table = episodes(60.0)
    verdict = promote(registry(table, exam="hard"), table)
    assert str(verdict).startswith("kept v1: v1 never sat this exam, so nothing was compared; thermofuse promote")
    assert (verdict.promoted, verdict.champion_miou, verdict.gain) == (False, None, None)
    assert aliases() == (1, None, 2)

    def rescore(_):
        raise UsageError("no learner of fold 3")

    assert not promote(registry(table, exam="hard"), table, rescore=rescore).promoted
    assert "no learner of fold 3" in caplog.text


def test_other_episodes_under_the_same_exam_are_refused(registry):
    first, fewer = episodes(50.0), episodes(60.0).iloc[:-2]
    promote(registry(first), first)
    with pytest.raises(UsageError, match="different episodes"):
        promote(registry(fewer), fewer)


def test_a_stream_that_nobody_evaluated_is_named(registry):
    table = episodes(50.0)
    with pytest.raises(UsageError, match="stream 'oracle', but the exam was sat by fusion, prototype"):
        promote(registry(table), table, Gate(stream="oracle"))


def test_nothing_moves_when_the_champion_changes_meanwhile(registry, monkeypatch):
    first, second, third = episodes(40.0), episodes(50.0), episodes(60.0)
    promote(registry(first), first)
    rival = registry(second)
    compare = module._compare

    def slow_compare(*arguments):
        found = compare(*arguments)
        tracking.client().set_registered_model_alias(NAME, "champion", str(rival.number))
        return found

    monkeypatch.setattr(module, "_compare", slow_compare)
    verdict = promote(registry(third), third)
    assert str(verdict) == "kept v1: the champion changed while v3 was judged; run again"
    assert not verdict.promoted
    assert alias("champion") == rival.number


def test_judging_the_champion_again_changes_nothing(registry, thermofuse_home):
    table = episodes(50.0)
    version = registry(table)
    promote(version, table)
    again = promote(version, table)
    assert str(again) == "v1 is the champion already: mIoU 50.0"
    assert (again.promoted, again.champion) == (False, 1)
    assert aliases() == (1, None, None)
    assert len(log_of(thermofuse_home)) == 1
    assert tracking.client().get_model_version(NAME, "1").tags["validation_status"] == "passed"


def test_rollback_walks_back_and_a_night_does_not_undo_it(registry, thermofuse_home):
    tables = [episodes(40.0), episodes(50.0), episodes(60.0)]
    versions = [registry(table) for table in tables]
    for version, table in zip(versions, tables, strict=True):
        promote(version, table)
    assert aliases() == (3, 2, None)
    assert str(rollback(NAME)) == "rolled back from v3 to v2"
    assert aliases() == (2, 1, None)
    assert str(promote(versions[2], tables[2])).startswith("kept v2: v3 was rolled back; thermofuse promote")
    rollback(NAME)
    assert aliases() == (1, None, 3)
    with pytest.raises(UsageError, match="no previous champion"):
        rollback(NAME)
    appoint(versions[2])
    assert aliases() == (3, 1, None), "a person overrules"
    assert [(entry["action"], entry["version"], entry["replaced"]) for entry in log_of(thermofuse_home)] == [
        ("promote", 1, None), ("promote", 2, 1), ("promote", 3, 2),
        ("rollback", 2, 3), ("rollback", 1, 2), ("promote", 3, 1),
    ]  # fmt: skip


def test_appointing_the_champion_is_no_move(registry, thermofuse_home):
    version = registry(episodes(1.0))
    assert str(appoint(version)) == "promoted v1 by hand"
    assert str(appoint(version)) == "v1 is the champion already"
    assert len(log_of(thermofuse_home)) == 1


def test_a_pending_version_has_a_verdict_too(thermofuse_home):
    verdict = promote(Version(NAME, None), episodes(1.0))
    assert isinstance(verdict, Verdict)
    assert not verdict.promoted
    assert "run the recipe again" in str(verdict)


def test_mlflow_down_is_one_sentence(registry, monkeypatch):
    table = episodes(50.0)
    version = registry(table)

    def refused(*_, **__):
        raise ConnectionError("refused")

    monkeypatch.setattr(tracking.client(), "get_model_version_by_alias", refused)
    with pytest.raises(StageFailed, match="cannot be reached; start it"):
        promote(version, table)
