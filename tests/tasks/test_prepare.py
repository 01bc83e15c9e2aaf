import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from models.episode import EpisodeSettings, from_rows
from models.errors import StageFailed, UsageError
from models.frames import Frames
from tasks import fanout, places
from tasks.fanout import Compute
from tasks.prepare import DataSettings, freeze_episodes, open_data, open_frames, prepare
from tasks.stage import ledger, reset_ledger
from tests.models.datasets.miniatures import colour, folder, label, save
from tests.tasks.inline import without_actors

TOY = DataSettings(options={"train": 10, "test": 40, "unlabelled": 2, "size": (48, 64)})
ANY = Compute(max_quarantined=1.0, shard_size=4)
EXAM = EpisodeSettings(min_pixels=30)


@pytest.fixture
def here(thermofuse_home, monkeypatch):
    """Shards run in this process."""
    without_actors(monkeypatch)


@pytest.fixture
def barn(here, tmp_path, monkeypatch):
    """A folder dataset of 4 training and 3 test frames under $THERMOFUSE_DATA."""
    monkeypatch.setenv("THERMOFUSE_DATA", str(tmp_path / "data"))
    return folder(tmp_path / "data" / "barn")


BARN = DataSettings(dataset="folder", root="barn")


def quarantine(ref) -> dict[str, str]:
    table = places.store().rows(ref, fanout.QUARANTINE)
    return dict(zip(table["id"], table["error"], strict=True))


# ---- prepare


def test_frames_come_out_as_the_dataset_reads_them(here):
    frames = open_frames(prepare(TOY, ANY))
    dataset = open_data(TOY)
    assert frames.ids() == [item.id for item in dataset.items()]
    for item in dataset.items():
        picture = dataset.read(item)
        for layer in ("infrared", "visible", "label"):
            assert frames.has(item.id, layer) == (getattr(picture, layer) is not None)
            if frames.has(item.id, layer):
                assert np.array_equal(getattr(frames, layer)(item.id), getattr(picture, layer))


def test_rows_hold_the_facts_of_each_frame(here):
    ref = prepare(TOY, ANY)
    rows = places.store().rows(ref)
    assert (ref.kind, ref.count) == ("frames", 52)
    facts = {"height", "width", "sha256", "classes"}
    assert set(rows.columns) == {"id", "split", "infrared", "visible", "label"} | facts
    assert rows["sha256"].is_unique and set(rows["height"]) == {48} and set(rows["width"]) == {64}
    frames = open_frames(ref)
    for id in frames.ids("train"):
        labels, counts = np.unique(frames.label(id), return_counts=True)
        assert frames.pixels(id) == {int(n): int(c) for n, c in zip(labels, counts, strict=True) if n not in (0, 255)}


def test_the_manifest_says_what_the_classes_are(barn):
    meta = places.store().manifest(prepare(BARN, ANY))["meta"]
    assert meta["dataset"] == "barn" and meta["classes"] == ["cat", "dog", "hen"]
    assert meta["folds"] == [["cat"], ["dog"], ["hen"]] and len(meta["palette"]) == 3 and meta["ignored"] == []


def test_bad_frames_are_quarantined_with_the_reason_and_the_others_go_on(barn):
    (barn / "label" / "a0.png").write_bytes((barn / "label" / "a0.png").read_bytes()[:40])
    (barn / "label" / "a1.png").unlink()
    save(barn / "label" / "a2.png", np.zeros((5, 5), np.uint8))
    (barn / "infrared" / "b0.png").write_text("not a picture")
    save(barn / "label" / "b1.png", label(9))
    ref = prepare(BARN, ANY)
    reasons = quarantine(ref)
    assert list(reasons) == ["a0", "a1", "a2", "b0", "b1"]
    said = ["cannot be decoded", "unlabelled", "differ in size", "cannot be decoded", "label ids [9]"]
    assert all(part in reason for part, reason in zip(said, reasons.values(), strict=True))
    assert open_frames(ref).ids() == ["a3", "b2"]


def test_too_many_bad_frames_fail_the_stage(barn):
    (barn / "label" / "a0.png").unlink()
    with pytest.raises(StageFailed, match=r"1 of 7 rows are unusable.*unlabelled: there is no a0\.png"):
        prepare(BARN, Compute())


