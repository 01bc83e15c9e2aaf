"""Cells of a study: what is remembered changes nothing, what is done is kept, and the exam is the night's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from uuid import uuid4

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from models.backbone import save_encoder
from models.episode import EpisodeSettings, exam, to_rows
from models.frames import Frames, layer_name
from models.metrics import COLUMNS, COUNTS
from models.segmenters import desk
from models.segmenters.anchored import AnchoredSettings
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.fusion import EnsembleOut
from models.segmenters.lessons import MetaSettings, courses
from models.segmenters.predictor import load_experts
from models.segmenters.pspnet import PSPNet
from models.segmenters.similarity import evidence
from models.views import PSEUDO_MARK, FeatureBank, Stream, episode_mask
from tasks import compare, places, train_meta
from tasks.compare import Laboratory, Pictures, Variant, cell_table
from tasks.fanout import Compute
from tasks.store import Ref
from tasks.train_meta import MetaJob, meta_loop
from tests.models.drawn import ENCODER, SIZE, drawn_frames, drawn_refined, drawn_translations

FOLDS, SEEDS = (0, 1), (5, 6)
META = MetaSettings(
    size=SIZE, expert=ExpertSettings(base_width=16, anchored=AnchoredSettings(correction=False)), min_pixels=30,
    steps=3, batch=2, rate=0.1, validation=2, validate_every=2,
)
LEARNT = replace(META, expert=replace(META.expert, anchored=AnchoredSettings(width=4, metric=6)))
ALONE = replace(META, streams=(Stream("infrared", "infrared"),))
VARIANTS = (Variant("both", "", META), Variant("alone", "", ALONE), Variant("learnt", "", LEARNT))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Frames, encoder, episodes of two seeds, and one set of pictures with its base learners."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("frames", "encoder", "episodes", "pictures", "labels")}
    frames = drawn_frames(places["frames"], train=40, test=24)
    save_encoder(places["encoder"], ENCODER)
    drawn_translations(places["pictures"], frames)
    drawn_refined(places["labels"], frames, ("lightness", "rgb", "rgb_lightness"))
    settings = EpisodeSettings(min_pixels=40, seeds=SEEDS)
    rows = to_rows(frames, [key for fold in FOLDS for key in exam(frames, fold, settings)])
    rows.to_parquet(places["episodes"] / "rows.parquet")
    base = tmp_path_factory.mktemp("base")
    for fold in FOLDS:
        torch.manual_seed(fold)
        head = PSPNet((48, 192, 96), len(frames.base(fold)), 16)
        save_file(head.state_dict(), base / f"fold{fold}.safetensors")
    (base / "config.json").write_text(json.dumps({"width": 16}))
    return [*places.values(), base]


@pytest.fixture
def laboratory(folders):
    return Laboratory({"variants": VARIANTS, "folds": FOLDS, "fused": [False]}, folders)


@pytest.fixture(autouse=True)
def store(thermofuse_home):
    return places.store()


def row(variant, seed, digest=None):
    """A cell that was never asked for, unless its digest says otherwise."""
    name = f"{VARIANTS[variant].name}.{seed}"
    return {"id": name, "variant": variant, "seed": seed, "digest": digest or uuid4().hex[:16]}


def table(laboratory, *cells):
    made = laboratory([row(*cell) for cell in cells], None)
    return cell_table(pd.DataFrame(made), [variant.name for variant in VARIANTS])


def counts(found, stream):
    return found[found["stream"] == stream].sort_values(["seed", "episode"])[["seed", "episode", *COUNTS]].to_numpy()


def test_a_cell_holds_every_episode_of_its_seed_for_every_stream(laboratory):
    found = table(laboratory, (0, 5), (1, 6))
    assert {"seed", *COLUMNS} <= set(found.columns)
    streams = found.groupby("seed")["stream"].unique()
    both = {f"both:{name}" for name in ("all", "infrared", "rgb", "prototype", "prototype_infrared", "prototype_rgb")}
    assert set(streams[5]) == both
    assert set(streams[6]) == {f"alone:{name}" for name in ("all", "infrared", "prototype", "prototype_infrared")}
    asked = [key.seed for key in laboratory.episodes]
    sizes = found.groupby(["seed", "stream"]).size()
    assert set(sizes[5]) == {asked.count(5)} and set(sizes[6]) == {asked.count(6)}


def test_an_answer_is_counted_where_its_foreground_is_larger(laboratory):
    """The truth itself, its opposite, and a tie, which says background."""
    desk, key = laboratory._desk(VARIANTS[1], 5), laboratory.episodes[0]
    truth = episode_mask(desk.bank.views.label(key.query), key.label)
    here = (truth == 1).float()
    right = torch.stack([1 - here, here])[None]
    said = EnsembleOut(right, right[:, None].flip(2), torch.zeros(1, 1), torch.zeros(1, 1, *right.shape[1:]))
    asked = SimpleNamespace(bank=desk.bank, ask=lambda *given: (said, None))
    rows = {row["stream"]: [row[name] for name in COUNTS] for row in compare.sit(asked, None, key, 0, ALONE)}
    area, size = int(here.sum()), int((truth != 255).sum())
    assert rows["all"] == [area, area, size - area, size - area]
    assert rows["infrared"] == [0, size, 0, size]
    assert rows["prototype"] == rows["prototype_infrared"] == [0, area, size - area, size]


@pytest.mark.parametrize("variant", [0, 2])
def test_what_is_remembered_changes_nothing(laboratory, folders, monkeypatch, variant):
    remembered = table(laboratory, (variant, 5))
    monkeypatch.setattr(Expert, "reads_evidence_alone", False)
    long_way = table(Laboratory({"variants": VARIANTS, "folds": FOLDS, "fused": [False]}, folders), (variant, 5))
    difference = (remembered[list(COUNTS)] - long_way[list(COUNTS)]).abs().to_numpy()
    assert difference.max() <= 3, "a pixel on the edge of the decision may fall either way"
    assert difference.mean() < 0.05


def test_cells_of_one_seed_share_what_was_read(laboratory, monkeypatch):
    read = []
    monkeypatch.setattr(desk, "evidence", lambda *given: read.append(1) or evidence(*given))
    first = table(laboratory, (0, 5))
    once = len(read)
    again = table(laboratory, (0, 5), (1, 5))
    assert len(read) < once + once // 4, "the second variant asks for infrared without stand-ins, little of it new"
    assert (counts(first, "both:all") == counts(again, "both:all")).all()
    assert (counts(again, "both:prototype_infrared") == counts(again, "alone:prototype")).all()


def test_a_seed_has_its_own_supports_and_its_own_training(laboratory):
    found = table(laboratory, (0, 5), (0, 6))
    one, other = (found[(found["seed"] == seed) & (found["stream"] == "both:prototype")] for seed in SEEDS)
    assert one["query"].tolist() == other["query"].tolist()
    assert one["inter_fg"].tolist() != other["inter_fg"].tolist()


def test_a_new_seed_encodes_no_frame_again(folders, monkeypatch):
    """Only pseudo-episodes, which are each seed's own; and nothing of the seed before is left in the answers."""
    asks = Variant("asks", "", replace(META, pseudo_share=0.6))
    laboratory, fresh = (Laboratory({"variants": (asks,), "folds": FOLDS, "fused": [False]}, folders) for _ in "ab")
    encoded, encode = [], FeatureBank._encode
    monkeypatch.setattr(FeatureBank, "_encode", lambda bank, keys: encoded.extend(keys) or encode(bank, keys))
    laboratory.study(asks, 5)
    first = {key for key in encoded if PSEUDO_MARK not in key[0]}
    encoded.clear()
    after, _ = laboratory.study(asks, 6)
    assert first and not first & set(encoded) and any(PSEUDO_MARK in key[0] for key in encoded)
    assert after.equals(fresh.study(asks, 6)[0])


