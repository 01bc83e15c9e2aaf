"""Pictures of every layer, one row a frame, the same whatever the width of the fan-out."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

from models.frames import png_bytes, read_png
from models.generators.settings import CHANNELS, TranslateSettings
from models.generators.syndiff import SynDiff
from tasks import places
from tasks.fanout import Compute
from tasks.synthesise import Translate, image_seed, synthesise

SETTINGS = TranslateSettings(channels=(8, 8), layers=1, attention=False, latent=4)
SPLITS = ("train", "test", "test", "unlabelled")
LAYERS = ("lightness", "rgb", "rgb_lightness")


@pytest.fixture
def frames(thermofuse_home):
    rng = np.random.default_rng(0)
    draft, rows = places.store().draft("frames", "a" * 16), []
    for n, split in enumerate(SPLITS):
        name = f"images/f{n}.infrared.png"
        draft.write(name, png_bytes(rng.integers(0, 256, (16, 20), dtype=np.uint8)))
        rows.append({"id": f"f{n}", "split": split, "infrared": name, "visible": None, "label": None, "classes": "{}"})
    info = {"dataset": "tiny", "classes": [], "palette": [], "folds": [], "ignored": []}
    return draft.commit(pd.DataFrame(rows), info)


@pytest.fixture
def translators(thermofuse_home, tmp_path):
    for direction in CHANNELS:
        SynDiff.of(SETTINGS, direction).save(tmp_path / "fitted" / direction)
    draft = places.store().draft("translators", "b" * 16)
    draft.upload(tmp_path / "fitted")
    return draft.commit(None, {}, count=2)


def worker(frames, translators, **changes):
    inputs = [places.store().local(ref) for ref in (frames, translators)]
    return Translate({"generator": "syndiff", "directions": ("lightness", "rgb"), "seed": 0, **changes}, inputs)


def shard(*numbers):
    return [{"id": f"f{n}", "split": SPLITS[n]} for n in numbers]


def test_a_shard_gives_three_layers_and_their_scores(frames, translators):
    draft = places.store().draft("synthetic", "c" * 16)
    rows = worker(frames, translators)(shard(0, 1), draft)
    assert [row["id"] for row in rows] == ["f0", "f1"] and rows[1]["split"] == "test"
    for layer, shape in zip(LAYERS, [(16, 20), (16, 20, 3), (16, 20, 3)], strict=True):
        assert rows[0][layer] == f"images/f0.{layer}.png" and -1 <= rows[0][f"{layer}_edges"] <= 1
        assert read_png(places.store().blobs.path(f"synthetic/{'c' * 16}/{rows[0][layer]}")).shape == shape


def test_a_picture_depends_on_its_frame_and_seed_only(frames, translators):
    drafts = [places.store().draft("synthetic", letter * 16) for letter in "de"]
    worker(frames, translators)(shard(0, 1, 2), drafts[0])
    worker(frames, translators)(shard(2), drafts[1])
    names = [f"images/f2.{layer}.png" for layer in LAYERS]
    assert [drafts[0].files[name] for name in names] == [drafts[1].files[name] for name in names]
    worker(frames, translators, seed=1)(shard(2), other := places.store().draft("synthetic", "f" * 16))
    assert other.files[names[1]] != drafts[1].files[names[1]]


def test_rgb_lightness_is_the_rgb_translator_on_the_lightness(frames, translators):
    made = worker(frames, translators)
    draft = places.store().draft("synthetic", "c" * 16)
    made(shard(0), draft)
    lightness = read_png(places.store().blobs.path(f"synthetic/{'c' * 16}/images/f0.lightness.png"))
    (expected,) = made.translators["rgb"].translate([lightness], [image_seed(0, "f0", "rgb_lightness")])
    assert draft.read("images/f0.rgb_lightness.png") == png_bytes(expected)


def test_rgb_lightness_has_a_translator_of_its_own_where_one_was_asked_for(frames, translators):
    made = worker(frames, translators, directions=("lightness", "rgb", "rgb_lightness"))
    draft = places.store().draft("synthetic", "c" * 16)
    made(shard(0), draft)
    lightness = read_png(places.store().blobs.path(f"synthetic/{'c' * 16}/images/f0.lightness.png"))
    seeds = [image_seed(0, "f0", "rgb_lightness")]
    (own,), (other,) = (made.translators[name].translate([lightness], seeds) for name in ("rgb_lightness", "rgb"))
    assert draft.read("images/f0.rgb_lightness.png") == png_bytes(own) != png_bytes(other)


def test_an_older_model_without_that_translator_goes_on_with_the_rgb_one(frames, translators):
    shutil.rmtree(places.store().local(translators) / "rgb_lightness")
    old, made = (places.store().draft("synthetic", x * 16) for x in "cd")
    worker(frames, translators)(shard(0), old)
    worker(frames, translators, directions=("lightness", "rgb", "rgb_lightness"))(shard(0), made)
    assert made.files == old.files


def test_one_direction_gives_one_layer(frames, translators):
    rows = worker(frames, translators, directions=("rgb",))(shard(0), places.store().draft("synthetic", "c" * 16))
    assert set(rows[0]) == {"id", "split", "rgb", "rgb_edges"}


def test_a_frame_that_cannot_be_read_costs_only_itself(frames, translators):
    made = worker(frames, translators)
    (made.frames.folder / "images/f1.infrared.png").write_bytes(b"no picture")
    rows = made(shard(0, 1), places.store().draft("synthetic", "c" * 16))
    assert "infrared cannot be read" in rows[1]["error"] and "error" not in rows[0]


def test_seeds_differ_by_everything_they_name():
    seeds = [image_seed(s, id, layer) for s in (0, 1) for id in ("a", "b") for layer in ("rgb", "lightness")]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert image_seed(0, "a", "rgb") == 4665023055798156938


def test_the_whole_stage(ray_local, frames, translators):
    ref = synthesise(frames, translators, SETTINGS, Compute(actors=1, shard_size=2))
    assert (ref.kind, ref.count) == ("synthetic", 3)
    table = places.store().rows(ref)
    assert list(table["id"]) == ["f0", "f1", "f2"] and set(LAYERS) < set(table)
    assert synthesise(frames, translators, SETTINGS, Compute(actors=2, shard_size=1)) == ref
