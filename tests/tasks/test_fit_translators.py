"""Translators see no test frame, no pair on purpose, and resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models.errors import StageFailed, UsageError
from models.frames import Frames, png_bytes, read_png
from models.generators.settings import TranslateSettings
from models.generators.syndiff import SynDiff
from tasks import fit_translators as stage
from tasks import places
from tasks.fanout import Compute

TINY = TranslateSettings(
    channels=(8, 8), layers=1, attention=False, latent=4, cycle_width=4, cycle_blocks=1, discriminator_channels=(4, 8),
    patch_width=4, patch_layers=1, crop=16, batch=2, iterations=4, checkpoint_every=2, short_side=None, both_ways=False,
)  # fmt: skip
SPLITS = ("train", "train", "test", "unlabelled", "visible")


def commit_frames(splits=SPLITS, drop=(), size=(24, 32), digest="a" * 16):
    """One frame per split name, with the layers that the split has, less the dropped ones."""
    rng = np.random.default_rng(0)
    draft, rows = places.store().draft("frames", digest), []
    for n, split in enumerate(splits):
        has = {"unlabelled": ["infrared"], "visible": ["visible"]}.get(split, ["infrared", "visible", "label"])
        row = {"id": f"f{n}", "split": split, "infrared": None, "visible": None, "label": None}
        for layer in set(has) - set(drop):
            shape = (*size, 3) if layer == "visible" else size
            row[layer] = f"images/f{n}.{layer}.png"
            draft.write(row[layer], png_bytes(rng.integers(0, 2 if layer == "label" else 256, shape, dtype=np.uint8)))
        rows.append({**row, "height": size[0], "width": size[1], "sha256": "", "classes": "{}"})
    info = {"dataset": "tiny", "classes": ["disc"], "palette": [[255, 0, 0]], "folds": [["disc"]], "ignored": []}
    return draft.commit(pd.DataFrame(rows), info)


@pytest.fixture
def frames(thermofuse_home):
    return commit_frames()


class Interrupted(Exception):
    """Stands for the death of a worker."""


class Reports:
    """What Ray Train does for one worker: takes checkpoints and hands back the last one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        import ray.train

        self.folder, self.saved, self.fail_after = folder, 0, None
        monkeypatch.setattr(ray.train, "report", self.report)
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: self.last())
        monkeypatch.setattr(ray.train, "get_context", lambda: self)

    def get_world_rank(self) -> int:
        return 0

    def report(self, metrics, checkpoint):
        checkpoint.to_directory(self.folder / str(self.saved))
        self.saved += 1
        if self.saved == self.fail_after:
            raise Interrupted

    def last(self):
        import ray.train

        return ray.train.Checkpoint(str(self.folder / str(self.saved - 1))) if self.saved else None


def run_loop(frames, settings, folder, monkeypatch, fail_after=None):
    """The loop alone, in this process, with one interruption when asked; returns the folder of the result."""
    reports = Reports(folder, monkeypatch)
    config = {"settings": settings, "folders": [places.store().local(frames)], "place": str(folder / "place")}
    if fail_after:
        reports.fail_after = fail_after
        with pytest.raises(Interrupted):
            stage.adversarial_loop(config)
    stage.adversarial_loop(config)
    return folder / str(reports.saved - 1) / "result"


def test_a_restored_run_ends_where_a_straight_one_does(frames, tmp_path, monkeypatch):
    straight = run_loop(frames, TINY, tmp_path / "straight", monkeypatch)
    broken = run_loop(frames, TINY, tmp_path / "broken", monkeypatch, fail_after=1)
    for direction in ("lightness", "rgb"):
        a, b = (SynDiff.load(folder / direction).state_dict() for folder in (straight, broken))
        assert all(torch.equal(a[name], b[name]) for name in a)
    other = run_loop(frames, replace(TINY, seed=1), tmp_path / "other", monkeypatch)
    a, b = (SynDiff.load(folder / "rgb").state_dict() for folder in (straight, other))
    assert not all(torch.equal(a[name], b[name]) for name in a)
    history = [pd.read_parquet(folder / "history.parquet") for folder in (straight, broken)]
    pd.testing.assert_frame_equal(*history)
    assert {"step", "rgb_clean", "lightness_judge"} < set(history[0])
    sheet = read_png(straight / "contact.png")
    assert sheet.shape == (3 * 24, 3 * 32, 3), "infrared | lightness | rgb of each frame"


