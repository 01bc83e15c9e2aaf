import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from models.episode import (
    POLICIES,
    Episode,
    EpisodeSettings,
    bam1000,
    class_index,
    draw,
    exam,
    exhaustive,
    from_rows,
    kept_counts,
    kept_for_training,
    number,
    sample_training_episode,
    split_base_for_validation,
    to_rows,
    train_label,
)
from models.errors import UsageError
from models.frames import Frames

CLASSES = ["cat", "dog", "hen", "fox", "owl", "eel"]
INFO = {
    "dataset": "barn",
    "classes": CLASSES,
    "palette": [[0, 0, 0]] * 6,
    "folds": [["cat", "dog"], ["hen", "fox"]],
    "ignored": ["eel"],
}


def make_frames() -> Frames:
    """40 labelled frames in each of train and test, with one to three classes of 30..329 pixels each."""
    rng = np.random.default_rng(0)
    rows = []
    for id in [f"{split}{index}" for split in ("train", "test") for index in range(40)]:
        held = rng.permutation(5)[: rng.integers(1, 4)] + 1
        pixels = {int(label): int(rng.integers(30, 330)) for label in held}
        rows.append({"id": id, "split": id.rstrip("0123456789"), "label": "x", "classes": json.dumps(pixels)})
    rows.append({"id": "u", "split": "unlabelled", "label": None, "classes": "{}"})
    table = pd.DataFrame(rows).assign(infrared="x", visible=None, height=20, width=30, sha256="")
    return Frames(".", table, INFO)


@pytest.fixture(scope="module")
def frames():
    return make_frames()


# ---- drawing


def test_the_draws_are_pinned():
    """Golden numbers: frozen exams of other machines and versions must stay comparable."""
    assert number(510, "a", 1) == 16984630117686491851
    assert draw(list("abcdefgh"), 3, 510, "query", 2) == ["b", "f", "e"]


def test_draws_are_without_replacement_and_even():
    seen = Counter(item for key in range(3000) for item in draw("abcde", 2, key))
    assert all(len(set(draw("abcde", 4, key))) == 4 for key in range(100))
    assert max(seen.values()) / min(seen.values()) < 1.15


