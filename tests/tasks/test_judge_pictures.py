"""The judgement: honest pictures stand above shuffled ones, and no number depends on the shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from models.backbone import save_encoder
from models.errors import UsageError
from models.frames import Frames, layer_name, png_bytes
from models.generators.pictures import lightness_picture
from models.generators.quality import fid, kid
from tasks import places, tracking
from tasks.fanout import Compute
from tasks.judge_pictures import (
    DOMAINS,
    SHARES,
    Judge,
    JudgeSettings,
    judge_pictures,
    layer_scores,
    plan,
    points,
    summary,
)
from tests.models.drawn import ENCODER, SIZE, drawn_frames
from tests.tasks.inline import without_actors

SETTINGS = JudgeSettings(size=SIZE, examples=6)
COMPUTE = Compute(actors=1, shard_size=3, max_quarantined=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("frames", "encoder")}
    drawn_frames(made["frames"], train=8, test=8)
    save_encoder(made["encoder"], ENCODER)
    return made


def commit(kind, rows, files, meta=None, folder=None, digest="0" * 16):
    draft = places.store().draft(kind, digest)
    if folder is not None:
        draft.upload(folder)
    for name, picture in files.items():
        draft.write(name, png_bytes(picture))
    return draft.commit(rows, meta or {}, count=1 if rows is None else None)


def drawn_by(layers, frames, digest="0" * 16):
    """Translations made of each frame by functions of its number: a Ref of kind "synthetic"."""
    rows, files = [], {}
    for n, id in enumerate(frames.ids()):
        names = {layer: layer_name(id, layer) for layer in layers}
        files |= {names[layer]: draw(n, id) for layer, draw in layers.items()}
        rows.append({"id": id, "split": frames.split(id)} | names)
    return commit("synthetic", pd.DataFrame(rows), files, digest=digest)


@pytest.fixture
def night(thermofuse_home, folders):
    """Refs of frames, of translations, and of an encoder: the lightness is the true one, the RGB that of another."""
    opened = Frames.open(folders["frames"])
    images = {f"images/{path.name}": path for path in (folders["frames"] / "images").iterdir()}
    draft = places.store().draft("frames", "0" * 16)
    for name, path in images.items():
        draft.write(name, path.read_bytes())
    frames = draft.commit(opened.rows, opened.info)
    ids = opened.ids()
    layers = {
        "lightness": lambda n, id: lightness_picture(opened.visible(id)),
        "rgb": lambda n, id: opened.visible(ids[(n + 1) % len(ids)]),
    }
    return frames, drawn_by(layers, opened), commit("encoder", None, {}, folder=folders["encoder"])


@pytest.fixture
def no_actors(monkeypatch):
    without_actors(monkeypatch)


def judged(night, settings=SETTINGS, compute=COMPUTE):
    ref = judge_pictures.fn(*night, settings, compute)
    return ref, places.store().rows(ref).set_index("layer")


def test_the_table_ranks_what_is_known(night, no_actors):
    ref, table = judged(night)
    assert ref.kind == "judgement" and ref.count == len(table) == 6
    assert list(table.index) == [layer for layer in DOMAINS if layer != "rgb_lightness"]
    assert set(table) == {"kid", "kid_low", "kid_high", "fid", "edges", "agreement", "same", "count", "real"}
    assert (table["count"] == 8).all() and table["real"].to_dict() == {
        "infrared": 8, "lightness": 8, "thermal_lightness": 8, "rgb": 8, "thermal_rgb": 8, "visible": 0
    }  # fmt: skip
    infrared = table.loc["infrared"]
    assert infrared["edges"] == pytest.approx(1, abs=1e-4) and infrared["agreement"] == infrared["same"] == 1
    assert table.loc["lightness", "kid"] < 0 and table.loc["lightness", "fid"] == pytest.approx(0, abs=1e-6)
    assert table.loc["infrared", "kid"] > table.loc["lightness", "kid_high"]
    for column in ("edges", "agreement", "same"):
        assert table.loc["rgb", column] < table.loc["thermal_rgb", column] <= 1, "another scene's picture"
        assert table.loc["visible", column] < 1
    assert table.loc["visible", ["kid", "fid"]].isna().all()
    compared = table.drop("visible")
    assert (compared["kid_low"] < compared["kid"]).all() and (compared["kid"] < compared["kid_high"]).all()


def test_it_is_found_again_and_no_shard_changes_a_number(night, no_actors):
    ref, table = judged(night)
    assert judge_pictures.fn(*night, SETTINGS, COMPUTE) == ref
    store = places.store()
    before = {path.name: path.read_bytes() for path in places.store().local(ref).parent.parent.rglob("*.npz")}
    rows = plan(Frames.open(store.local(night[0])), store.rows(night[1]).to_dict("records"), SETTINGS)
    draft = store.draft("judged", "f" * 16)
    Judge(SETTINGS, [store.local(x) for x in night])(rows[::-1], draft)
    for row in rows:
        assert draft.read(f"judged/{row['id']}.npz") == before[f"{row['id']}.npz"]
    again = summary([dict(np.load(store.blobs.path(f"judged/{'f' * 16}/judged/{row['id']}.npz"))) for row in rows])
    pd.testing.assert_frame_equal(again.set_index("layer"), table, check_index_type=False)


def test_the_figures_go_to_mlflow_and_into_the_outcome(night, no_actors, mlflow_uri):
    with tracking.night_run("smoke", "key", {}) as run:
        ref = judge_pictures.fn(*night, SETTINGS, COMPUTE, run)
    found, table = layer_scores(ref), places.store().rows(ref)
    assert list(found) == list(table["layer"]) and set(found["rgb"]) == set(table) - {"layer"}
    logged = tracking.client().get_run(run.id).data.metrics
    assert logged == pytest.approx({name: value for name, value in points(found).items() if not np.isnan(value)})
    assert logged["pictures/rgb/fid"] == pytest.approx(found["rgb"]["fid"]) and "pictures/visible/fid" not in logged
    for name in SHARES:
        assert logged[f"pictures/infrared/{name}"] == pytest.approx(100, abs=0.1), "points, as all scores in MLflow"


def test_no_frames_is_no_judgement(night, no_actors):
    ref = judge_pictures.fn(*night, replace(SETTINGS, frames=0), COMPUTE)
    assert ref.count == 0 and layer_scores(ref) == {}


def test_only_held_out_frames_are_judged_and_their_labels_are_not_read(night, no_actors, monkeypatch):
    read = set()
    path = Frames.path
    with monkeypatch.context() as patch:
        patch.setattr(Frames, "path", lambda self, id, layer: (read.add((self.split(id), layer)),
                                                               path(self, id, layer))[1])
        judged(night)
    assert ("test", "label") not in read and {("test", "infrared"), ("train", "label"), ("test", "visible")} <= read
    rows = plan(Frames.open(places.store().local(night[0])), places.store().rows(night[1]).to_dict("records"), SETTINGS)
    assert all(row["id"].startswith("test-") for row in rows)


def test_the_frames_are_capped_by_digest_and_layers_and_control_are_chosen(night, no_actors):
    few = replace(SETTINGS, frames=3, layers=("rgb", "depth"), control=False)
    _, table = judged(night, few)
    assert list(table.index) == ["infrared", "rgb", "visible"] and (table["count"] == 3).all()
    opened, pictures = Frames.open(places.store().local(night[0])), places.store().rows(night[1]).to_dict("records")
    assert plan(opened, pictures, few) == plan(opened, pictures[::-1], few)
    assert [row["id"] for row in plan(opened, pictures, few)] != [f"test-0000{n}" for n in range(3)]


def test_a_fold_keeps_its_novel_classes_from_the_segmenter(night):
    folders = [places.store().local(ref) for ref in night]
    every, base = (Judge(replace(SETTINGS, fold=fold), folders) for fold in (None, 0))
    novel = Frames.open(folders[0]).novel(0)
    shown = every.segment.prototypes.any(1)
    assert shown[list(novel)].any() and not base.segment.prototypes.any(1)[list(novel)].any()
    others = [k for k in range(len(shown)) if k not in novel]
    assert (base.segment.prototypes.any(1)[others] == shown[others]).all()


def test_without_visible_test_pictures_the_split_visible_is_the_reference(night):
    opened = Frames.open(places.store().local(night[0]))
    table = opened.rows.copy()
    table["visible"] = table["visible"].astype(object).where(table["split"] != "test", None)
    table.loc[table.index[:3], "split"] = "visible"
    rows = plan(Frames(opened.folder, table, opened.info), places.store().rows(night[1]).to_dict("records"), SETTINGS)
    assert [row["id"] for row in rows if row["real"]] == sorted(table["id"][:3])
    assert all(not row["layers"] for row in rows if row["real"])
    worker = Judge(SETTINGS, [places.store().local(ref) for ref in night])
    arrays = worker._real(table["id"][0])
    assert set(arrays) == {"real_rgb", "real_lightness"} and arrays["real_rgb"].shape == (worker.encoder.channels[2],)


def test_without_any_visible_picture_pairs_are_judged_alone(night, no_actors):
    opened, store = Frames.open(places.store().local(night[0])), places.store()
    draft = store.draft("frames", "2" * 16)
    for path in (opened.folder / "images").iterdir():
        draft.write(f"images/{path.name}", path.read_bytes())
    frames = draft.commit(opened.rows.assign(visible=None), opened.info)
    _, table = judged((frames, *night[1:]))
    assert list(table.index) == ["infrared", "lightness", "thermal_lightness", "rgb", "thermal_rgb"]
    assert table[["kid", "kid_low", "kid_high", "fid"]].isna().all(axis=None) and (table["real"] == 0).all()
    assert table[["edges", "agreement", "same"]].notna().all(axis=None)


def test_a_picture_of_another_size_is_quarantined(night):
    opened = Frames.open(places.store().local(night[0]))
    small = drawn_by({"rgb": lambda n, id: np.zeros((8, 8, 3), np.uint8)}, opened, "1" * 16)
    worker = Judge(SETTINGS, [places.store().local(ref) for ref in (night[0], small, night[2])])
    row = {"id": "test-00000", "real": False, "layers": {"rgb": layer_name("test-00000", "rgb")}}
    assert "rgb has size (8, 8)" in worker.row(row, None)["error"]
    assert "cannot be judged" in worker.row(row | {"layers": {"rgb": "nowhere.png"}}, None)["error"]


def test_a_split_without_translations_says_what_to_do(night):
    with pytest.raises(UsageError, match="'unlabelled' has a translation; add it to translate"):
        judge_pictures.fn(*night, replace(SETTINGS, split="unlabelled"), COMPUTE)


def test_the_summary_is_what_the_parts_say():
    rng = np.random.default_rng(0)
    frames = [{"rgb": rng.normal(size=4), "rgb.edges": np.float64(n / 10), "rgb.counts": np.array([[3, 1], [0, n]]),
               "real_rgb": rng.normal(size=4)} for n in range(5)]
    (row,) = summary(frames).to_dict("records")
    sets = [torch.from_numpy(np.stack([x[name] for x in frames])) for name in ("rgb", "real_rgb")]
    sets = [x / sets[1].square().mean().sqrt() for x in sets]
    assert (row["kid"], row["kid_low"], row["kid_high"]) == kid(*sets) and row["fid"] == fid(*sets)
    tiny = [frame | {name: 1e-8 * frame[name] for name in ("rgb", "real_rgb")} for frame in frames]
    (small,) = summary(tiny).to_dict("records")
    for name in ("kid", "kid_low", "kid_high", "fid"):
        assert small[name] == pytest.approx(row[name]), "encoders of random weights give tiny descriptors"
    assert row["edges"] == pytest.approx(0.2) and row["same"] == pytest.approx(25 / 30)
    assert row["agreement"] == pytest.approx((15 / 20 + 10 / 15) / 2) and (row["count"], row["real"]) == (5, 5)
    (few,) = summary(frames[:2]).to_dict("records")
    assert np.isnan(few["kid"]) and np.isnan(few["fid"]) and few["real"] == 0 and few["edges"] == pytest.approx(0.05)