def test_a_cell_that_is_done_is_not_done_again(laboratory, store, monkeypatch):
    first = laboratory([row(1, 6, "c0")], None)
    assert store.manifest(store.find("cell", "c0"))["meta"] == {"id": "alone.6", "held_out": first[0]["held_out"]}
    monkeypatch.setattr(laboratory, "study", lambda *_: pytest.fail("done before"))
    assert laboratory([row(1, 6, "c0")], None) == first
    asked = {n for n, key in enumerate(laboratory.episodes) if key.seed == 6}
    assert set(json.loads(first[0]["exam"])["episode"]) == asked, "numbered within the exam"


def rows_of(monkeypatch, frames, variants, seeds, asked, pictures=None):
    """What a study hands to its workers: cell -> digest."""
    handed = {}
    monkeypatch.setattr(compare, "fan_out", lambda worker, rows, *rest, **more: handed.update(
        {row["id"]: row["digest"] for row in rows}))
    pictures = [pictures or Pictures(*(Ref("", kind, kind, 1) for kind in ("synthetic", "labels", "base")))]
    kept = places.store().draft("episodes", uuid4().hex[:16]).commit(to_rows(frames, asked), {})
    frozen = [Ref("", kind, kind, 1) for kind in ("frames", "encoder")]
    compare.compare.fn(*frozen, kept, pictures, variants, seeds, FOLDS, Compute())
    return handed


