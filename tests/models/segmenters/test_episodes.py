"""Episodes by name become features and masks: the right ones, of the right layers, each picture encoded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.backbone import Wants, build_encoder
from models.episode import EpisodeKey
from models.geometry import Canvas
from models.segmenters.episodes import BaseMemory, gather
from models.segmenters.expert import Expert, ExpertSettings
from models.segmenters.similarity import soft_mask
from models.views import FeatureBank, Views
from tests.models.drawn import ENCODER, SIZE, drawn_frames, drawn_refined, drawn_translations, tiny_encoder

LAYERS = ("infrared", "rgb")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    frames = drawn_frames(tmp_path_factory.mktemp("frames"))
    synthetic = drawn_translations(tmp_path_factory.mktemp("synthetic"), frames)
    views = Views(frames, synthetic, drawn_refined(tmp_path_factory.mktemp("refined"), frames))
    return FeatureBank(tiny_encoder(dilated=False), views, Canvas(SIZE))


@pytest.fixture(scope="module")
def keys(bank):
    """Two 2-shot episodes of different classes that share a frame, and a class that both supports hold."""
    frames = bank.views.frames
    holds = {c: [id for id in frames.ids("train") if frames.pixels(id).get(c, 0) > 30] for c in range(1, 13)}
    label = max(holds, key=lambda c: len(holds[c]))
    other = max((c for c in holds if c != label), key=lambda c: len(set(holds[c]) & set(holds[label])))
    shared = next(id for id in holds[other] if id in holds[label])
    first = [shared, *(id for id in holds[label] if id != shared)]
    second = [id for id in holds[other] if id != shared]
    return [
        EpisodeKey(-1, label, first[0], tuple(first[1:3]), 0), EpisodeKey(-1, other, second[0], (shared, second[1]), 0)
    ]


def test_features_are_those_of_the_frames_asked_for(bank, keys):
    batch = gather(bank, keys, LAYERS)
    for v, layer in enumerate(LAYERS):
        for b, key in enumerate(keys):
            for level, expected in zip(batch.query[v], bank.get([(key.query, layer)]), strict=True):
                assert torch.equal(level[b], expected[0])
            shown = bank.get([(id, layer) for id in key.supports])
            for level, expected in zip(batch.support[v], shown, strict=True):
                assert level.shape[:2] == (2, 2) and torch.equal(level[b], expected)


def test_masks_mark_the_class_of_each_episode(bank, keys):
    batch = gather(bank, keys, LAYERS)
    assert batch.masks.shape == (2, 2, *SIZE) and batch.targets.shape == (2, 2, *SIZE)
    assert batch.masks.dtype == batch.targets.dtype == torch.uint8
    label = bank.views.frames.label
    for b, key in enumerate(keys):
        assert np.array_equal(batch.targets[0, b].numpy(), label(key.query) == key.label)
        for k, id in enumerate(key.supports):
            assert np.array_equal(batch.masks[b, k].numpy(), label(id) == key.label)
            assert batch.masks[b, k].any()


def test_each_stream_is_judged_by_the_label_of_its_own_layer(bank, keys):
    """In RGB pictures objects were freed left of the middle; the masks of supports are those of the first stream."""
    batch = gather(bank, keys, LAYERS)
    turned = gather(bank, keys, LAYERS[::-1])
    for b, key in enumerate(keys):
        truth = bank.views.frames.label(key.query)
        freed = (truth > 0) & (np.arange(SIZE[1]) < SIZE[1] // 2)
        assert freed.any()
        assert np.array_equal(batch.targets[1, b].numpy(), np.where(freed, 255, truth == key.label))
    assert torch.equal(turned.targets, batch.targets.flip(0))
    assert not (batch.masks == 255).any() and (turned.masks == 255).any()


def test_novel_classes_are_hidden_in_masks_and_targets(bank, keys):
    novel = tuple(c for c in range(1, 13) if c not in [key.label for key in keys])
    for policy, hidden in (("ignore", 255), ("background", 0)):
        batch = gather(bank, keys, LAYERS, novel, policy)
        for b, key in enumerate(keys):
            for found, id in [(batch.targets[0, b], key.query), *zip(batch.masks[b], key.supports, strict=True)]:
                label = bank.views.frames.label(id)
                assert np.array_equal(found.numpy(), np.where(np.isin(label, novel), hidden, label == key.label))


def test_every_picture_is_encoded_once_and_together(bank, keys):
    sizes = []
    fresh = FeatureBank(bank.encoder, bank.views, bank.canvas, batch=100)
    handle = bank.encoder.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    gather(fresh, keys, LAYERS)
    handle.remove()
    frames = {id for key in keys for id in (key.query, *key.supports)}
    assert sizes == [2 * len(frames)] and len(frames) < 6, "some frame serves both episodes"


def test_the_canvas_scales_masks_without_inventing_values(bank, keys):
    small = FeatureBank(bank.encoder, bank.views, Canvas((32, 48)))
    batch = gather(small, keys, LAYERS)
    assert batch.masks.shape == (2, 2, 32, 48) and set(batch.targets.unique().tolist()) <= {0, 1, 255}
    assert batch.query[0].low.shape[-2:] == (4, 6)


def test_the_high_level_of_masked_supports_is_there_when_it_is_wanted(bank, keys):
    """BAM's prior: the last stage sees what the mask leaves of the mid level, and the query has none of it."""
    torch.manual_seed(0)
    masked = FeatureBank(build_encoder(ENCODER, Wants(masked=True)), bank.views, bank.canvas)
    batch = gather(masked, keys, LAYERS)
    assert len(batch.query[0]) == 4 and not any(maps.numel() for maps in batch.query[0].blocks)
    grid = batch.support[0].mid.shape[-2:]
    share = soft_mask(batch.masks, tuple(grid)).foreground
    for levels in batch.support:
        for b in range(2):
            expected = masked.encoder.masked(levels.mid[b], share[b][:, None])
            assert torch.allclose(levels.masked[b], expected, atol=1e-5)
            assert not torch.allclose(levels.masked[b], levels.high[b])
    assert len(gather(bank, keys, LAYERS).support[0]) == 3