def test_all_background_is_a_fine_training_negative(barn):
    save(barn / "label" / "a0.png", np.zeros((24, 32), np.uint8))
    frames = open_frames(prepare(BARN, ANY))
    assert frames.pixels("a0") == {} and "a0" in frames.ids("train")


def test_prepared_frames_are_found_again(barn):
    reset_ledger()
    first, second = prepare(BARN, ANY), prepare(BARN, Compute(actors=7, shard_size=1))
    assert first == second
    assert [report.reused for report in ledger()] == [False, True]


def test_folds_and_limits_that_change_nothing_share_the_frames(barn):
    assert prepare(replace(BARN, fold=1, limit=100), ANY) == prepare(BARN, ANY)


def test_a_changed_file_or_option_makes_new_frames(barn):
    first = prepare(BARN, ANY)
    save(barn / "label" / "a0.png", np.zeros((24, 32), np.uint8))
    second = prepare(BARN, ANY)
    third = prepare(replace(BARN, options={"ignored": ["dog"]}), ANY)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert 2 not in open_frames(third).pixels("a0")


def test_the_same_files_make_the_same_frames_however_they_came_here(barn, tmp_path):
    first = prepare(BARN, ANY)
    shutil.copytree(barn, tmp_path / "again", copy_function=shutil.copy)  # with times of their own
    shutil.rmtree(barn)
    (tmp_path / "again").rename(barn)
    assert prepare(BARN, ANY) == first


def test_a_limit_keeps_the_first_of_each_split(here):
    frames = open_frames(prepare(replace(TOY, limit=2), ANY))
    assert frames.ids() == [f"{split}-0000{i}" for split in ("train", "test", "unlabelled") for i in range(2)]


def test_folds_of_the_settings_replace_those_of_the_dataset(barn):
    frames = open_frames(prepare(replace(BARN, folds=(("hen", "cat"),)), ANY))
    assert frames.novel(0) == (1, 3) and frames.base(0) == (2,)
    with pytest.raises(UsageError, match="name cow"):
        prepare(replace(BARN, folds=(("cow",),)), ANY)


def test_unpaired_pictures_become_the_split_visible(barn, tmp_path):
    save(tmp_path / "data" / "streets" / "deep" / "x.jpg", colour(0))
    save(tmp_path / "data" / "streets" / "y.png", colour(1)[:10])
    (tmp_path / "data" / "streets" / "notes.txt").write_text("not a picture, and not listed")
    frames = open_frames(prepare(replace(BARN, unpaired_visible="streets"), ANY))
    assert frames.ids("visible") == ["unpaired__deep__x", "unpaired__y"]
    assert np.array_equal(frames.visible("unpaired__y"), colour(1)[:10])
    with pytest.raises(UsageError, match="no pictures in"):
        prepare(replace(BARN, unpaired_visible="barn/nothing"), ANY)


def test_the_root_is_looked_for_by_name_under_the_data_root(barn, tmp_path):
    with pytest.raises(UsageError, match="make that folder") as caught:
        prepare(DataSettings(dataset="msrs"), ANY)
    assert str(tmp_path / "data" / "msrs") in str(caught.value)
    assert prepare(replace(BARN, root=str(barn)), ANY).count == 7


def test_a_dataset_without_frames_is_told(barn):
    (barn / "train.txt").write_text("")
    (barn / "test.txt").write_text("")
    with pytest.raises(UsageError, match="lists no frames"):
        prepare(BARN, ANY)


# ---- freeze_episodes


def test_the_exam_is_frozen_for_every_fold_or_one(here):
    frames = prepare(TOY, ANY)
    every = freeze_episodes(frames, EXAM, TOY)
    one = freeze_episodes(frames, EXAM, replace(TOY, fold=2))
    rows = places.store().rows(every)
    assert every.kind == "episodes" and every.count == len(rows)
    assert set(rows["fold"]) == {0, 1, 2, 3}
    assert from_rows(places.store().rows(one)) == [key for key in from_rows(rows) if key.fold == 2]
    opened = open_frames(frames)
    for key in from_rows(rows):
        assert key.query not in key.supports and key.label in opened.novel(key.fold)


