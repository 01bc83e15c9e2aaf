"""Frames and folders are fused; a picture depends on its own pair; what is missing is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from models import FUSERS
from models.errors import UsageError
from models.frames import png_bytes, read_png
from models.fusers.metrics import METRICS
from models.fusers.settings import FuserSettings, MaskSettings
from tasks import places
from tasks.fanout import Compute
from tasks.fit_fuser import fit_fuser
from tasks.fuse import Fuse, fuse, fuse_again, fuse_by, fuse_folder, fuse_night, pairs
from tasks.store import digest_of
from tests.models.fusers.small import small
from tests.tasks.test_fit_translators import commit_frames

SETTINGS = FuserSettings("average")
SPLITS = ("train", "test", "unlabelled")


@pytest.fixture
def frames(thermofuse_home):
    return commit_frames(SPLITS, size=(48, 56))


@pytest.fixture
def noisy(thermofuse_home, tmp_path):
    """A fuser that draws noise."""
    small("sgdfuse", head="eps").save(tmp_path / "fitted")
    draft = places.store().draft("fuser", "b" * 16)
    draft.upload(tmp_path / "fitted")
    return draft.commit(None, {}, count=1)


def worker(frames, fuser, **changes) -> Fuse:
    told = {"seed": 0, "visible": "visible", "steps": None, "masks": MaskSettings(), **changes}
    return Fuse(told, [places.store().local(ref) for ref in (frames, fuser)])


def shard(*numbers):
    return [{"id": f"f{n}", "split": SPLITS[n]} for n in numbers]


def test_a_shard_gives_pictures_and_their_metrics(frames, noisy):
    draft = places.store().draft("fused", "c" * 16)
    rows = worker(frames, noisy)(shard(0, 1), draft)
    assert [row["id"] for row in rows] == ["f0", "f1"] and set(METRICS) < set(rows[0])
    assert all(np.isfinite(rows[0][name]) for name in METRICS)
    assert read_png(places.store().blobs.path(f"fused/{'c' * 16}/{rows[0]['fused']}")).shape == (48, 56, 3)


def test_a_picture_depends_on_its_frame_and_seed_only(frames, noisy):
    drafts = [places.store().draft("fused", letter * 16) for letter in "def"]
    worker(frames, noisy)(shard(0, 1), drafts[0])
    worker(frames, noisy)(shard(1), drafts[1])
    worker(frames, noisy, seed=1)(shard(1), drafts[2])
    first, alone, other = (draft.files["images/f1.fused.png"] for draft in drafts)
    assert first == alone != other


def test_a_frame_that_cannot_be_read_costs_only_itself(frames, noisy):
    made = worker(frames, noisy)
    (made.frames.folder / "images/f1.visible.png").write_bytes(b"no picture")
    rows = made(shard(0, 1), places.store().draft("fused", "c" * 16))
    assert "cannot be fused" in rows[1]["error"] and "error" not in rows[0]


def test_masks_from_files_reach_the_fuser(frames, noisy, tmp_path):
    for part in ("sam_ir", "sam_vis"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "f0.png").write_bytes(png_bytes(np.full((48, 56), 255, np.uint8)))
    drafts = [places.store().draft("fused", letter * 16) for letter in "de"]
    worker(frames, noisy)(shard(0), drafts[0])
    rows = worker(frames, noisy, masks=MaskSettings("file", folder=str(tmp_path)))(shard(0, 1), drafts[1])
    assert drafts[0].files["images/f0.fused.png"] != drafts[1].files["images/f0.fused.png"]
    assert "no mask" in rows[1]["error"]


def test_translated_visible_pictures_serve_as_well(frames, noisy, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/f2.rgb.png").write_bytes(png_bytes(np.full((48, 56, 3), 90, np.uint8)))
    told = {"seed": 0, "visible": "rgb", "steps": None, "masks": MaskSettings()}
    made = Fuse(told, [*(places.store().local(ref) for ref in (frames, noisy)), tmp_path])
    rows = made(shard(2), places.store().draft("fused", "c" * 16))
    assert rows[0]["fused"] == "images/f2.fused.png"


def test_only_frames_with_both_pictures_are_fused():
    table = pd.DataFrame(
        [("a", "train", "i", "v"), ("b", "test", "i", None), ("c", "unlabelled", "i", "v"), ("d", "test", None, "v")],
        columns=["id", "split", "infrared", "visible"],
    )
    assert pairs(table, None, SETTINGS) == [{"id": "a", "split": "train"}]
    made = pd.DataFrame({"id": ["b", "c"], "rgb": ["x", "y"]})
    assert [row["id"] for row in pairs(table, made, replace(SETTINGS, visible="rgb"))] == ["b"]
    for synthetic, visible in ((None, "rgb"), (made, "lightness")):
        with pytest.raises(UsageError, match=f"has a {visible} picture"):
            pairs(table, synthetic, replace(SETTINGS, visible=visible))


def test_the_whole_stage(ray_local, frames):
    fuser = fit_fuser(frames, SETTINGS, (), Compute())
    ref = fuse(frames, fuser, SETTINGS, Compute(actors=1, shard_size=1))
    assert (ref.kind, ref.count) == ("fused", 2)
    assert set(METRICS) < set(places.store().rows(ref))
    assert fuse(frames, fuser, SETTINGS, Compute(actors=2, shard_size=2)) == ref


def test_steps_may_be_chosen_when_fusing(frames, noisy):
    drafts = [places.store().draft("fused", letter * 16) for letter in "de"]
    for draft, steps in zip(drafts, (0, 2), strict=True):
        worker(frames, noisy, steps=steps)(shard(0), draft)
    assert drafts[0].files["images/f0.fused.png"] != drafts[1].files["images/f0.fused.png"]


@pytest.fixture
def translated(frames):
    """Translations of the first two frames."""
    draft, rows = places.store().draft("synthetic", "e" * 16), []
    for n in range(2):
        draft.write(f"images/f{n}.rgb.png", png_bytes(np.full((48, 56, 3), 90, np.uint8)))
        rows.append({"id": f"f{n}", "split": SPLITS[n], "rgb": f"images/f{n}.rgb.png"})
    return draft.commit(pd.DataFrame(rows), {})


@pytest.fixture
def here(monkeypatch):
    """Fan-outs run in this process."""
    def in_process(worker, rows, settings, compute, *, kind, inputs, code, **_):
        store = places.store()
        draft = store.draft(kind, digest_of(kind, inputs, {"settings": settings, "rows": rows, "extra": None}, code))
        return draft.commit(pd.DataFrame(worker(settings, [store.local(x) for x in inputs])(rows, draft)), {})

    monkeypatch.setattr("tasks.fuse.fan_out", in_process)
    monkeypatch.setattr("tasks.cells.fan_out", lambda worker, rows, given, *_, **__: worker(given, [])(rows, None))


def test_a_night_fuses_what_its_recipe_asks_for(here, frames, translated):
    assert fuse_night(frames, translated, None, (), Compute()) is None
    store, pictures = places.store(), {}
    for visible in ("visible", "rgb"):
        made = fuse_night(frames, translated, replace(SETTINGS, visible=visible), (), Compute())
        assert made.fuser.kind == "fuser" and store.rows(made.pictures)["id"].tolist() == ["f0", "f1"]
        pictures[visible] = read_png(store.local(made.pictures) / "images/f0.fused.png")
    infrared = read_png(store.local(frames) / "images/f0.infrared.png").astype(float)
    assert np.abs(pictures["rgb"].mean(-1) - (infrared + 90) / 2).max() <= 1
    assert not np.array_equal(pictures["visible"], pictures["rgb"])


def test_a_model_fuses_again_with_the_fuser_it_came_with(here, frames, noisy, translated, tmp_path):
    store = places.store()
    draft = store.draft("model", "0" * 16)
    (tmp_path / "whole").mkdir()
    shutil.copytree(store.local(noisy), tmp_path / "whole" / "fuser")
    told = {"visible": "rgb", "steps": 1, "seed": 3, "masks": asdict(MaskSettings("levels", stability=0.5))}
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"fuse": told}))
    draft.upload(tmp_path / "whole")
    model = draft.commit(None, {}, count=1)
    again = fuse_again(frames, model, translated, Compute())
    assert store.rows(again.pictures)["id"].tolist() == ["f1"], "the test split alone"
    masks = MaskSettings("levels", stability=0.5)
    before = fuse(frames, noisy, replace(SETTINGS, visible="rgb", steps=1, seed=3, masks=masks), Compute(), translated)
    name = "images/f1.fused.png"
    assert store.manifest(again.pictures)["files"][name] == store.manifest(before)["files"][name]
    (tmp_path / "config.json").write_text("{}")
    bare = store.draft("model", "1" * 16)
    bare.write("config.json", b'{"generator": "thermal"}')
    assert fuse_again(frames, bare.commit(None, {}, count=1), translated, Compute()) is None


def test_side_by_side_gives_what_a_fan_out_gives(here, frames, noisy):
    control = fit_fuser(frames, SETTINGS, (), Compute())
    settings = {"mean": SETTINGS, "noise": replace(SETTINGS, seed=1, splits=("test",))}
    made = fuse_by(frames, {"mean": control, "noise": noisy}, settings, Compute())
    assert made["mean"] == fuse(frames, control, SETTINGS, Compute())
    store = places.store()
    assert store.rows(made["noise"])["id"].tolist() == ["f1"] and set(METRICS) < set(store.rows(made["noise"]))
    assert made["noise"].digest == fuse(frames, noisy, settings["noise"], Compute()).digest


def test_side_by_side_on_ray(ray_local, frames):
    control = fit_fuser(frames, SETTINGS, (), Compute())
    made = fuse_by(frames, {"mean": control}, {"mean": SETTINGS}, Compute(actors=1))
    assert made["mean"].count == 2 and set(METRICS) < set(places.store().rows(made["mean"]))
    assert fuse(frames, control, SETTINGS, Compute(actors=1)) == made["mean"], "the fan-out finds it"


def write_pairs(folder, size=(44, 50)):
    rng = np.random.default_rng(0)
    for layer, suffix in (("infrared", "png"), ("visible", "jpg")):
        (folder / layer).mkdir(parents=True)
        for name in ("a", "b"):
            shape = (*size, 3) if layer == "visible" else size
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / layer / f"{name}.{suffix}")
    return folder


@pytest.mark.parametrize("fuser", ["average", "fitted"])
def test_a_folder_is_fused_by_name(tmp_path, fuser):
    folder = write_pairs(tmp_path / "pairs")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "infrared" / "lonely.png")
    if fuser == "fitted":
        small("segmif").save(tmp_path / "fitted")
        fuser = str(tmp_path / "fitted")
    table = fuse_folder(folder, fuser, tmp_path / "out")
    assert list(table["name"]) == ["a", "b"] and table["error"].isna().all()
    assert np.asarray(Image.open(tmp_path / "out/a.png")).shape == (44, 50, 3)
    written = pd.read_csv(tmp_path / "out/metrics.csv")
    assert set(METRICS) < set(written) and len(written) == 2


def test_a_pair_that_does_not_fit_is_told_and_the_others_are_fused(tmp_path):
    folder = write_pairs(tmp_path / "pairs")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "infrared" / "b.png")
    table = fuse_folder(folder, "maximum", tmp_path / "out")
    assert table["error"].isna().tolist() == [True, False] and "differ in size" in table["error"][1]
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["a.png"]


def test_small_pictures_are_fused_and_not_measured(tmp_path):
    table = fuse_folder(write_pairs(tmp_path / "pairs", (30, 36)), "average", tmp_path / "out")
    assert list(table) == ["name", "error"] and (tmp_path / "out/b.png").is_file()


def test_nothing_to_fuse_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"no pairs in .*infrared/ and visible/"):
        fuse_folder(tmp_path, "average", tmp_path / "out")
    for name in ("segmif", "sgdfuse"):
        assert name in FUSERS
        with pytest.raises(UsageError, match="has to be fitted first"):
            fuse_folder(write_pairs(tmp_path / name), name, tmp_path / "out")


def test_settings_are_plain_values():
    assert asdict(SETTINGS)["masks"]["backend"] == "none"
