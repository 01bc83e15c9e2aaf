"""The labelling worker: real tiny parts, labels beside pictures, and keys that no picture knows of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from models.backbone import save_encoder
from models.boundary import BoundarySettings
from models.errors import UsageError
from models.frames import png_bytes, read_png
from models.labelling import LabelSettings
from models.prototypes import SYN4SEG
from models.segmenters.generalised import ClassSpace, Generalised, save_model
from models.small_sam import SmallSAMSettings, build_small_sam, save_sam
from tasks import places
from tasks.fanout import Compute
from tasks.imagine import KIND as IMAGINED
from tasks.imagine import unfold
from tasks.label import LABEL_COLUMNS, Label, LabelStage, batches, label, support_pictures
from tests.models.drawn import ENCODER, SIZE, drawn_frames, tiny_encoder
from tests.tasks.test_imagine import Shards

RULE = LabelSettings(filter=replace(SYN4SEG, min_area=0), boundary=BoundarySettings(min_area=0), views=2)
STAGE = LabelStage(RULE, batch=2)
FOLD = 0


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders: frames, encoder, base model, foundation; and the supports."""
    root = tmp_path_factory.mktemp("parts")
    folders = {name: root / name for name in ("frames", "encoder", "base", "foundation")}
    for folder in folders.values():
        folder.mkdir()
    frames = drawn_frames(folders["frames"])
    save_encoder(folders["encoder"], ENCODER)
    space = ClassSpace(frames.base(FOLD), frames.novel(FOLD))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_model(folders["base"], Generalised(tiny_encoder().channels, space, 16), size=SIZE, layer="visible")
    sam = SmallSAMSettings(side=64, width=8, channels=16, blocks=1)
    save_sam(folders["foundation"] / "sam", build_small_sam(sam), sam)
    supports = {k: tuple([id for id in frames.ids("train") if k in frames.pixels(id)][:1]) for k in space.novel}
    return folders, frames, supports


@pytest.fixture
def refs(thermofuse_home, parts):
    folders, frames, supports = parts
    found = []
    for name, folder in folders.items():
        draft = places.store().draft(name, "a" * 16)
        if name == "frames":
            info = json.loads((folder / "manifest.json").read_text())["meta"]
            draft.upload(folder / "images")
            for path in (folder / "images").iterdir():
                draft.write(f"images/{path.name}", path.read_bytes())
            found.append(draft.commit(frames.rows, info))
        else:
            draft.upload(folder)
            found.append(draft.commit(None, {}, count=1))
    draft, listed = places.store().draft(IMAGINED, "a" * 16), []
    for n, k in enumerate(frames.novel(FOLD)):
        picture = np.random.default_rng(n).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        draft.write(f"images/{n}.png", png_bytes(picture))
        listed.append({"id": f"p{n}", "class_id": k, "text": "", "seed": n, "status": "ok" if n < 2 else "black",
                       "attempts": 1, "picture": f"images/{n}.png", "hash": f"{(n + 1) * 0xF0F0F:016x}"})
    rows = pd.DataFrame({"id": ["batch-000000"], "pictures": [json.dumps(listed)]})
    frames_ref, encoder, base, foundation = found
    return {"frames": frames_ref, "encoder": encoder, "base": base, "imagined": draft.commit(rows, {}),
            "foundation": foundation, "supports": supports}


def labelled(monkeypatch, refs, settings=STAGE, shards=None):
    monkeypatch.setattr("tasks.label.fan_out", shards or Shards())
    return label.fn(**refs, settings=settings, compute=Compute())


def test_every_good_picture_has_a_label_of_known_classes(refs, parts, monkeypatch):
    ref = labelled(monkeypatch, refs)
    table = unfold(places.store().rows(ref), LABEL_COLUMNS)
    assert list(table["id"]) == ["p0", "p1"] and list(table["labels"][0]) == ["predict", "apf", "apr", "sabr"]
    assert {s for row in table["statuses"] for s in row.values()} <= {"ok", "no_target", "mostly_ignored"}
    frames = parts[1]
    for row in table.to_dict("records"):
        found = read_png(places.store().local(ref) / row["labels"]["sabr"])
        others = [k for k in frames.novel(FOLD) if k != row["class_id"]]
        assert found.shape == SIZE and not np.isin(found, others).any()
        assert 0 <= row["kept"] <= 1 and 0 <= row["free"] <= 1