def test_block_maps_are_those_of_the_frames_asked_for(bank, keys):
    """Not copied side by side, so that their places are lists: one map an episode, and K in each."""
    torch.manual_seed(0)
    deep = FeatureBank(build_encoder(ENCODER, Wants(blocks=True)), bank.views, bank.canvas)
    batch = gather(deep, keys, LAYERS)
    for v, layer in enumerate(LAYERS):
        for b, key in enumerate(keys):
            assert batch.query[v].blocks[b] is deep.held[key.query, layer].blocks
            assert len(batch.support[v].blocks[b]) == len(key.supports) == 2
            for maps, id in zip(batch.support[v].blocks[b], key.supports, strict=True):
                assert maps is deep.held[id, layer].blocks and maps.dim() == 2


def test_a_base_map_is_made_once_per_picture(bank, keys):
    torch.manual_seed(0)
    expert = Expert(bank.encoder.channels, (1, 2, 3), 2, ExpertSettings(base_width=16)).eval()
    asked, calls = [(key.query, "infrared") for key in keys], []
    expert.base.register_forward_hook(lambda *_: calls.append(1))
    query, memory = gather(bank, keys, LAYERS).query[0], BaseMemory()
    with torch.no_grad():
        expected = expert.base_logits(query, bank.grid)
        calls.clear()
        first, again = (memory.logits(expert, 0, asked, query) for _ in range(2))
        assert torch.allclose(first, expected, atol=1e-5) and torch.equal(first, again) and len(calls) == 2
        memory.logits(expert, 1, asked, query)
        assert len(calls) == 4, "another fold has another base learner"
        poor = BaseMemory(budget=0)
        assert torch.equal(poor.logits(expert, 0, asked, query), first) and not poor.held
    without = Expert(bank.encoder.channels, (1, 2), 2, ExpertSettings(base_width=16, use_base=False))
    assert memory.logits(without, 0, asked, query) is None