THREE = replace(TINY, directions=("lightness", "rgb", "rgb_lightness"))


def test_lightness_to_rgb_is_fitted_beside_the_others_and_changes_neither(frames, tmp_path, monkeypatch):
    two = run_loop(frames, TINY, tmp_path / "two", monkeypatch)
    three = run_loop(frames, THREE, tmp_path / "three", monkeypatch)
    for direction in ("lightness", "rgb"):
        a, b = (SynDiff.load(folder / direction).state_dict() for folder in (two, three))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (two / "rgb_lightness").exists()
    third, rgb = SynDiff.load(three / "rgb_lightness"), SynDiff.load(three / "rgb")
    assert (third.config["source"], third.config["target"]) == (1, 3)
    assert not all(torch.equal(a, b) for a, b in zip(third.parameters(), rgb.parameters(), strict=True))
    assert {"rgb_lightness_clean", "rgb_lightness_judge"} < set(pd.read_parquet(three / "history.parquet"))
    sheet, shown = read_png(three / "contact.png"), read_png(two / "contact.png")
    assert sheet.shape == (3 * 24, 4 * 32, 3) and np.array_equal(sheet[:, : 3 * 32], shown)
    (expected,) = third.translate([sheet[:24, 32:64, 0]], [0])
    assert np.array_equal(sheet[:24, 96:], expected), "drawn from the lightness, not from the infrared"


def test_lightness_to_rgb_learns_from_the_lightness_of_other_pictures(frames, tmp_path, monkeypatch):
    from models.generators.adversaries import Adversaries

    infrared, visible, others = torch.full((2, 1, 16, 16), -0.5), torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)
    monkeypatch.setattr(stage.Crops, "__call__", lambda self, rng: (infrared, visible, others))
    seen = []
    monkeypatch.setattr(Adversaries, "iterate", lambda self, source, target, step: (
        seen.append((source.mean().item(), tuple(target.shape[:2]), target.mean().item())), {})[1])
    run_loop(frames, replace(THREE, iterations=1), tmp_path, monkeypatch)
    lightness, rgb, third = seen
    assert lightness[:2] == (-0.5, (2, 1)) and rgb == (-0.5, (2, 3), 0) and third[1:] == rgb[1:]
    assert third[0] == pytest.approx(1, abs=1e-3), "white, as the others are"


def test_the_way_back_starts_from_visible_light_and_is_to_look_infrared(frames, tmp_path, monkeypatch):
    from models.generators.adversaries import Adversaries

    infrared, visible = torch.full((2, 1, 16, 16), -0.5), torch.ones(2, 3, 16, 16)
    monkeypatch.setattr(stage.Crops, "__call__", lambda self, rng: (infrared, visible, visible[:0]))
    seen = []
    iterate = Adversaries.iterate
    monkeypatch.setattr(Adversaries, "iterate", lambda self, source, target, step: (
        seen.append((source, target)), iterate(self, source, target, step))[1])
    made = run_loop(frames, replace(TINY, directions=("thermal",), iterations=1), tmp_path, monkeypatch)
    ((source, target),) = seen
    assert target is infrared and source.shape == (2, 1, 16, 16) and source.mean() == pytest.approx(1, abs=1e-3)
    back, sheet = SynDiff.load(made / "thermal"), read_png(made / "contact.png")
    assert (back.config["source"], back.config["target"]) == (1, 1) and sheet.shape == (3 * 24, 3 * 32, 3)
    (expected,) = back.translate([sheet[:24, 32:64, 0]], [0])
    assert np.array_equal(sheet[:24, 64:, 0], expected), "drawn from the lightness of a visible picture"


def test_the_others_are_drawn_last_and_on_their_own(frames):
    opened = Frames.open(places.store().local(frames))
    two, three = (stage.Crops(opened, replace(x, batch=40))(np.random.default_rng(3)) for x in (TINY, THREE))
    assert torch.equal(two[0], three[0]) and torch.equal(two[1], three[1])
    assert three[2].shape == three[1].shape and not torch.equal(three[1], three[2])


def test_a_loss_that_explodes_names_its_step(frames, tmp_path, monkeypatch):
    with pytest.raises(StageFailed, match=r"at step \d"):
        run_loop(frames, replace(TINY, rate_generator=1e30), tmp_path, monkeypatch)