def test_draws_need_no_random_state():
    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(range(100), 5, 1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert draw(range(100), 5, 1) == first


def test_the_index_counts_only_frames_with_enough_pixels(frames):
    index = class_index(frames, [1, 2], 100, "test")
    assert all(frames.pixels(id)[label] >= 100 and id.startswith("test") for label in index for id in index[label])
    left_out = set(frames.ids("test")) - set(index[1])
    assert all(frames.pixels(id).get(1, 0) < 100 for id in left_out)
    assert class_index(frames, [1], 1, ids=["test0", "u"])[1] in ([], ["test0"])


# ---- exams


@pytest.mark.parametrize("shots", [1, 5])
def test_exhaustive_asks_every_pair_once(frames, shots):
    episodes = exhaustive(frames, frames.novel(0), shots, 100, 510, fold=0)
    asked = Counter((key.query, key.label) for key in episodes)
    wanted = {(id, c) for id in frames.ids("test") for c in (1, 2) if frames.pixels(id).get(c, 0) >= 100}
    assert set(asked) == wanted and set(asked.values()) == {1}
    assert {(key.fold, key.seed, len(key.supports)) for key in episodes} == {(0, 510, shots)}


@pytest.mark.parametrize("protocol", ["exhaustive", "bam1000"])
@pytest.mark.parametrize("shots", [1, 5])
def test_supports_are_distinct_hold_the_class_and_never_the_query(frames, protocol, shots):
    settings = EpisodeSettings(shots=shots, protocol=protocol, seeds=(510, 365))
    for key in exam(frames, 1, settings):
        assert key.query not in key.supports and len(set(key.supports)) == shots
        assert all(frames.pixels(id)[key.label] >= 100 and frames.split(id) == "test" for id in key.supports)
        assert key.label in frames.novel(1) and frames.split(key.query) == "test"


def test_draws_depend_on_seed_query_and_class_only(frames):
    by_pair = {(k.query, k.label): k for k in exhaustive(frames, (1, 2), 2, 100, 510)}
    for key in exhaustive(frames, (2,), 2, 100, 510):  # another set of classes, the same draws
        assert by_pair[key.query, key.label] == key
    other = exhaustive(frames, (1, 2), 2, 100, 365)
    assert any(by_pair[key.query, key.label].supports != key.supports for key in other)


def test_a_class_with_too_few_frames_is_told_in_one_sentence(frames):
    count = len(class_index(frames, [3], 320, "test")[3])
    with pytest.raises(UsageError) as caught:
        exhaustive(frames, (3,), 5, 320, 510)
    assert str(caught.value) == (
        f"Class 'hen' of barn has {count} frames with 320 pixels or more and 5-shot episodes need 6; "
        "use fewer shots, fewer min_pixels, or other folds."
    )


@pytest.mark.parametrize("call", [exhaustive, bam1000])
def test_exactly_k_plus_one_frames_are_enough(frames, call):
    count = len(class_index(frames, [3], 100, "test")[3])
    assert call(frames, (3,), count - 1, 100, 510)
    with pytest.raises(UsageError, match=f"has {count} frames"):
        call(frames, (3,), count, 100, 510)


def test_bam1000_walks_the_query_list_in_order(frames):
    episodes = bam1000(frames, (1, 2), 1, 100, 510, queries=100)
    listed = [id for id in frames.ids("test") if any(frames.pixels(id).get(c, 0) >= 100 for c in (1, 2))]
    assert [key.query for key in episodes] == [listed[i % len(listed)] for i in range(100)]
    assert len(bam1000(frames, (1, 2), 1, 100, 510)) == 1000


def test_bam1000_may_ask_a_class_of_few_pixels_as_published(frames):
    sizes = [frames.pixels(key.query)[key.label] for key in bam1000(frames, (1, 2), 1, 100, 510)]
    assert min(sizes) < 100
    assert min(frames.pixels(k.query)[k.label] for k in exhaustive(frames, (1, 2), 1, 100, 510)) >= 100


def test_bam1000_draws_anew_on_each_walk(frames):
    by_query = {}
    for key in bam1000(frames, (1, 2), 1, 100, 510):
        by_query.setdefault(key.query, set()).add((key.label, key.supports))
    assert min(len(drawn) for drawn in by_query.values()) > 3


def test_an_exam_joins_its_seeds_and_may_ask_other_classes(frames):
    one, two = (exam(frames, 0, EpisodeSettings(seeds=seeds)) for seeds in ((510,), (510, 365)))
    assert two[: len(one)] == one and len(two) == 2 * len(one)
    assert {key.label for key in exam(frames, 0, EpisodeSettings(split="train"), classes=(3, 5))} == {3, 5}


def test_an_unknown_protocol_lists_the_known_ones(frames):
    with pytest.raises(UsageError, match="exhaustive, bam1000"):
        exam(frames, 0, EpisodeSettings(protocol="all"))


def test_episodes_survive_their_table(frames, tmp_path):
    episodes = exam(frames, 0, EpisodeSettings(shots=3))
    to_rows(frames, episodes).to_parquet(tmp_path / "a.parquet")
    table = pd.read_parquet(tmp_path / "a.parquet")
    assert from_rows(table) == episodes
    assert table["episode"].tolist() == list(range(len(episodes)))
    assert set(table["height"]) == {20} and set(table["width"]) == {30}
    assert list(to_rows(frames, []).columns) == list(table.columns)


# ---- training


def test_training_episodes_are_a_function_of_seed_and_step(frames):
    index = class_index(frames, frames.base(0), 100)
    drawn = [sample_training_episode(index, frames.base(0), 2, 7, step) for step in range(300)]
    assert drawn[::-1] == [sample_training_episode(index, frames.base(0), 2, 7, step) for step in range(299, -1, -1)]
    other = [sample_training_episode(index, frames.base(0), 2, 8, step) for step in range(300)]
    assert [key.label for key in other] != [key.label for key in drawn]
    assert all(key.supports != same.supports for key, same in zip(other[:3], drawn, strict=False))
    for key in drawn:
        assert key.fold == -1 and key.label in frames.base(0) and frames.split(key.query) == "train"
        assert len({key.query, *key.supports}) == 3
        assert all(frames.pixels(id)[key.label] >= 100 for id in (key.query, *key.supports))


def test_training_draws_classes_evenly(frames):
    index = {1: ["a", "b"], 2: [f"f{i}" for i in range(100)]}
    seen = Counter(sample_training_episode(index, (1, 2), 1, 0, step).label for step in range(1000))
    assert abs(seen[1] - 500) < 60


def test_training_passes_over_classes_with_too_few_frames(frames):
    index = {1: ["a"], 2: ["b", "c"]}
    assert {sample_training_episode(index, (1, 2), 1, 0, step).label for step in range(50)} == {2}
    with pytest.raises(UsageError, match="No base class has 3 frames"):
        sample_training_episode(index, (1, 2), 2, 0, 0)


@pytest.mark.parametrize("fold", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_held_out_classes_are_base_classes(frames, fold, seed):
    train, held_out = split_base_for_validation(frames, fold, 1, seed)
    assert sorted(train + held_out) == list(frames.base(fold)) and len(held_out) == 1
    assert not set(held_out) & set(frames.novel(fold)) and not set(train) & set(frames.novel(fold))


def test_held_out_classes_vary_with_the_seed_and_leave_one_to_train(frames):
    assert len({split_base_for_validation(frames, 0, 1, seed)[1] for seed in range(20)}) > 1
    with pytest.raises(UsageError, match="hold out fewer than 3"):
        split_base_for_validation(frames, 0, 3, 0)


LABEL = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)


@pytest.mark.parametrize(("policy", "seen"), [("ignore", 255), ("background", 0), ("drop", 255)])
def test_no_novel_id_reaches_a_training_loss(policy, seen):
    assert train_label(LABEL, (1, 3), policy).tolist() == [[0, seen, 2, seen, 255]]
    assert LABEL.tolist() == [[0, 1, 2, 3, 255]]


def test_only_drop_leaves_frames_out(frames):
    everything = frames.ids("train")
    assert kept_for_training(frames, 0, "ignore") == kept_for_training(frames, 0, "background") == everything
    kept = kept_for_training(frames, 0, "drop")
    assert 0 < len(kept) < len(everything)
    assert all(not {1, 2} & set(frames.pixels(id)) for id in kept)
    assert all({1, 2} & set(frames.pixels(id)) for id in set(everything) - set(kept))
    fewer = kept_for_training(frames, 0, "drop", held_out=(5,))
    assert set(fewer) == {id for id in kept if 5 not in frames.pixels(id)}
    assert kept_counts(frames, 0) == {"ignore": 40, "background": 40, "drop": len(kept)}


def test_an_unknown_policy_lists_the_known_ones(frames):
    for call in (lambda: train_label(LABEL, (), "keep"), lambda: kept_for_training(frames, 0, "keep")):
        with pytest.raises(UsageError, match=", ".join(POLICIES)):
            call()


def test_unlabelled_frames_are_never_trained_on_or_asked(frames):
    assert kept_for_training(frames, 0, "ignore", split="unlabelled") == []
    assert class_index(frames, (1,), 1, "unlabelled") == {1: []}


def test_a_batch_moves_as_one():
    batch = Episode(*(torch.zeros(2, n) for n in range(1, 6))).to("meta")
    assert all(getattr(batch, name).device.type == "meta" for name in Episode.__dataclass_fields__)
    assert batch.query_mask.shape == (2, 4)
