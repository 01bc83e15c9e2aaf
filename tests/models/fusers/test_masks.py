"""Segments become one mask, once; files and nothing serve as well."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from models.errors import UsageError
from models.fusers.masks import MaskProvider, disturb, merge, morph, stretch
from models.fusers.settings import MaskSettings

RULE = MaskSettings()


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Infrared and visible with a hot, textured square; where it is."""
    rng = np.random.default_rng(0)
    where = np.zeros((80, 100), bool)
    where[20:40, 30:55] = True
    infrared = (60 + rng.normal(0, 3, where.shape) + 120 * where).clip(0, 255).astype(np.uint8)
    visible = (90 + rng.normal(0, 1 + 30 * where)).clip(0, 255).astype(np.uint8)
    return infrared, np.repeat(visible[..., None], 3, -1), where


def segment(where: np.ndarray, quality: float = 0.95) -> dict:
    return {"segmentation": where, "area": int(where.sum()), "predicted_iou": quality, "stability_score": 0.97}


def iou(mask: np.ndarray, where: np.ndarray) -> float:
    marked = mask > 127
    return (marked & where).sum() / (marked | where).sum()


def segments() -> list[dict]:
    """The square, the whole picture, everything around the square, one cold block and one speck."""
    *_, where = scene()
    cold, speck = np.zeros_like(where), np.zeros_like(where)
    cold[60:75, 5:25], speck[0, 0] = True, True
    return [segment(x) for x in (where, np.ones_like(where), ~where, cold, speck)]


@pytest.mark.parametrize("kind", ["infrared", "visible"])
@pytest.mark.parametrize("mode", ["soft", "binary"])
def test_the_mask_is_what_stands_out(kind, mode):
    infrared, visible, where = scene()
    picture = infrared if kind == "infrared" else visible
    mask = merge(segments(), kind, picture, replace(RULE, mode=mode))
    assert mask.dtype == np.uint8 and iou(mask, where) > 0.9
    assert set(np.unique(mask)) <= {0, 255} or mode == "soft"


def test_a_union_of_all_segments_would_be_the_whole_picture():
    _, visible, where = scene()
    everything = merge(segments(), "visible", visible, replace(RULE, area=(0, 1), mode="union"))
    assert (everything > 0).all()
    assert iou(merge(segments()[:1], "visible", visible, replace(RULE, mode="union")), where) == 1


def test_no_segment_that_counts_gives_an_empty_mask():
    infrared, _, where = scene()
    for nothing in ([], [segment(np.ones_like(where))], [segment(where, 0.0)]):
        assert not merge(nothing, "infrared", infrared, RULE).any()


def test_segments_too_large_or_too_small_do_not_count():
    infrared, visible, where = scene()
    half, speck = np.zeros_like(where), np.zeros_like(where)
    half[:, 20:60], speck[30, 40] = True, True
    for kind, picture in (("infrared", infrared), ("visible", visible)):
        for wrong in (half, speck):
            assert not merge([segment(wrong)], kind, picture, RULE).any()
            assert merge([segment(wrong)], kind, picture, replace(RULE, area=(0, 1))).any()


def test_only_the_best_count():
    infrared, _, where = scene()
    half = where & (np.arange(100) < 42)
    both = [segment(where & ~half, 0.9), segment(half, 0.99)]
    assert iou(merge(both, "infrared", infrared, RULE), where) > 0.9
    assert iou(merge(both, "infrared", infrared, replace(RULE, top=1)), half) > 0.9


class Counted:
    """In the place of the mask generator: answers with the square, and counts."""

    def __init__(self):
        self.seen = []

    def generate(self, picture):
        self.seen.append(picture)
        return segments()


def test_sam_is_asked_once_per_picture(tmp_path):
    infrared, visible, where = scene()
    provider = MaskProvider(replace(RULE, backend="sam"), tmp_path / "cache", network=object())
    provider.__dict__["_generator"] = counted = Counted()
    first = provider.masks(infrared, visible)
    assert len(counted.seen) == 2 and all(p.shape == (80, 100, 3) and p.dtype == np.uint8 for p in counted.seen)
    assert counted.seen[0].max() == 255, "infrared is shown stretched"
    again = MaskProvider(replace(RULE, backend="sam"), tmp_path / "cache", network=object())
    again.__dict__["_generator"] = Counted()
    for a, b in zip(again.masks(infrared, visible), first, strict=True):
        assert np.array_equal(a, b) and iou(a, where) > 0.9
    assert not again.__dict__["_generator"].seen
    other = MaskProvider(replace(RULE, backend="sam", top=3), tmp_path / "cache", network=object())
    other.__dict__["_generator"] = counted
    other.masks(infrared, visible)
    assert len(counted.seen) == 4, "other settings, other masks"
    written = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*.json")]
    assert {facts["kind"] for facts in written} == {"infrared", "visible"} and written[0]["points"] == 16