def test_one_more_seed_or_variant_asks_for_the_old_cells_by_their_old_names(folders, monkeypatch):
    frames = Frames.open(folders[0])
    every = [key for fold in FOLDS for key in exam(frames, fold, EpisodeSettings(min_pixels=40, seeds=SEEDS))]
    first = [key for key in every if key.seed == SEEDS[0]]
    small = rows_of(monkeypatch, frames, VARIANTS[:1], SEEDS[:1], first)
    large = rows_of(monkeypatch, frames, VARIANTS, SEEDS, every)
    assert small["both.5"] == large["both.5"] and len(set(large.values())) == len(large) == 6
    renamed = rows_of(monkeypatch, frames, (replace(VARIANTS[0], name="x", about="y"),), SEEDS[:1], first)
    assert renamed["x.5"] == small["both.5"]


def test_other_pictures_supports_or_settings_are_another_cell(folders, monkeypatch):
    frames = Frames.open(folders[0])
    asked = [key for fold in FOLDS for key in exam(frames, fold, EpisodeSettings(min_pixels=40, seeds=SEEDS[:1]))]
    fused = Pictures(*(Ref("", kind, kind, 1) for kind in ("synthetic", "labels", "base", "fused")))
    longer = (replace(VARIANTS[0], meta=replace(META, steps=META.steps + 1)),)
    given = [(VARIANTS[:1], asked, None), (VARIANTS[:1], asked, fused), (longer, asked, None),
             (VARIANTS[:1], [replace(asked[0], supports=("other",)), *asked[1:]], None)]
    names = [rows_of(monkeypatch, frames, variants, SEEDS[:1], keys, pictures)["both.5"]
             for variants, keys, pictures in given]
    assert len(set(names)) == len(given)


class End:
    """Checkpoints of a loop that nobody kills: only what it writes at its end is kept."""

    rank = 0

    def __init__(self, config, total, **parts):
        self.folder = config["end"]

    def restore(self):
        return 0

    def log(self, step, **values):
        pass

    save = log

    def finish(self, write):
        write(self.folder)


