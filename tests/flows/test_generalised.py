"""The whole way in the small, without Ray or Prefect: class names in, scores out, and a second run makes nothing."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from flows.generalised import scores
from flows.generalised_recipes import Step, toy
from models.boundary import BoundarySettings
from models.generators.inspection import QualitySettings
from models.generators.prompts import PromptSettings
from models.generators.text2image import PictureSettings
from models.generators.toy_pipeline import ToyPipelineSettings
from models.labelling import LabelSettings
from models.prototypes import SYN4SEG
from models.relabel import RelabelSettings
from models.segmenters.generalised import JointSettings
from models.small_sam import SmallSAMSettings
from tasks import places
from tasks.fit_foundation import FoundationSettings
from tasks.freeze_encoder import freeze_encoder
from tasks.imagine import ImagineSettings
from tasks.label import LabelStage
from tasks.prepare import DataSettings, prepare
from tasks.propose import ProposeSettings
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
    encoder=ENCODER, shots=ShotSettings(min_pixels=30),
    foundation=FoundationSettings(
        pipeline=ToyPipelineSettings(size=SIZE, autoencoder=8, denoiser=(16, 32), text=32, autoencoder_steps=30,
                                     autoencoder_batch=2, steps=4, batch=2),
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
                              joint=JointSettings(mix=(2, 2, 1), steps=10)),
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


@pytest.fixture
def here(thermofuse_home, tmp_path, monkeypatch):
    """Fan-outs and loops in this process; what they did."""
    shards, loops = Shards(4), Loops(tmp_path)
    for module in ("prepare", "imagine", "label", "evaluate_generalised"):
        monkeypatch.setattr(f"tasks.{module}.fan_out", shards)
    for module in ("train_generalised", "fit_foundation"):
        monkeypatch.setattr(f"tasks.{module}.fit", loops)
        monkeypatch.setattr(f"tasks.{module}.Checkpoints", Kept)
    return shards, loops


def test_every_step_of_the_study_is_scored_and_shares_what_it_can(here):
    shards, loops = here
    frames, encoder = prepare(TINY.data, TINY.compute), freeze_encoder(TINY.encoder)
    steps = [Step("supports"), Step("HDIG", "grammar", "predict"), Step("SABR", "grammar", "sabr"),
             Step("ceiling", truth=True)]
    table = pd.concat([scores(TINY, step, frames, encoder, 0, 123) for step in steps])
    assert set(table["step"]) == {"supports", "HDIG", "SABR", "ceiling"}
    assert set(table["protocol"]) == {"capl", "diam", "capl+diam", "bam"}
    values = table[table["metric"] != "iou"]["value"].dropna()
    assert values.between(0, 1).all() and len(values) > 20
    assert loops.ran.count("generalised_base") == 1 and loops.ran.count("foundation") == 1
    assert loops.ran.count("generalised") == 4
    assert shards.drawn.count("batch-000000") == 1 + 2, "one set of pictures, two of labels"
    ran, drawn = len(loops.ran), len(shards.drawn)
    again = pd.concat([scores(TINY, step, frames, encoder, 0, 123) for step in steps])
    assert len(loops.ran) == ran and len(shards.drawn) == drawn
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.usefixtures("here")
def test_other_supports_draw_no_picture_again():
    frames, encoder = prepare(TINY.data, TINY.compute), freeze_encoder(TINY.encoder)
    step = Step("APE", "grammar", "ape")
    first = scores(TINY, step, frames, encoder, 0, 123)
    pictures = len(list(places.store().blobs.path("imagined").iterdir()))
    second = scores(TINY, step, frames, encoder, 0, 321)
    assert len(list(places.store().blobs.path("imagined").iterdir())) == pictures == 1
    assert len(list(places.store().blobs.path("labelled").iterdir())) == 2
    assert set(first["seed"]) == {123} and set(second["seed"]) == {321}
