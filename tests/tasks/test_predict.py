"""From picture files to a mask file, and what is said when they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import UsageError
from tasks import predict as module
from tasks.predict import choose, predict
from tasks.register import Version

NAME = "thermofuse-toy-1shot"


def save(path: Path, value: int = 100, size: tuple[int, int] = (6, 8), **pixels) -> Path:
    array = np.full(size, value, np.uint8)
    array[2:4, 3:5] = pixels.get("square", value)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list:
    """One model whose champion answers with the first support's mask; the list holds what it was asked."""
    asked: list = []

    class Loaded:
        def predict(self, inputs, params):
            asked.append((inputs, params))
            return {"mask": inputs["support_mask"][0]}

    monkeypatch.setattr(module, "names", lambda: [NAME])
    monkeypatch.setattr(module, "find_version", lambda name: Version(name, 3) if name == NAME else None)
    monkeypatch.setattr(module, "known_version", Version)
    monkeypatch.setattr(module, "load", lambda version: asked.append(version.number) or Loaded())
    return asked


def test_masks_are_made_of_pictures(registry, tmp_path):
    query, support = save(tmp_path / "q.png"), save(tmp_path / "s.png", square=200)
    mask = save(tmp_path / "m.png", value=0, square=7)
    out = tmp_path / "new" / "out.png"
    share = predict(query, [f"{support}:{mask}"] * 2, out, fold=1)
    number, (inputs, params) = registry
    assert number == 3
    assert params == {"fold": 1}
    assert {key: (value.shape, str(value.dtype)) for key, value in inputs.items()} == {
        "query": ((6, 8), "uint8"), "support": ((2, 6, 8), "uint8"), "support_mask": ((2, 6, 8), "uint8"),
    }  # fmt: skip
    assert inputs["support_mask"].max() == 1, "any value above 0 is the class"
    assert share == pytest.approx(4 / 48)
    written = np.asarray(Image.open(out))
    assert written[2:4, 3:5].min() == 255
    assert (written == 255).sum() == 4


def test_without_a_fold_the_model_chooses(registry, tmp_path):
    query, mask = save(tmp_path / "q.png"), save(tmp_path / "m.png", value=1)
    predict(query, [f"{query}:{mask}"], tmp_path / "o.png")
    assert registry[1][1] == {"fold": -1}


@pytest.mark.parametrize(("supports", "message"), [
    ([], "at least once"),
    (["q.png"], "is no pair"),
    (["q.png:empty.png"], "marks nothing"),
    (["q.png:large.png"], "a mask of the picture's size"),
    (["q.png:mask.png", "large.png:large.png"], "pictures of one size"),
])  # fmt: skip
def test_what_does_not_fit_is_said(registry, tmp_path, monkeypatch, supports, message):
    monkeypatch.chdir(tmp_path)
    save(Path("q.png")), save(Path("mask.png"), value=9), save(Path("empty.png"), value=0)
    save(Path("large.png"), size=(9, 9))
    with pytest.raises(UsageError, match=message):
        predict(Path("q.png"), supports, Path("out.png"))
    assert not Path("out.png").exists()


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_text("not a picture"),
    lambda path: path.write_bytes(path.read_bytes()[:40]),
], ids=["missing", "no picture", "truncated"])  # fmt: skip
@pytest.mark.parametrize("which", ["query", "support", "mask"])
def test_a_picture_that_cannot_be_read_is_named(registry, tmp_path, which, spoil):
    files = {name: save(tmp_path / f"{name}.png", value=1) for name in ("query", "support", "mask")}
    spoil(files[which])
    with pytest.raises(UsageError, match=rf"{which}\.png.*give another one"):
        predict(files["query"], [f"{files['support']}:{files['mask']}"], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_16_bit_infrared_is_read_and_scaled(registry, tmp_path):
    Image.fromarray(np.linspace(20_000, 21_000, 48).reshape(6, 8).astype(np.uint16)).save(tmp_path / "q.png")
    mask = save(tmp_path / "m.png", value=1)
    predict(tmp_path / "q.png", [f"{mask}:{mask}"], tmp_path / "out.png")
    query = registry[1][0]["query"]
    assert query.dtype == np.uint8 and (query.min(), query.max()) == (0, 255)


def test_a_place_that_refuses_the_mask_is_named(registry, tmp_path):
    query, mask = save(tmp_path / "q.png"), save(tmp_path / "m.png", value=1)
    with pytest.raises(UsageError, match=r"Cannot write .*q\.png.*name a folder that you own"):
        predict(query, [f"{query}:{mask}"], query / "out.png")


def test_choose_takes_the_only_model_a_number_or_says_what_there_is(registry, monkeypatch):
    assert choose(None, None) == Version(NAME, 3)
    assert choose(None, 7) == Version(NAME, 7)
    with pytest.raises(UsageError, match=r"other has no champion; .*--version"):
        choose("other", None)
    monkeypatch.setattr(module, "names", lambda: [])
    with pytest.raises(UsageError, match="0 registered models; register one with thermofuse run"):
        choose(None, None)
    monkeypatch.setattr(module, "names", lambda: ["a", "b"])
    with pytest.raises(UsageError, match="choose one of a, b with --model"):
        choose(None, None)