def fitted_by_night(meta, folders, end, monkeypatch):
    """The experts of each fold that the loop of the night leaves, run in this process."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)
    monkeypatch.setattr(train_meta, "Checkpoints", End)
    frames, encoder, _, pictures, labels, base = folders
    (end / "made").mkdir()
    (end / "translators").mkdir()
    given = [frames, pictures, labels, encoder, base, end / "translators"]
    meta_loop({"settings": MetaJob(meta, FOLDS, "thermal"), "folders": given, "end": end / "made"})
    return load_experts(end / "made")[2]


@pytest.mark.parametrize("meta", [
    replace(LEARNT, held_out=0), replace(META, rotate=True, held_out=4, pool=2, steps=2),
], ids=["the last step", "the best step"])  # fmt: skip
def test_a_cell_is_fitted_as_the_night_fits(folders, laboratory, monkeypatch, tmp_path, meta):
    """To the last bit, though the night's desk is new and the cell's remembers."""
    place = laboratory._desk(Variant("one", "", meta), meta.seed)
    compare.fit_experts(place, folders[5], FOLDS, replace(meta, steps=1), "cpu")
    cell, held_out = compare.fit_experts(place, folders[5], FOLDS, meta, "cpu")
    assert (held_out is None) == (meta.held_out == 0)
    night = fitted_by_night(meta, folders, tmp_path, monkeypatch)
    assert set(night) == set(FOLDS)
    for fold, expert in night.items():
        other = cell[str(fold)].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in expert.state_dict().items())


def test_a_fused_picture_comes_from_the_folder_of_its_own_set(folders, tmp_path):
    """Two sets of pictures, of which the second has fused ones: here the visible pictures themselves."""
    shown = Frames.open(folders[0])
    (tmp_path / "images").mkdir()
    for id in shown.ids():
        shutil.copy(shown.path(id, "visible"), tmp_path / layer_name(id, "fused"))
    streams = {layer: (Stream("infrared", "infrared"), Stream("third", layer)) for layer in ("fused", "visible")}
    variants = tuple(Variant(name, "", replace(META, streams=streams[name]), 1) for name in streams)
    made = Laboratory({"variants": variants, "folds": FOLDS, "fused": [False, True]},
                      [*folders, *folders[3:], tmp_path])
    asked = [{"id": f"{n}", "variant": n, "seed": 5, "digest": f"f{n}"} for n in (0, 1)]
    fused, visible = (made([row], None)[0]["exam"] for row in asked)
    assert fused == visible
    assert made._desk(VARIANTS[0], 5).bank.views.fused is None and made._desk(variants[0], 5).bank.views.fused


def test_variants_are_told_apart_on_base_classes(folders, laboratory):
    """The score that chose the checkpoint, of classes of the fold's base; never one of those that the exam asks for."""
    frames = Frames.open(folders[0])
    meta = replace(META, rotate=True, pool=2, steps=2)
    lessons = courses(laboratory._desk(VARIANTS[0], 5).bank.views, FOLDS, meta)
    judged = {label for each in lessons.values() for label in each.judged}
    assert judged and all(not set(each.judged) & set(frames.novel(each.fold)) for each in lessons.values())
    found = laboratory.study(Variant("one", "", meta), 5)[1]
    assert 0 <= found <= 1
    cells = pd.DataFrame({"variant": [0, 0, 1, 2], "held_out": [found, 0.5, 0.25, None]})
    assert compare.held_out_scores(cells, ["a", "b", "c"]) == {"a": round(50 * found + 25, 2), "b": 25.0}
    assert compare.held_out_scores(cells.assign(held_out=None), ["a", "b", "c"]) == {}
    tested = replace(META, select_on="test")
    assert laboratory.study(Variant("two", "", tested), 5)[1] is None, "no score of novel classes is called held out"


def test_training_moves_the_learners(folders, laboratory):
    place = laboratory._desk(VARIANTS[0], 5)
    experts, _ = compare.fit_experts(place, folders[5], FOLDS, replace(META, held_out=0), "cpu")
    for expert in experts.values():
        assert all(not torch.equal(one.mix, torch.tensor([1.0, 0.0])) for one in expert.ensemble.learners)
        assert not any(p.requires_grad for p in expert.base.parameters())

