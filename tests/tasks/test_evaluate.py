"""The exam: scores of a table made by hand, and an examiner whose answers depend on the episode alone."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from models.backbone import save_encoder
from models.episode import EpisodeKey, EpisodeSettings, class_index, exam, to_rows
from models.errors import UsageError
from models.frames import layer_name, read_png
from models.generators.settings import TranslateSettings
from models.generators.thermal import ThermalColour
from models.metrics import COLUMNS, COUNTS, episode_counts
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.episodes import gather
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.lessons import Best, MetaSettings
from tasks import evaluate, places
from tasks.evaluate import Examiner, ExamSettings, exam_table, examples, grade, sit_again
from tasks.fanout import Compute
from tasks.train_meta import MetaJob, save_model
from tests.models.drawn import ENCODER, SIZE, drawn_frames, drawn_translations, tiny_encoder

STREAMS = ("prototype", "prototype_both", "infrared", "rgb", "fusion")
BARN = {"dataset": "barn", "classes": ["cat", "dog", "hen", "fox"], "palette": [[9, 9, 9]] * 4,
        "folds": [["dog", "cat"], ["hen"]], "ignored": []}  # fmt: skip


# ---- a table made by hand


@pytest.fixture
def barn(thermofuse_home):
    """Refs of an exam of four episodes and of the frames it is about.

    Intersection and union of the fusion: dog 10/20 and 30/60 (together 1/2), cat 8/10, hen 9/10; all other streams
    find nothing.
    """
    store = places.store()
    asked = [(0, 2, "a", (10, 20)), (0, 2, "b", (30, 60)), (0, 1, "a", (8, 10)), (1, 3, "c", (9, 10))]
    rows = []
    for episode, (fold, label, query, (both, either)) in enumerate(asked):
        row = {"id": f"e{episode}", "episode": episode, "fold": fold, "label": label, "query": query, "shown": False}
        for stream in STREAMS:
            found = both if stream == "fusion" else 0
            counts = (found, either, 100 - either, 100 - found)
            row |= {f"{stream}:{name}": count for name, count in zip(COUNTS, counts, strict=True)}
        rows.append(row | {"supports": '["d"]'})
    frame = {"id": "a", "split": "test", "infrared": None, "visible": None, "label": None, "height": 1, "width": 1}
    frames = store.draft("frames", "0" * 16).commit(pd.DataFrame([frame | {"sha256": "", "classes": "{}"}]), BARN)
    return store.draft("exam", "0" * 16).commit(pd.DataFrame(rows), {}), frames


def test_the_table_has_one_row_per_episode_and_stream(barn):
    table = exam_table(barn[0])
    assert set(table.columns) == set(COLUMNS) and len(table) == 4 * len(STREAMS)
    assert list(dict.fromkeys(table["stream"])) == list(STREAMS)
    fusion = table[table["stream"] == "fusion"]
    assert fusion["inter_fg"].tolist() == [10, 30, 8, 9] and fusion["union_fg"].tolist() == [20, 60, 10, 10]
    assert fusion["episode"].tolist() == [0, 1, 2, 3] and fusion["query"].tolist() == ["a", "b", "a", "c"]


def test_grades_are_those_of_the_hand(barn):
    scores = grade(*barn, ExamSettings(resamples=20))
    assert scores.value("fusion", "iou", 0, 2) == pytest.approx(40 / 80)
    assert scores.value("fusion", "miou", 0) == pytest.approx((0.5 + 0.8) / 2)
    assert scores.value("fusion") == pytest.approx((0.65 + 0.9) / 2) and scores.value("prototype") == 0
    background = (80 + 40 + 90 + 90) / (90 + 70 + 92 + 91)
    assert scores.value("fusion", "fb_iou") == pytest.approx((57 / 100 + background) / 2)
    assert scores.resamples == 20 and scores.queries == 3 and scores.missing == ()
    assert set(scores.table["name"].dropna()) == {"cat", "dog", "hen"}


def test_every_stream_is_set_against_the_controls(barn):
    differences = grade(*barn, ExamSettings(resamples=20)).differences
    pairs = set(zip(differences["stream"], differences["reference"], strict=True))
    controls = {("infrared", "prototype"), ("rgb", "prototype"), ("fusion", "prototype"), ("fusion", "prototype_both")}
    assert pairs == {*controls, ("fusion", "infrared"), ("fusion", "rgb")}
    whole = differences[(differences["metric"] == "miou") & differences["fold"].isna()]
    values = dict(zip(zip(whole["stream"], whole["reference"], strict=True), whole["value"], strict=True))
    assert values["fusion", "infrared"] == pytest.approx(0.775) and values["rgb", "prototype"] == 0


# ---- the examiner


class Kept(dict):
    """A draft in memory."""

    def write(self, name, data):
        self[name] = data


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Frames, translations and a model of fold 0 whose learners have moved away from the control."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("frames", "synthetic", "encoder", "translators", "model")}
    frames = drawn_frames(made["frames"], train=2, test=10)
    drawn_translations(made["synthetic"], frames)
    save_encoder(made["encoder"], ENCODER)
    ThermalColour.fit("rgb", [], []).save(made["translators"] / "rgb")
    settings = ExpertSettings(base_width=16, anchored=AnchoredSettings(width=8))
    torch.manual_seed(0)
    expert = Expert(tiny_encoder().channels, frames.base(0), 2, settings)
    for learner in expert.ensemble.learners:
        nn.init.normal_(learner.correct.out.weight)
    parts = [made[name] for name in ("frames", "synthetic", "synthetic", "encoder", "synthetic", "translators")]
    job = MetaJob(MetaSettings(size=SIZE, expert=ExpertSettings(anchored=settings.anchored)), (0,), "thermal")
    experts = nn.ModuleDict({"0": expert})
    save_model(made["model"], experts, frames, job, parts, Best(experts))
    return frames, [made[name] for name in ("frames", "synthetic", "model")]


@pytest.fixture(scope="module")
def rows(folders):
    """Six episodes of fold 0, as `evaluate` hands them out; the second is shown."""
    frames, _ = folders
    asked = to_rows(frames, exam(frames, 0, EpisodeSettings(min_pixels=40))).head(6).to_dict("records")
    return [row | {"id": f"e{row['episode']:06d}", "shown": n == 1} for n, row in enumerate(asked)]


@pytest.fixture(scope="module")
def answers(folders, rows):
    draft = Kept()
    return Examiner({"cache_gb": 1.0}, folders[1])(rows, draft), draft


def test_no_answer_depends_on_shards_their_order_or_the_cache(folders, rows, answers):
    apart, draft = {}, Kept()
    forgetful = Examiner({"cache_gb": 0.0}, folders[1])
    for row in reversed(rows):
        apart[row["id"]] = forgetful([row], draft)[0]
    assert [apart[row["id"]] for row in rows] == answers[0] and draft == answers[1]


def test_the_counts_are_those_of_the_masks_at_the_frames_own_size(folders, rows, answers):
    frames, _ = folders
    shown, row = answers[0][1], rows[1]
    assert set(answers[1]) == {f"masks/{row['id']}.{stream}.png" for stream in STREAMS}, "only what is shown is kept"
    truth = frames.label(row["query"]) == row["label"]
    for stream in STREAMS:
        mask = read_png(io.BytesIO(answers[1][f"masks/{row['id']}.{stream}.png"]))
        assert mask.shape == SIZE and set(np.unique(mask)) <= {0, 255}
        assert {name: shown[f"{stream}:{name}"] for name in COUNTS} == episode_counts(mask // 255, truth)
    assert json.loads(shown["supports"]) == row["supports"]
    assert {name: shown[name] for name in ("episode", "fold", "label", "query")} == {
        name: row[name] for name in ("episode", "fold", "label", "query")
    }


def test_a_fused_stream_reads_the_fourth_folder(folders, rows, tmp_path):
    """A model that calls its second stream's layer fused, and fused pictures that are the translations."""
    frames, parts = folders
    shutil.copytree(parts[2], tmp_path / "model")
    config = json.loads((parts[2] / "config.json").read_text())
    config["streams"][1]["layer"] = "fused"
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "images").mkdir()
    for id in frames.ids("test"):
        shutil.copy(parts[1] / layer_name(id, "rgb"), tmp_path / layer_name(id, "fused"))
    made = Examiner({"cache_gb": 1.0}, [*parts[:2], tmp_path / "model", tmp_path])
    assert made(rows, Kept()) == Examiner({"cache_gb": 1.0}, parts)(rows, Kept())


