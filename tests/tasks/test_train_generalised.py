"""What the generalised loops see, and that they run from frames to a model, without Ray."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from models.backbone import save_encoder
from models.errors import UsageError
from models.frames import png_bytes
from models.pseudolabels import IGNORE
from models.segmenters.generalised import load_model
from models.segmenters.joint import JointSettings
from tasks import train_generalised
from tasks.train_generalised import (
    PASTED_SUPPORT,
    BaseJob,
    GeneralisedSettings,
    JointJob,
    Parts,
    base_loop,
    joint_loop,
)
from tests.models.drawn import ENCODER, SIZE, drawn_frames, tiny_encoder

FOLD = 0
SETTINGS = GeneralisedSettings(
    size=SIZE, layer="visible", width=16, steps=12, batch=4, rate=0.01,
    joint=JointSettings(mix=(3, 2, 1), steps=8, rate=0.02), checkpoint_every=5,
)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return drawn_frames(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="module")
def supports(frames):
    return {k: tuple([id for id in frames.ids("train") if k in frames.pixels(id)][:1]) for k in frames.novel(FOLD)}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, frames):
    """Folders of pictures and labels as `imagine` and `label` leave them: three pictures, one of them unfit."""
    folders = [tmp_path_factory.mktemp(name) for name in ("imagined", "labelled")]
    novel, listed = frames.novel(FOLD), []
    for n, (k, status) in enumerate([(novel[0], "ok"), (novel[1], "ok"), (novel[0], "no_target")]):
        row = {"id": f"p{n}", "class_id": k, "picture": f"p{n}.png", "labels": {}, "statuses": {}}
        label = np.full(SIZE, IGNORE, np.uint8)
        label[10:40, 10:50] = k
        (folders[0] / row["picture"]).write_bytes(png_bytes(np.full((*SIZE, 3), 30 * n, np.uint8)))
        for step, found in {"predict": np.full_like(label, k), "sabr": label}.items():
            row["labels"][step], row["statuses"][step] = f"{step}{n}.png", status
            (folders[1] / row["labels"][step]).write_bytes(png_bytes(found))
        listed.append(row)
    pd.DataFrame({"id": ["batch"], "pictures": [json.dumps(listed)]}).to_parquet(folders[1] / "rows.parquet")
    return folders


@pytest.fixture(scope="module")
def parts(frames, synthetic):
    return Parts(frames, tiny_encoder(), synthetic, SETTINGS, FOLD)


class Kept:
    """Checkpoints in memory: the loop's own calls, without a worker group."""

    made: Kept

    def __init__(self, config, total, **named):
        self.place, self.total, self.parts, self.logged, self.saved = config["out"], total, named, [], []
        Kept.made = self

    def restore(self):
        return 0

    def log(self, step, **values):
        self.logged.append((step, {name: float(value) for name, value in values.items()}))

    def save(self, step):
        self.saved.append(step)

    def finish(self, write):
        write(self.place)