def test_the_manifest_of_an_exam_counts_what_is_left(here):
    frames = prepare(TOY, ANY)
    meta = places.store().manifest(freeze_episodes(frames, EXAM, TOY))["meta"]
    rows = places.store().rows(freeze_episodes(frames, EXAM, TOY))
    asked = Counter(open_frames(frames).class_name(label) for label in rows["label"])
    assert meta["frames_of_class"] == dict(asked)
    assert meta["frames_kept_for_training"]["0"]["ignore"] == 10 > meta["frames_kept_for_training"]["0"]["drop"]


def test_a_frozen_exam_is_found_again(here):
    frames = prepare(TOY, ANY)
    reset_ledger()
    assert freeze_episodes(frames, EXAM, TOY) == freeze_episodes(frames, EXAM, TOY)
    assert [report.reused for report in ledger()] == [False, True]


def test_too_few_frames_of_a_class_fail_in_one_clear_sentence(barn):
    frames = prepare(BARN, ANY)
    with pytest.raises(UsageError, match=r"Class 'cat' of barn has 3 frames .* 3-shot episodes need 4; use fewer"):
        freeze_episodes(frames, EpisodeSettings(shots=3, min_pixels=1), BARN)


def test_data_without_folds_cannot_be_examined(barn):
    data = replace(BARN, folds=())
    with pytest.raises(UsageError, match="no folds"):
        freeze_episodes(prepare(data, ANY), EXAM, data)


def test_any_number_of_workers_makes_the_same_files(ray_local, tmp_path, monkeypatch, thermofuse_home):
    manifests = []
    for compute in (Compute(actors=1, shard_size=30), Compute(actors=2, shard_size=7)):
        monkeypatch.setenv("THERMOFUSE_STORE", str(tmp_path / f"store{compute.actors}"))
        frames = prepare(TOY, compute)
        exam = freeze_episodes(frames, EXAM, TOY)
        manifests.append([places.store().manifest(ref) for ref in (frames, exam)])
    assert json.dumps(manifests[0], sort_keys=True) == json.dumps(manifests[1], sort_keys=True)
    assert manifests[0][1]["files"]["rows.parquet"]


# ---- real data


@pytest.fixture
def real(here):
    root = os.environ.get("THERMOFUSE_DATA")
    if not root or not (Path(root) / "msrs" / "infrared").is_dir():
        pytest.skip("set THERMOFUSE_DATA to a folder that holds msrs/ in the flat layout")
    return Path(root)


def frames_of_classes(frames: Frames, split: str) -> list[int]:
    return [sum(n in frames.pixels(id) for id in frames.ids(split)) for n in range(1, len(frames.classes) + 1)]


@pytest.mark.real
def test_real_msrs_has_the_counts_of_its_source_page(real):
    frames = open_frames(prepare(DataSettings(dataset="msrs"), Compute(max_quarantined=0.0)))
    assert [len(frames.ids(split)) for split in ("train", "test")] == [180, 91]
    assert frames_of_classes(frames, "train") == [104, 149, 64, 83, 43, 0, 41, 13]
    assert frames_of_classes(frames, "test") == [52, 72, 31, 44, 23, 0, 23, 6]
    assert {frames.size(id) for id in frames.ids()} == {(240, 320)}
    test_share = np.mean([frames.label(id) == 1 for id in frames.ids("test")])
    assert test_share == pytest.approx(0.03803, abs=1e-5)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "splits", "train"),
    [
        ("hituav_obox", {"train": 300, "test": 100}, [125, 158, 120, 75]),
        ("buffalo_udder", {"train": 200, "test": 80}, [200]),
        ("nuaa_sirst", {"train": 200, "test": 85}, [200]),
        ("msrs_ir_unlabelled", {"unlabelled": 600}, []),
    ],
)
def test_real_folders_have_the_counts_of_their_source_pages(real, name, splits, train):
    if not (real / name).is_dir():
        pytest.skip(f"there is no {name}/ in THERMOFUSE_DATA")
    frames = open_frames(prepare(DataSettings(dataset="folder", root=name), Compute(max_quarantined=0.0)))
    assert Counter(frames.split(id) for id in frames.ids()) == splits
    assert frames_of_classes(frames, "train") == train
