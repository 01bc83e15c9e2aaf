"""The whole way in the small, without Ray or Prefect: class names in, scores out, and a second run makes nothing."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from flows.generalised import compared, foundation, foundation_of, generalised, lesson
from flows.generalised_recipes import STEPS, toy
from models.boundary import BoundarySettings
from models.generators.inspection import QualitySettings
from models.generators.prompts import PromptSettings
from models.generators.recognition import RecogniserSettings
from models.generators.text2image import PictureSettings
from models.generators.toy_pipeline import ToyPipelineSettings
from models.labelling import LabelSettings
from models.prototypes import SYN4SEG
from models.relabel import RelabelSettings
from models.segmenters.joint import JointSettings
from models.small_sam import SmallSAMSettings
from tasks import places
from tasks.carry import CarrySettings
from tasks.fit_foundation import FoundationSettings
from tasks.freeze_encoder import freeze_encoder
from tasks.imagine import ImagineSettings
from tasks.label import LabelStage
from tasks.prepare import DataSettings, prepare
from tasks.propose import ProposeSettings
from tasks.report import load_outcome
from tasks.shots import ShotSettings
from tasks.store import digest_of
from tasks.train_generalised import GeneralisedSettings
from tests.models.drawn import ENCODER
from tests.tasks.test_imagine import Shards
from tests.tasks.test_train_generalised import Kept

SIZE = (48, 64)
ANY = QualitySettings(seam=1e9, frame=2.0, hash_distance=-1)  # what hardly learnt to draw may draw alike
TINY = toy(
    "tiny", data=DataSettings("toy", fold=0, options={"size": SIZE, "train": 40, "test": 12, "objects": (1, 3)}),
    encoder=ENCODER, pretrain=None, shots=ShotSettings(min_pixels=30, seeds=(5,)),
    steps=(*STEPS[:2], *STEPS[3:]),
    foundation=FoundationSettings(
        pipeline=ToyPipelineSettings(size=SIZE, autoencoder=8, denoiser=(16, 32), text=32, autoencoder_steps=30,
                                     autoencoder_batch=2, steps=4, batch=2),
        judge=RecogniserSettings(widths=(4,), steps=2, batch=2),
        sam=SmallSAMSettings(side=64, width=8, channels=16, blocks=1, steps=4, batch=2), shown=1,
    ),
    propose=ProposeSettings(vocabulary="drawn", bank=PromptSettings(count=3, lam_div=0.99999, lam_cls=-1.0, batch=8)),
    imagine=ImagineSettings(
        per_class=3, picture=PictureSettings("foundation", dtype="float32", size=SIZE, steps=2, batch=2), quality=ANY,
    ),
    label=LabelStage(LabelSettings(
        filter=replace(SYN4SEG, min_area=0, lam=-1.0), views=1, boundary=BoundarySettings(min_area=0),
        relabel=RelabelSettings(tau=0.1, min_target=0.0, max_ignored=1.0),
    ), quality=ANY),
    train=GeneralisedSettings(size=SIZE, layer="visible", width=16, steps=10, batch=4,
                              joint=JointSettings(mix=(2, 2, 1), steps=6)),
)


class Loops:
    """`tasks.train.fit` in this process; counts what it trained."""

    def __init__(self, folder):
        self.folder, self.ran = folder, []

    def __call__(self, loop, kind, inputs, settings, code, compute, meta=None):
        store = places.store()
        digest = digest_of(kind, inputs, settings, code)
        if found := store.find(kind, digest):
            return found
        out = self.folder / f"{kind}-{len(self.ran)}"
        out.mkdir()
        loop({"settings": settings, "folders": [store.local(ref) for ref in inputs], "out": out})
        self.ran.append(kind)
        draft = store.draft(kind, digest)
        draft.upload(out)
        return draft.commit(None, meta or {}, count=1)


@contextmanager
def in_process(folder):
    """Fan-outs and loops in this process; yields what they do."""
    shards, loops = Shards(4), Loops(folder)
    with pytest.MonkeyPatch.context() as patch:
        fanned = "prepare imagine label carry compare_generalised evaluate_generalised judge_labels"
        for module in fanned.split():
            patch.setattr(f"tasks.{module}.fan_out", shards)
        for module in ("train_generalised", "fit_foundation", "pretrain"):
            patch.setattr(f"tasks.{module}.fit", loops)
            patch.setattr(f"tasks.{module}.Checkpoints", Kept)
        yield shards, loops


@pytest.fixture
def here(thermofuse_home, mlflow_uri, tmp_path):
    with in_process(tmp_path) as done:
        yield done


def test_a_night_is_scored_shown_and_shares_what_it_can(here):
    shards, loops = here
    night = generalised.fn(TINY)
    rows = night.scores["rows"]
    assert [row["row"] for row in rows] == ["supports", "pasted_supports", "hdig", "ape", "sabr", "paste", "real_masks"]
    assert all(0 <= row[name] <= 100 for row in rows for name in ("base", "novel"))
    assert {row["protocol"] for row in night.scores["conventions"]} == {"capl", "diam", "bam"}
    kept = {row["metric"]: row["value"] for row in night.scores["model"] if row["protocol"] == "diam"}
    assert 100 * kept["base"] == pytest.approx(rows[5]["base"], abs=3), "the kept model is that of the last step"
    assert loops.ran == ["generalised_base", "foundation", "generalised"], "one model, of the whole method"
    assert shards.drawn.count("batch-000000") == 1 + 1, "one set of pictures, one of labels for all steps"
    assert {"report", "scores.json", "scores.md", "steps", "drawn", "labels"} == set(night.report)
    assert {"prepare", "propose", "imagine", "label", "compare_generalised"} <= {one.name for one in night.stages}
    assert load_outcome("tiny")["run_key"] == night.run_key and json.dumps(night.as_dict(), allow_nan=False)

    ran, drawn = len(loops.ran), len(shards.drawn)
    again = generalised.fn(TINY)
    assert len(loops.ran) == ran and len(shards.drawn) == drawn
    assert again.as_dict()["scores"] == night.as_dict()["scores"], "NaN is nobody's equal"
    assert again.run_key == night.run_key and again.models == night.models


def test_a_foundation_night_leaves_what_the_next_night_finds(here):
    _, loops = here
    made = foundation.fn(replace(TINY, name="tiny-foundation"))
    assert set(made.report) == {"report", "drawn"} and made.scores["chance"] == pytest.approx(1 / 12)
    assert "of the pictures show what was asked for" in str(made)
    frames = prepare(TINY.data, TINY.compute)
    assert foundation_of(TINY, frames, 0).uri == made.models[0] and loops.ran == ["foundation"]


def test_other_supports_draw_no_picture_again(here):
    frames, encoder = prepare(TINY.data, TINY.compute), freeze_encoder(TINY.encoder)
    lessons = [lesson(TINY, frames, encoder, 0, seed) for seed in (123, 321)]
    (pictures, labels), (same, others) = (one.synthetic["grammar"] for one in lessons)
    assert pictures == same and labels != others and lessons[0].base == lessons[1].base
    tables = [compared(TINY, frames, encoder, one) for one in lessons]
    assert [set(table["seed"]) for table in tables] == [{123}, {321}]


def test_infrared_pictures_are_drawn_and_labelled_in_visible_light(here):
    shards, loops = here
    frames, encoder = prepare(TINY.data, TINY.compute), freeze_encoder(TINY.encoder)
    seen = lesson(TINY, frames, encoder, 0, 5)
    chosen = CarrySettings(rule=replace(TINY.label.rule, upto="ape"), frames=8)
    warm = replace(TINY, train=replace(TINY.train, layer="infrared"), carry=chosen)
    one = lesson(warm, frames, encoder, 0, 5)
    assert {ref.kind for ref in one.synthetic["grammar"]} == {"carried"}
    assert loops.ran == ["generalised_base", "foundation", "generalised_base"], "a base model for each light"
    assert shards.drawn.count("batch-000000") == 3, "pictures and visible labels are those of the visible night"
    assert one.base != seen.base and len(compared(warm, frames, encoder, one)) > 0
