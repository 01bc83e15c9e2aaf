"""The encoder in the store: known by the bytes of its weights, wherever they lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from models.errors import UsageError
from tasks import places
from tasks.freeze_encoder import freeze_encoder
from tasks.stage import ledger, reset_ledger
from tests.models.drawn import ENCODER, tiny_encoder


@pytest.fixture
def data(thermofuse_home, tmp_path, monkeypatch):
    """$THERMOFUSE_DATA, with nothing in it, and the working folder of nobody."""
    for name in ("data/msrs", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("THERMOFUSE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "data"


def save(path, seed=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tiny_encoder(seed=seed).stages.state_dict(), path)
    return path


def frozen(weights, **changes):
    return freeze_encoder(replace(ENCODER, weights=str(weights), **changes))


def first_weights(ref):
    return load_file(places.store().local(ref) / "encoder.safetensors")["stages.conv1.0.weight"]


@pytest.mark.parametrize("place", ["../here/w.pth", "w.pth", "weights/w.pth", "../weights/w.pth"])
def test_a_relative_file_is_looked_up_in_four_places(data, place):
    save(data / place, seed=4)
    ref = frozen("w.pth")
    assert (ref.kind, ref.count) == ("encoder", 1)
    assert torch.equal(first_weights(ref), tiny_encoder(seed=4).state_dict()["stages.conv1.0.weight"])


def test_the_nearest_place_wins(data):
    for seed, place in enumerate(["../here/w.pth", "w.pth", "weights/w.pth", "../weights/w.pth"]):
        save(data / place, seed=seed)
    assert torch.equal(first_weights(frozen("w.pth")), tiny_encoder(seed=0).state_dict()["stages.conv1.0.weight"])


def test_weights_that_are_nowhere_say_where_was_looked(data):
    with pytest.raises(UsageError, match=r"no encoder weights 'w\.pth'.*; set encoder\.weights to a file") as caught:
        frozen("w.pth")
    tried = [data.parent / "here", data, data / "weights", data.parent / "weights"]
    assert all(str(folder / "w.pth") in str(caught.value) for folder in tried)


def test_the_digest_follows_content_and_not_path(data):
    first = frozen(save(data / "a.pth"))
    (data / "elsewhere").mkdir()
    (data / "a.pth").rename(data / "elsewhere" / "b.pth")
    reset_ledger()
    assert frozen(data / "elsewhere" / "b.pth") == first and ledger()[0].reused
    save(data / "a.pth", seed=2)
    assert frozen(data / "a.pth").digest != first.digest, "the same path, other weights"
    assert frozen(data / "elsewhere" / "b.pth", dilated=False).digest != first.digest


def test_nothing_in_the_store_names_the_path(data):
    store = places.store()
    ref = frozen(save(data / "deep" / "w.pth"))
    assert store.manifest(ref)["meta"] == {"name": "test_resnet", "weights": "w.pth"}
    texts = [path.read_text() for path in store.local(ref).glob("*.json")]
    assert len(texts) == 2 and not any(str(data) in text for text in texts)


def test_random_weights_are_known_by_their_seed(data):
    torch.manual_seed(5)
    first = frozen("random", seed=1)
    torch.manual_seed(6)
    assert frozen("random", seed=1) == first != frozen("random", seed=2)
    assert torch.equal(first_weights(first), tiny_encoder(seed=1).state_dict()["stages.conv1.0.weight"])


def test_weights_that_do_not_fit_leave_nothing_behind(data):
    torch.save({}, data / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth does not fit"):
        frozen("w.pth")
    assert not list((data.parent / "store").rglob("manifest.json"))