def tiny_sam():
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    torch.manual_seed(0)
    encoder = ImageEncoderViT(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2, out_chans=16)
    prompts = PromptEncoder(16, (4, 4), (64, 64), 4)
    heads = TwoWayTransformer(depth=1, embedding_dim=16, mlp_dim=16, num_heads=2)
    decoder = MaskDecoder(transformer_dim=16, transformer=heads, iou_head_depth=1, iou_head_hidden_dim=8)
    return Sam(encoder, prompts, decoder)


def test_the_network_itself_runs():
    infrared, visible, _ = scene()
    loose = MaskSettings("sam", points=2, quality=-100.0, stability=-1.0, area=(0, 1))
    for mask in MaskProvider(loose, network=tiny_sam()).masks(infrared, visible):
        assert mask.shape == infrared.shape and mask.dtype == np.uint8


def test_files_and_nothing(tmp_path):
    infrared, visible, where = scene()
    for part, value in (("sam_ir", 255), ("sam_vis", 128)):
        (tmp_path / part).mkdir()
        Image.fromarray((value * where).astype(np.uint8)).save(tmp_path / part / "00001N.png")
    provider = MaskProvider(MaskSettings("file", folder=str(tmp_path)))
    assert [mask.max() for mask in provider.masks(infrared, visible, "00001N")] == [255, 128]
    with pytest.raises(UsageError, match=r"no mask .*2\.png"):
        provider.masks(infrared, visible, "2")
    with pytest.raises(UsageError, match="compute it again"):
        provider.masks(infrared[1:], visible[1:], "00001N")
    assert not any(mask.any() for mask in MaskProvider(RULE).masks(infrared, visible))


def test_levels_need_no_weights_and_find_what_stands_out(tmp_path):
    infrared, _, where = scene()
    visible = np.repeat((np.where(where, 200, 60)[..., None]).astype(np.uint8), 3, -1)
    provider = MaskProvider(replace(RULE, backend="levels", stability=0.5), tmp_path)
    masks = provider.masks(infrared, visible)
    assert iou(masks[0], where) > 0.9 and masks[1][where].any()
    assert len(list(tmp_path.glob("*.png"))) == 2 and not list(tmp_path.glob("*.[0-9]*"))


def test_finished_masks_are_grown_shrunk_or_emptied_from_one_cache(tmp_path):
    infrared, visible, _ = scene()
    levels = replace(RULE, backend="levels", stability=0.5)
    plain = MaskProvider(levels, tmp_path).masks(infrared, visible)[0] > 0
    kept = len(list(tmp_path.iterdir()))
    grown, shrunk = (
        MaskProvider(replace(levels, grow=n), tmp_path).masks(infrared, visible)[0] > 0 for n in (3, -3)
    )
    assert (plain <= grown).all() and grown.sum() > plain.sum() > shrunk.sum() > 0 and (shrunk <= plain).all()
    for drop, left in (("infrared", [0, 1]), ("visible", [1, 0]), ("both", [0, 0])):
        masks = MaskProvider(replace(levels, drop=drop), tmp_path).masks(infrared, visible)
        assert [int(mask.any()) for mask in masks] == left
    assert len(list(tmp_path.iterdir())) == kept, "the cache holds what was found, not what was made of it"


def test_masks_stand_beside_a_pair_by_name():
    infrared, visible, _ = scene()
    assert MaskProvider(RULE).aux(infrared, visible) == {}
    aux = MaskProvider(replace(RULE, backend="levels", stability=0.5)).aux(infrared, visible)
    assert set(aux) == {"mask_infrared", "mask_visible"} and aux["mask_infrared"].dtype == np.uint8


@pytest.mark.parametrize(("settings", "words"), [
    (MaskSettings("sams"), "none, file, levels, sam"),
    (MaskSettings(drop="all"), "drop 'all'; choose one of infrared, visible, both"),
    (MaskSettings(mode="hard"), "soft, binary, union"),
    (MaskSettings("file"), "no folder None"),
    (MaskSettings("sam", checkpoint="absent.pth"), r"no checkpoint absent\.pth; .* vit_b"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_told(settings, words):
    with pytest.raises(UsageError, match=words):
        MaskProvider(settings)


def test_masks_grow_and_shrink():
    *_, where = scene()
    mask = torch.from_numpy(where)[None, None].float()
    assert morph(mask, 2).sum() == 24 * 29 and morph(mask, -2).sum() == 16 * 21
    assert torch.equal(morph(mask, 0), mask)


def test_disturbed_masks_differ_and_some_are_gone():
    torch.manual_seed(0)
    *_, where = scene()
    masks = torch.from_numpy(where)[None, None].float().expand(200, -1, -1, -1)
    areas = disturb(masks).sum((1, 2, 3))
    assert 0.04 < (areas == 0).float().mean() < 0.2
    assert len(areas.unique()) == 12  # eleven radii, and nothing
    assert torch.equal(disturb(masks, 0, 0.0), masks)


def test_stretching_a_dark_picture():
    picture = np.arange(40, 60, dtype=np.uint8).repeat(50).reshape(20, 50)
    assert stretch(picture).min() == 0 and stretch(picture).max() == 255
    assert not stretch(np.full((4, 4), 9, np.uint8)).any()