@pytest.fixture
def folders(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(train_generalised, "Checkpoints", Kept)
    for name in ("encoder", "base", "joint"):
        (tmp_path / name).mkdir()
    save_encoder(tmp_path / "encoder", ENCODER)
    return [frames.folder, tmp_path / "encoder"], tmp_path


# ---- what a loss may see


def test_base_labels_hide_novel_classes_as_background(parts, frames):
    hidden = 0
    for id in frames.ids("train"):
        seen, truth = parts.label(id, "base"), frames.label(id)
        novel = np.isin(truth, frames.novel(FOLD))
        assert (seen[novel] == 0).all() and (seen[~novel] == truth[~novel]).all()
        hidden += novel.sum()
    assert hidden > 0


def test_a_support_shows_its_own_class_or_all_but_other_novel_ones(parts, frames, synthetic, supports):
    (k, (id,)), *_ = supports.items()
    truth = frames.label(id)
    assert (parts.label(id, "support", k) == np.where(truth == k, k, IGNORE)).all()
    every = Parts(frames, parts.encoder, synthetic, GeneralisedSettings(size=SIZE, support_labels="all"), FOLD)
    others = [n for n in frames.novel(FOLD) if n != k]
    assert (every.label(id, "support", k) == np.where(np.isin(truth, others), IGNORE, truth)).all()


def test_only_pictures_that_are_fit_take_part(parts, frames):
    novel = frames.novel(FOLD)
    assert {k: ids for k, ids in parts.synthetic.items() if ids} == {novel[0]: ["p0"], novel[1]: ["p1"]}
    assert (parts.picture("p1", "synthetic") == 30).all() and novel[1] in parts.label("p1", "synthetic")


def test_the_label_is_that_of_the_step_asked_for(parts, frames, synthetic):
    first = Parts(frames, parts.encoder, synthetic, SETTINGS, FOLD, upto="predict", bank=parts.bank)
    assert (first.label("p0", "synthetic") == frames.novel(FOLD)[0]).all()
    assert (parts.label("p0", "synthetic") == IGNORE).any()
    assert first.bank is parts.bank and first.bank.views is first, "what was encoded is shared"
    parts.bank.views = parts


def test_what_pictures_show_may_come_pasted_on_base_frames_without_a_novel_pixel_of_theirs(parts, frames, synthetic):
    novel = frames.novel(FOLD)
    every = Parts(frames, parts.encoder, synthetic, SETTINGS, FOLD, paste=True, bank=parts.bank)
    assert {k: ids for k, ids in every.synthetic.items() if ids} == {
        novel[n]: [f"p{n}", *(f"p{n}-{novel[n]}-pasted{m}" for m in range(3))] for n in (0, 1)}, "beside the pictures"
    for id, (_, frame, k) in every.pasted.items():
        assert frame in frames.ids("train")
        picture, label, truth = every.picture(id, "synthetic"), every.label(id, "synthetic"), frames.label(frame)
        assert (label == k).any() and (picture[label == k] != every.picture(frame, "base")[label == k]).any()
        hidden = np.isin(truth, novel) & (label != k)
        assert np.isin(label[hidden], (0, IGNORE)).all() and set(np.unique(label)) & set(novel) == {k}
        keys = [("synthetic", id, k), ("base", frame, 0)]
        features, seen, _ = every.batch(keys)
        assert torch.equal(features.mid, every.batch(keys)[0].mid) and every.space.ids.index(k) in seen[0]
    parts.bank.views = parts


def test_without_pictures_it_is_the_supports_that_are_pasted(parts, frames, supports, synthetic):
    bare = Parts(frames, parts.encoder, (), SETTINGS, FOLD, paste=True, supports=supports, bank=parts.bank)
    assert {k: len(ids) for k, ids in bare.synthetic.items()} == {
        k: PASTED_SUPPORT * len(ids) for k, ids in supports.items()}
    for k, (id, *_) in supports.items():
        name = bare.synthetic[k][0]
        source, frame, own = bare.pasted[name]
        label, truth = bare.label(name, "synthetic"), frames.label(frame)
        assert (source, own) == (id, k) and (label == k).any() and set(np.unique(label)) & set(supports) == {k}
        assert (label[np.isin(truth, frames.novel(FOLD)) & (label != k)] % IGNORE == 0).all(), "no other novel pixel"
        assert bare.label(name, "synthetic") is label, "worked out once"
    drawn = Parts(frames, parts.encoder, synthetic, SETTINGS, FOLD, paste=True, supports=supports, bank=parts.bank)
    sources = {source for source, *_ in drawn.pasted.values()}
    assert sources == {"p0", "p1"} and not sources & {id for ids in supports.values() for id in ids}
    parts.bank.views = parts


def test_the_ceiling_takes_real_frames_with_their_masks(frames):
    real = Parts(frames, tiny_encoder(), (), SETTINGS, FOLD, truth=True)
    for k, ids in real.synthetic.items():
        assert ids == [id for id in frames.ids("train") if k in frames.pixels(id)]
        assert all((real.label(id, "synthetic") == frames.label(id)).all() for id in ids)
    assert not any(Parts(frames, tiny_encoder(), (), SETTINGS, FOLD).synthetic.values())


def test_a_batch_holds_features_indices_and_roles(parts, frames, supports):
    (k, (id,)), *_ = supports.items()
    keys = [("base", frames.ids("train")[0], 0), ("synthetic", "p0", 0), ("support", id, k)]
    features, label, role = parts.batch(keys)
    assert len(features.mid) == 3 and label.shape == (3, SIZE[0] // 2, SIZE[1] // 2) and role.tolist() == [0, 1, 2]
    index = parts.space.ids.index(k)
    assert set(label[2].unique().tolist()) == {index, IGNORE} and label[0].max() <= len(parts.space.base)


# ---- the loops


def test_both_loops_run_from_frames_to_a_model(folders, supports, synthetic):
    inputs, out = folders
    base_loop({"settings": BaseJob(SETTINGS, FOLD), "folders": inputs, "out": out / "base"})
    told = [values["loss"] for _, values in Kept.made.logged]
    assert told[-1] < told[0] and Kept.made.saved == [5, 10] and len(told) == 2
    joint_loop({"settings": JointJob(SETTINGS, FOLD, supports), "folders": [*inputs, out / "base", *synthetic],
                "out": out / "joint"})
    assert set(Kept.made.logged[0][1]) == {"base", "synthetic", "support", "distil", "loss"}
    assert all(values[name] > 0 for _, values in Kept.made.logged for name in ("synthetic", "support"))
    before, after = load_model(out / "base"), load_model(out / "joint")
    rows = len(before.space.base) + 1
    changed = (before.trunk.classify.weight - after.trunk.classify.weight).abs().sum(1)
    assert (changed[rows:] > 0).all() and before.space == after.space
    stored = json.loads((out / "joint" / "config.json").read_text())
    assert stored["size"] == list(SIZE) and stored["layer"] == "visible"


def test_a_loop_gives_the_same_model_every_time(folders):
    inputs, out = folders
    states = []
    for _ in range(2):
        base_loop({"settings": BaseJob(SETTINGS, FOLD), "folders": inputs, "out": out / "base"})
        states.append(load_model(out / "base").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_unknown_support_labels_are_told():
    with pytest.raises(UsageError, match="target or all"):
        GeneralisedSettings(support_labels="some")
