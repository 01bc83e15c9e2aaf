"""The refine stage on drawn frames: honest pictures keep their label, wrong ones lose it, and nothing else moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.backbone import EncoderSettings, save_encoder
from models.errors import BadSample, UsageError
from models.frames import png_bytes, read_png
from models.pseudolabels import RefineSettings
from tasks import places, progress
from tasks.fanout import Compute
from tasks.refine import Describer, Refiner, alarming, find_prototypes, freed_table, gather, refine
from tests.tasks.inline import without_actors

SIZE, CLASSES = (64, 96), ("disc", "square")
SETTINGS = RefineSettings(size=SIZE, min_area=0, min_regions=3, level="low")  # deep random features see the border
COMPUTE = Compute(actors=1, shard_size=3, max_quarantined=0.5)


def scene(n):
    """A dark frame with a bright striped square and a grey disc; uint8 picture and label [64, 96]."""
    rng = np.random.default_rng(n)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    picture, label = rng.normal(40, 3, SIZE), np.zeros(SIZE, np.uint8)
    top, left = rng.integers(4, 28), rng.integers(4, 20)
    square = (abs(y - top - 14) < 14) & (abs(x - left - 14) < 14)
    disc = (y - rng.integers(20, 44)) ** 2 + (x - rng.integers(66, 78)) ** 2 < 15**2
    picture[square] = 240 - 180 * ((x + y)[square] // 3 % 2)
    picture[disc] = 120
    label[disc], label[square] = 1, 2
    return picture.clip(0, 255).astype(np.uint8), label


def commit(kind, rows, pictures, meta=None):
    draft = places.store().draft(kind, "0" * 16)
    for name, array in pictures.items():
        draft.write(name, png_bytes(array))
    return draft.commit(pd.DataFrame(rows), meta or {})


@pytest.fixture(scope="module")
def random_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, EncoderSettings())
    return folder


@pytest.fixture
def night(thermofuse_home, random_encoder):
    """Refs of 8 labelled training frames, one test frame, and their pictures: rgb is honest but for frame f0,
    of which nothing is to be seen; lightness is the frame itself."""
    rows, made, files, pictures = [], [], {}, {}
    for n in range(9):
        picture, label = scene(n)
        id = f"f{n}"
        names = {layer: f"images/{id}.{layer}.png" for layer in ("infrared", "label", "lightness", "rgb")}
        files |= {names["infrared"]: picture, names["label"]: label}
        colour = np.stack([picture, picture, 200 - picture // 2], -1)
        pictures |= {names["lightness"]: picture, names["rgb"]: colour if n else np.full_like(colour, 60)}
        rows.append({"id": id, "split": "test" if n == 8 else "train", "visible": None, "height": SIZE[0],
                     "width": SIZE[1], "sha256": "", "classes": "{}", "infrared": names["infrared"],
                     "label": names["label"]})
        made.append({"id": id, "split": rows[-1]["split"], "lightness": names["lightness"], "rgb": names["rgb"]})
    info = {"dataset": "drawn", "classes": CLASSES, "palette": [(1, 2, 3)] * 2, "folds": [], "ignored": []}
    draft = places.store().draft("encoder", "0" * 16)
    draft.upload(random_encoder)
    encoder = draft.commit(None, {}, count=1)
    return commit("frames", rows, files, info), commit("synthetic", made, pictures), encoder


class Kept(dict):
    """A draft in memory."""

    def write(self, name, data):
        self[name] = data


def prototypes_folder(night, tmp_path, settings=SETTINGS):
    """What the stage makes before its last pass, without Ray."""
    folders = [places.store().local(ref) for ref in night]
    layers = {"lightness": "images/{}.lightness.png", "rgb": "images/{}.rgb.png"}
    ids = [f"f{n}" for n in range(8)]
    rows = [{"id": id, "label": True, "layers": {k: v.format(id) for k, v in layers.items()}} for id in ids]
    draft = Kept()
    Describer(settings, folders)(rows, draft)
    for name, data in draft.items():
        path = tmp_path / "described" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    arrays, table = gather(tmp_path / "described", ids, CLASSES, settings)
    np.savez(tmp_path / "prototypes.npz", **arrays)
    return tmp_path, arrays, table, draft


@pytest.fixture
def no_actors(monkeypatch):
    without_actors(monkeypatch)


def test_honest_pictures_keep_their_label_and_a_blank_one_loses_it(night, no_actors):
    frames, synthetic, encoder = night
    ref = refine.fn(frames, synthetic, encoder, SETTINGS, COMPUTE)
    store = places.store()
    rows, folder = store.rows(ref), store.local(ref)
    assert ref.kind == "pseudolabels" and list(rows["id"]) == [f"f{n}" for n in range(8)], "the test split stays out"
    assert set(rows.columns) == {"id", "lightness.label", "rgb.label", "counts"}
    for row in rows.to_dict("records"):
        label = read_png(store.local(frames) / f"images/{row['id']}.label.png")
        for layer in ("lightness", "rgb"):
            refined = read_png(folder / row[f"{layer}.label"])
            wrong = row["id"] == "f0" and layer == "rgb"
            assert row[f"{layer}.label"] == f"images/{row['id']}.{layer}.label.png" and refined.dtype == np.uint8
            assert (refined == np.where(label > 0, 255 if wrong else label, 0)).all()
            for k, found in json.loads(row["counts"])[layer].items():
                freed = int((refined != label)[label == int(k)].sum())
                assert found == {"kept": int((label == int(k)).sum()) - freed, "freed": freed}


def test_a_frame_may_lack_a_layer(night, no_actors):
    frames, synthetic, encoder = night
    store = places.store()
    rows = store.rows(synthetic)
    rows.loc[rows["id"] == "f3", "rgb"] = None
    pictures = store.local(synthetic)
    files = [*rows["lightness"], *rows["rgb"].dropna()]
    lacking = commit("lacking", rows, {name: read_png(pictures / name) for name in files})
    made = store.rows(refine.fn(frames, lacking, encoder, SETTINGS, COMPUTE)).set_index("id")
    assert pd.isna(made.loc["f3", "rgb.label"]) and isinstance(made.loc["f3", "lightness.label"], str)
    assert set(json.loads(made.loc["f3", "counts"])) == {"lightness"} and len(made) == 8


def test_each_layer_is_centred_by_its_own_mean_over_all_its_pictures(night, tmp_path, no_actors):
    """A mean of rgb that is far off frees what rgb shows and leaves the lightness alone."""
    frames, synthetic, encoder = night
    refine.fn(frames, synthetic, encoder, SETTINGS, COMPUTE)
    described = sorted(Path(places.store().root, "descriptions").rglob("*.npz"))
    assert [{"mean_lightness", "mean_rgb"} <= set(np.load(path)) for path in described] == [True] * 8
    folder, arrays, *_ = prototypes_folder(night, tmp_path)
    arrays["mean_rgb"] += 9 * arrays["prototypes"][1:].sum(0)
    np.savez(folder / "prototypes.npz", **arrays)
    worker = Refiner(SETTINGS, [*(places.store().local(ref) for ref in night), folder])
    found = worker([{"id": "f2", "rgb": "images/f2.rgb.png", "lightness": "images/f2.lightness.png"}], Kept())
    counts = json.loads(found[0]["counts"])
    for k in ("1", "2"):
        assert counts["rgb"][k]["kept"] == 0 and counts["lightness"][k]["freed"] == 0


def test_a_second_run_makes_nothing_and_another_threshold_reads_no_picture_again(night, no_actors):
    frames, synthetic, encoder = night
    first = refine.fn(frames, synthetic, encoder, SETTINGS, COMPUTE)
    described = [path.name for path in Path(places.store().root, "descriptions").iterdir()]
    assert refine.fn(frames, synthetic, encoder, SETTINGS, COMPUTE) == first
    lines = []
    before = progress.use(lambda stage, done, total, note: lines.append((stage, note)))
    strict = refine.fn(frames, synthetic, encoder, replace(SETTINGS, lam=1.01), COMPUTE)
    progress.use(before)
    assert strict != first and [path.name for path in Path(places.store().root, "descriptions").iterdir()] == described
    table = freed_table(places.store().rows(strict), CLASSES).set_index(["layer", "name"])["share"]
    assert (table.drop("background", level="name") == 1).all() and table["rgb", "background"] == 0
    assert ("refine", "lightness: 100% of disc freed, lightness: 100% of square freed, rgb: 100% of disc freed, "
            "rgb: 100% of square freed") in lines


def test_with_actors_it_is_the_same(night, ray_local):
    frames, synthetic, encoder = night
    settings = replace(SETTINGS, layers=("rgb",))
    ref = refine.fn(frames, synthetic, encoder, settings, COMPUTE)
    table = freed_table(places.store().rows(ref), CLASSES).set_index("name")["share"]
    assert ref.count == 8 and 0 < table["square"] < 0.2 and 0 < table["disc"] < 0.2 and table["background"] == 0


def test_prototypes_tell_the_classes_apart_and_say_what_they_rest_on(night, tmp_path):
    _, arrays, table, _ = prototypes_folder(night, tmp_path)
    cosines = arrays["prototypes"] @ arrays["prototypes"].T
    assert np.allclose(np.diag(cosines), 1, atol=1e-5) and cosines[1, 2] < 0.9
    assert list(table["name"]) == ["background", *CLASSES] and (table["regions"] >= 8).all()
    assert (table["threshold"] >= SETTINGS.floor).all()
    assert {"mean_infrared", "mean_lightness", "mean_rgb"} <= set(arrays)


def test_few_regions_fall_back_and_small_ones_do_not_calibrate(night, tmp_path):
    chosen = replace(SETTINGS, min_area=10**6)
    table = prototypes_folder(night, tmp_path, chosen)[2]
    assert (table["regions"] == 0).all() and (table["threshold"] == chosen.fallback).all()


def test_a_row_depends_on_nothing_but_itself(night, tmp_path):
    """The same bytes for any shard and any actor."""
    folder, *_, first = prototypes_folder(night, tmp_path)
    second = prototypes_folder(night, tmp_path)[-1]
    assert first == second
    folders = [*(places.store().local(ref) for ref in night), folder]
    rows = [{"id": f"f{n}", "rgb": f"images/f{n}.rgb.png"} for n in range(4)]
    together, apart = Kept(), Kept()
    Refiner(SETTINGS, folders)(rows, together)
    alone = Refiner(SETTINGS, folders)
    for row in reversed(rows):
        alone([row], apart)
    assert together == apart and len(together) == 4


def test_a_picture_of_another_size_is_quarantined(night, tmp_path):
    frames, _, encoder = night
    folder = prototypes_folder(night, tmp_path)[0]
    pictures = tmp_path / "odd"
    pictures.mkdir()
    (pictures / "small.png").write_bytes(png_bytes(np.zeros((32, 32, 3), np.uint8)))
    store = places.store()
    worker = Refiner(SETTINGS, [store.local(frames), pictures, store.local(encoder), folder])
    found = worker([{"id": "f1", "rgb": "small.png"}], Kept())
    assert found[0]["id"] == "f1" and "size (32, 32)" in found[0]["error"]
    with pytest.raises(BadSample):
        worker.check(np.zeros(SIZE, np.uint8), pictures / "small.png", "rgb")


def test_nothing_to_refine_says_what_to_do(night):
    frames, _, encoder = night
    empty = commit("none", [{"id": "f8", "split": "test", "rgb": "images/f8.rgb.png"}], {})
    with pytest.raises(UsageError, match="synthesise the training split"):
        refine.fn(frames, empty, encoder, SETTINGS, COMPUTE)


def test_the_encoder_pass_is_capped_by_digest_and_not_by_order(monkeypatch, night):
    frames, synthetic, encoder = night
    asked = []

    def remember(worker, rows, *_, **__):
        asked.append(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.refine.fan_out", remember)
    ids = [f"f{n}" for n in range(8)]
    few = replace(SETTINGS, frames=3, mean_frames=2)
    for order in (ids, ids[::-1]):
        pictures = [{"id": id, "rgb": f"{id}.png"} for id in order]
        with pytest.raises(KeyboardInterrupt):
            find_prototypes(frames, synthetic, order, pictures, encoder, few, COMPUTE)
    assert asked[0] == asked[1]
    assert sum(row["label"] for row in asked[0]) == 3 and sum(bool(row["layers"]) for row in asked[0]) == 2
    assert {row["id"] for row in asked[0] if row["label"]} != set(ids[:3])


def test_the_alarm_names_layer_class_and_share():
    counts = {"rgb": {"0": {"kept": 9, "freed": 0}, "1": {"kept": 1, "freed": 3}, "2": {"kept": 5, "freed": 5}}}
    table = freed_table(pd.DataFrame({"counts": [json.dumps(counts)] * 2}), CLASSES)
    assert table.to_dict("records")[1] == dict(layer="rgb", label=1, name="disc", kept=2, freed=6, share=0.75)
    assert alarming(table) == "rgb: 75% of disc freed" and alarming(table[table.label != 1]) == ""
