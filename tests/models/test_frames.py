import json

import numpy as np
import pandas as pd
import pytest

from models.errors import UsageError
from models.frames import Frames, layer_name, png_bytes, read_png

INFO = {
    "dataset": "barn",
    "classes": ["cat", "dog", "hen", "fox"],
    "palette": [[9, 9, 9]] * 4,
    "folds": [["dog", "cat"], ["hen"]],
    "ignored": ["fox"],
}
PICTURES = {
    "infrared": np.arange(12, dtype=np.uint8).reshape(3, 4),
    "visible": np.arange(36, dtype=np.uint8).reshape(3, 4, 3),
    "label": np.array([[0, 1, 1, 255]] * 3, dtype=np.uint8),
}


def row(id, split, *layers, classes="{}"):
    files = {layer: layer_name(id, layer) if layer in layers else None for layer in PICTURES}
    return {"id": id, "split": split, **files, "height": 3, "width": 4, "sha256": "0", "classes": classes}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for layer, pixels in PICTURES.items():
        (tmp_path / layer_name("a", layer)).write_bytes(png_bytes(pixels))
    rows = [row("b", "unlabelled", "infrared"), row("a", "train", *PICTURES, classes='{"1": 6}')]
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "manifest.json").write_text(json.dumps({"meta": INFO}))
    return tmp_path


@pytest.fixture
def frames(folder):
    return Frames.open(folder)


def test_png_is_lossless_and_the_same_bytes_each_time(tmp_path):
    for pixels in PICTURES.values():
        (tmp_path / "a.png").write_bytes(png_bytes(pixels))
        assert np.array_equal(read_png(tmp_path / "a.png"), pixels)
        assert png_bytes(pixels) == png_bytes(np.asfortranarray(pixels))


def test_layers_come_back_as_they_were(frames):
    for layer, pixels in PICTURES.items():
        assert np.array_equal(getattr(frames, layer)("a"), pixels)


def test_ids_keep_the_order_of_the_table(frames):
    assert frames.ids() == ["b", "a"] and frames.ids("train") == ["a"] and frames.ids("test") == []
    assert len(frames) == 2 and "a" in frames and "c" not in frames


def test_facts_of_a_frame(frames):
    assert frames.size("a") == (3, 4) and frames.split("b") == "unlabelled"
    assert frames.pixels("a") == {1: 6} and frames.pixels("b") == {}


def test_a_layer_that_is_not_there_is_told(frames):
    assert frames.has("a", "visible") and not frames.has("b", "visible")
    with pytest.raises(UsageError, match="Frame b of barn has no label"):
        frames.label("b")


def test_novel_and_base_leave_out_the_ignored(frames):
    assert frames.novel(0) == (1, 2) and frames.base(0) == (3,)
    assert frames.novel(1) == (3,) and frames.base(1) == (1, 2)
    assert frames.class_name(3) == "hen"


@pytest.mark.parametrize("fold", [2, -1])
def test_a_fold_that_does_not_exist_is_told(frames, fold):
    with pytest.raises(UsageError, match=r"folds 0\.\.1"):
        frames.novel(fold)


def test_missing_layers_survive_the_parquet_of_a_table_without_any(tmp_path):
    rows = pd.DataFrame([row("a", "train", "infrared")])
    rows.to_parquet(tmp_path / "rows.parquet")
    frames = Frames(tmp_path, pd.read_parquet(tmp_path / "rows.parquet"), INFO)
    assert not frames.has("a", "visible") and not frames.has("a", "label")