def test_other_labels_touch_no_picture(refs, monkeypatch):
    """Spec §11, group 10: a sweep of λ, β, τ or the band makes labels, and not one picture."""
    store = places.store()
    before = {name: store.blobs.path(f"{IMAGINED}/{'a' * 16}/{name}").stat().st_mtime_ns
              for name in store.manifest(refs["imagined"])["files"]}
    digests = {labelled(monkeypatch, refs, replace(STAGE, rule=rule)).digest for rule in (
        RULE, replace(RULE, filter=replace(RULE.filter, lam=0.9)), replace(RULE, upto="ape"),
        replace(RULE, relabel=replace(RULE.relabel, beta=0.25)), replace(RULE, relabel=replace(RULE.relabel, tau=0.5)),
        replace(RULE, boundary=replace(RULE.boundary, band=9)),
    )}
    after = {name: store.blobs.path(f"{IMAGINED}/{'a' * 16}/{name}").stat().st_mtime_ns for name in before}
    assert len(digests) == 6 and before == after
    assert [path.name for path in store.blobs.path(IMAGINED).iterdir()] == ["a" * 16]


def test_a_label_depends_on_its_row_alone(refs, monkeypatch):
    whole = labelled(monkeypatch, refs)
    one = labelled(monkeypatch, refs, replace(STAGE, batch=1), Shards(2))
    for row, other in zip(*(unfold(places.store().rows(ref), LABEL_COLUMNS).to_dict("records") for ref in (whole, one)),
                          strict=True):
        first, second = (read_png(places.store().local(ref) / row["labels"]["sabr"]) for ref in (whole, one))
        assert row == other and (first == second).mean() > 0.99
    assert labelled(monkeypatch, refs) == whole


def test_without_sabr_no_sam_is_opened(parts, refs):
    folders, _, supports = parts
    inputs = [places.store().local(refs[name]) for name in ("frames", "encoder", "base", "imagined")]
    plain = {"rule": replace(RULE, upto="ape"), "sam": "nowhere", "supports": {str(k): v for k, v in supports.items()}}
    assert Label(plain, inputs).labeller.segmenter is None
    assert Label(plain | {"rule": RULE}, [*inputs, folders["foundation"]]).labeller.segmenter is not None


def test_supports_show_their_own_class_only(parts):
    _, frames, supports = parts
    shown = support_pictures(frames, "visible", supports)
    assert len(shown) == len(supports) and shown[0].picture.shape == (*SIZE, 3)
    for k, one in zip(supports, shown, strict=True):
        assert set(np.unique(one.label)) == {k, 255}


def test_pictures_come_in_batches_in_order():
    table = pd.DataFrame({"id": list("abc"), "class_id": 1, "picture": list("xyz")})
    assert [[job["id"] for job in row["jobs"]] for row in batches(table, 2)] == [["a", "b"], ["c"]]


def test_sam_outlines_the_things_that_are_named(refs, parts, monkeypatch):
    frames = parts[1]
    first, second = (frames.class_name(k) for k in frames.novel(FOLD)[:2])
    named = replace(STAGE, things=(second, first)).rule_for(frames)
    assert named.boundary.scope == (frames.novel(FOLD)[1], frames.novel(FOLD)[0]) and STAGE.rule_for(frames) is RULE
    assert labelled(monkeypatch, refs, replace(STAGE, things=(first,))) != labelled(monkeypatch, refs)
    with pytest.raises(UsageError, match=f"no class 'road'.*{first}"):
        labelled(monkeypatch, refs, replace(STAGE, things=("road",)))