def test_streams_disagree_where_learners_have_moved(answers):
    counts = {tuple(row[f"{stream}:inter_fg"] for row in answers[0]) for stream in STREAMS}
    assert len(counts) == len(STREAMS), "two streams gave the same answers"


def test_the_whole_way_from_the_list_to_the_grades(folders, rows, thermofuse_home, monkeypatch):
    """evaluate, exam_table, grade and examples on a store, without actors."""
    frames, parts = folders
    store, refs = places.store(), []
    for kind, folder in zip(("frames", "synthetic", "model"), parts, strict=True):
        draft = store.draft(kind, "0" * 16)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file() and path.name not in ("manifest.json", "rows.parquet"):  # those are the store's own
                draft.write(str(path.relative_to(folder)), path.read_bytes())
        table = frames.rows if kind == "frames" else None
        refs.append(draft.commit(table, frames.info if kind == "frames" else {}, count=1))
    listed = pd.DataFrame(rows).drop(columns=["id", "shown"])
    episodes = store.draft("episodes", "0" * 16).commit(listed, {})
    asked = []

    def in_process(worker, given, settings, compute, *, kind, inputs, code):
        asked.extend(given)
        draft = store.draft(kind, "0" * 16)
        made = worker(settings, [store.local(ref) for ref in inputs])(given, draft)
        return draft.commit(pd.DataFrame(made), {})

    monkeypatch.setattr(evaluate, "fan_out", in_process)
    settings = ExamSettings(resamples=20, shown=1)
    ref = evaluate.evaluate.fn(refs[2], refs[0], refs[1], episodes, settings, Compute())
    assert [row["id"] for row in asked] == [row["id"] for row in rows]
    labels = [row["label"] for row in rows]
    middle = [labels[:n].count(label) == labels.count(label) // 2 for n, label in enumerate(labels)]
    assert [row["shown"] for row in asked] == middle, "one episode a class, from the middle of its list"
    scores = grade(ref, refs[0], settings)
    assert 0 < scores.value("fusion") < 1
    drawn = examples(ref, refs[0])
    assert sorted(example.name for example in drawn) == sorted({frames.class_name(c) for c in labels})
    for example in drawn:
        assert set(example.predictions) == {"infrared", "rgb", "fusion"}
        assert example.truth.any() and example.support_mask.any()
        assert all(set(np.unique(mask)) <= {0, 1} for mask in example.predictions.values())


def test_a_version_of_another_store_cannot_sit_again(thermofuse_home, barn):
    class Version:
        model = None

        def __str__(self):
            return "barn version 3"

    rescore = sit_again(barn[1], barn[0], TranslateSettings(), ExamSettings(), Compute())
    with pytest.raises(UsageError, match="barn version 3 is not in this store; point THERMOFUSE_STORE"):
        rescore(Version())


def test_in_the_exam_no_class_is_left_out_of_the_base_map(folders):
    """P_b leaves the episode's class out in training alone, even when an exam asks for a base class."""
    frames, parts = folders
    label = next(c for c in frames.base(0) if len(class_index(frames, [c], 20, "test")[c]) > 1)
    query, support = class_index(frames, [label], 20, "test")[label][:2]
    examiner, key = Examiner({"cache_gb": 1.0}, parts), EpisodeKey(0, label, query, (support,), 0)
    batch = gather(examiner.bank, [key], ["infrared", "rgb"])
    expert = examiner.experts[0]
    found = examiner.answers(key, batch)["fusion"]
    assert torch.equal(found, expert(batch.query, batch.support, batch.masks).final)
    trained = expert(batch.query, batch.support, batch.masks, expert.own_index([label])).final
    assert not torch.allclose(found, trained)


def test_a_shard_is_sat_query_by_query(folders, rows):
    """So that features and base maps serve all classes and seeds of a query; the answers keep their order."""
    examiner, seen = Examiner({"cache_gb": 1.0}, folders[1]), []
    examiner.sit = lambda row, draft: seen.append(row["query"]) or {"id": row["id"]}
    mixed = [rows[n] for n in (3, 0, 5, 1, 4, 2)] + rows
    assert [answer["id"] for answer in examiner(mixed, Kept())] == [row["id"] for row in mixed]
    assert len([q for n, q in enumerate(seen) if n == 0 or q != seen[n - 1]]) == len({row["query"] for row in rows})