def test_no_test_frame_is_ever_read(frames, monkeypatch):
    opened = Frames.open(places.store().local(frames))
    read = set()
    path = opened.path
    monkeypatch.setattr(opened, "path", lambda id, layer: (read.add((opened.split(id), layer)), path(id, layer))[1])
    draw = stage.Crops(opened, replace(TINY, batch=8))
    for seed in range(5):
        infrared, visible, others = draw(np.random.default_rng(seed))
    assert len(others) == 0, "nobody starts from them"
    assert infrared.shape == (8, 1, 16, 16) and visible.shape == (8, 3, 16, 16)
    assert read == {("train", "infrared"), ("unlabelled", "infrared"), ("train", "visible"), ("visible", "visible")}


def test_the_domains_are_drawn_on_their_own(thermofuse_home):
    """Frames whose infrared and visible tell who they are: they meet no more often than by chance."""
    n = 8
    draft, rows = places.store().draft("frames", "b" * 16), []
    for i in range(n):
        names = {"infrared": f"images/f{i}.infrared.png", "visible": f"images/f{i}.visible.png"}
        draft.write(names["infrared"], png_bytes(np.full((16, 16), i, np.uint8)))
        draft.write(names["visible"], png_bytes(np.full((16, 16, 3), i, np.uint8)))
        rows.append(
            {"id": f"f{i}", "split": "train", **names, "label": None, "height": 16, "width": 16, "classes": "{}"}
        )
    info = {"dataset": "tiny", "classes": [], "palette": [], "folds": [], "ignored": []}
    ref = draft.commit(pd.DataFrame(rows), info)
    draw = stage.Crops(Frames.open(places.store().local(ref)), replace(TINY, batch=400))
    infrared, visible, _ = draw(np.random.default_rng(0))
    met = (infrared[:, 0, 0, 0] == visible[:, 0, 0, 0]).float().mean()
    assert met == pytest.approx(1 / n, abs=0.06)


def test_without_visible_pictures_it_says_what_to_supply(thermofuse_home):
    frames = commit_frames(drop=["visible"])
    with pytest.raises(UsageError, match=r"data\.unpaired_visible.*translate\.generator=thermal"):
        stage.fit_translators(frames, TINY, Compute())


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"crop": 18}, "multiple of 4"),
    ({"directions": ("x",)}, "'x'"),
    ({"directions": ("rgb", "rgb_lightness")}, "add lightness"),
    ({"directions": ("rgb", "rgb_lightness"), "generator": "thermal"}, "add lightness"),
    ({"directions": ("thermal",), "generator": "thermal"}, "has to be learnt"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_anything_starts(frames, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        stage.fit_translators(frames, replace(TINY, **changes), Compute())


def test_the_control_needs_no_worker_group(thermofuse_home):
    frames = commit_frames(drop=["visible"])
    settings = TranslateSettings(generator="thermal")
    ref = stage.fit_translators(frames, settings, Compute())
    assert ref.kind == "translators" and ref.count == 2
    folder = places.store().local(ref)
    assert (folder / "lightness/config.json").exists() and (folder / "contact.png").exists()
    assert stage.fit_translators(frames, replace(settings, splits=("test",)), Compute()) == ref, "splits do not matter"
    assert stage.fit_translators(frames, replace(settings, directions=("rgb",)), Compute()) != ref
    third = stage.fit_translators(frames, replace(settings, directions=THREE.directions), Compute())
    assert third.count == 3 and read_png(places.store().local(third) / "contact.png").shape == (3 * 24, 4 * 32, 3)


def test_a_whole_fit_is_reused(ray_local, frames):
    ref = stage.fit_translators(frames, TINY, Compute())
    assert SynDiff.load(places.store().local(ref) / "rgb").config["target"] == 3
    assert stage.fit_translators(frames, TINY, Compute()) == ref


def test_contact_sheets_take_pictures_of_any_size():
    sheet = stage.contact_sheet([[np.ones((4, 6), np.uint8)] * 2, [np.full((9, 2, 3), 7, np.uint8)] * 2])
    assert sheet.shape == (8, 12, 3) and sheet[0, 0, 0] == 1 and sheet[0, 6, 0] == 7 and sheet[0, 8, 0] == 0
