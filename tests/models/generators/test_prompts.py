"""The bank: what is turned down and why, when it ends, and that a cut run is one run."""

import numpy as np
import pandas as pd
import pytest

from models.errors import UsageError
from models.generators.grammar import Candidate, Grammar
from models.generators.prompts import COLUMNS, PromptSettings, fill_bank, guard, prompt_uid, stopped_at
from models.generators.words import class_words

SETTINGS = PromptSettings(count=12, lam_div=0.8, lam_cls=-1.0, batch=16, window=64)
CAR = class_words("car")


def words_embedding(texts):
    """Bags of hashed words: sentences that share words are near. Unit float32 [N, 64]."""
    rows = np.zeros((len(texts), 64), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().replace(",", "").split():
            seed = sum(ord(letter) * 31**place for place, letter in enumerate(word)) % 2**32
            row += np.random.default_rng(seed).normal(size=64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Said:
    """A proposer that says the given sentences, `count` a turn."""

    name = "said"

    def __init__(self, *texts):
        self.texts, self.seen = texts, []

    def propose(self, words, count, turn, accepted=(), rejected=()):
        self.seen.append((list(accepted), list(rejected)))
        piece = self.texts[turn * count : (turn + 1) * count]
        return [Candidate(text, turn * count + i) for i, text in enumerate(piece)] or None


def bank(proposer, changes=None, **more):
    settings = PromptSettings(**{**vars(SETTINGS), **(changes or {})})
    return fill_bank(CAR, 3, proposer, words_embedding, settings, **more)


# ---- the guard


@pytest.mark.parametrize("text, name, reason", [
    ("two Cars in rain", "car", None), ("a carpet", "car", "class not named"),
    ("a car beside a person", "car", "names person"), ("a car beside people", "car", "names person"),
    ("a car stop of concrete", "car_stop", None), ("a wheel stop and a car", "car_stop", "names car"),
    ("dining tables in a hall", "diningtable", None), ("a bicycle", "bike", None),
])
def test_a_sentence_names_its_class_and_no_other_novel_one(text, name, reason):
    others = [class_words(other) for other in ("car", "person", "car_stop", "diningtable", "bike")]
    assert guard(text, class_words(name), others) == reason


# ---- decisions


def test_every_candidate_has_a_row_with_its_reason():
    said = Said("a car", "a boat", "a car and a dog", "a car", "many old cars seen on a wide country road")
    found = bank(said, others=[CAR, class_words("dog")]).table
    assert list(found.columns) == list(COLUMNS)
    assert list(found["reason"]) == ["accepted", "class not named", "names dog", "too near", "accepted"]
    assert found["nn_uid"][3] == found["prompt_uid"][0] and found["max_sim"][3] == pytest.approx(1, abs=1e-6)
    assert found["max_sim"][0] == -1 and found["nn_uid"].isna()[0] and found["cls_sim"].isna()[1]
    assert set(found["class_id"]) == {3} and set(found["proposer"]) == {"said"}


def test_a_prompt_far_from_the_class_is_turned_down():
    found = bank(Said("a photo of a car", "seventeen grey pigeons cross somewhere above car"), {"lam_cls": 0.5}).table
    assert list(found["reason"]) == ["accepted", "far from the class"]
    assert found["cls_sim"][0] == pytest.approx(1, abs=1e-6)


def test_accepted_prompts_are_apart():
    found = bank(Grammar())
    assert found.stopped == "full" and len(found.vectors) == 12 == found.table["accepted"].sum()
    assert (found.vectors @ found.vectors.T - 2 * np.eye(12)).max() < 0.8
    assert np.allclose(found.vectors, words_embedding(found.table["text"][found.table["accepted"]]), atol=1e-6)
    assert found.table["accepted"].iloc[-1], "nothing is looked at once the bank is full"


@pytest.mark.parametrize("lam", ["auto", 0.5])
def test_turns_and_cuts_change_nothing(lam):
    changes = {"lam_div": lam, "sample": 40, "count": 20}
    whole = bank(Grammar(), changes)
    pieces = whole.table[whole.table["round"] < 4]
    again = bank(Grammar(), changes, done=pieces)
    assert 0 < len(pieces) < len(whole.table)
    pd.testing.assert_frame_equal(again.table, whole.table, check_dtype=False)
    assert np.allclose(again.vectors, whole.vectors, atol=1e-6) and again.stopped == whole.stopped
    finished = bank(Said(), changes, done=whole.table)
    assert finished.stopped == whole.stopped and len(finished.table) == len(whole.table)


def test_the_automatic_threshold_takes_the_share_asked_for_of_the_first_candidates():
    found = bank(Grammar(), {"lam_div": "auto", "sample": 60, "count": 200, "acceptance": 0.3, "max_ratio": 1}).table
    assert 0.3 <= found["accepted"][:60].mean() < 0.4 and found["lam_div"].nunique() == 1


def test_a_proposer_hears_what_was_taken_and_what_was_not():
    said = Said("a car", "a boat", "a red car on a farm", "a car")
    bank(said, {"batch": 2})
    assert said.seen[0] == ([], []) and said.seen[1] == (["a car"], ["a boat"])


def test_centring_measures_from_the_class():
    found = bank(Grammar(), {"centre": "class"})
    rows = words_embedding(found.table["text"][found.table["accepted"]]) - words_embedding(["a photo of a car"])
    assert np.allclose(found.vectors, rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-5)


def test_a_bank_survives_parquet(tmp_path):
    found = bank(Said("a car", "a boat")).table
    found.to_parquet(tmp_path / "bank.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "bank.parquet"), found, check_dtype=False)


# ---- the end


@pytest.mark.parametrize("accepted, end, why", [
    ([1] * 30, 12, "full"),
    ([1] * 5 + [0] * 100, 68, "stalled"),
    ([1, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 8, 80, ""),
    ([1] + [0] * 20, 21, ""),
])
def test_a_bank_ends_by_rule(accepted, end, why):
    assert stopped_at(accepted, SETTINGS) == (end, why)


def test_too_many_tries_end_it():
    settings = PromptSettings(count=4, max_ratio=5, window=10, stall_rate=0.05)
    assert stopped_at([0, 0, 0, 0, 0, 0, 0, 1, 0, 0] * 5, settings) == (20, "too many tries")


def test_a_proposer_with_nothing_left_ends_it():
    assert bank(Said("a car")).stopped == "nothing left"
    assert bank(Said("a boat", "a cow"), {"lam_div": "auto"}).table["accepted"].sum() == 0


def test_identity_is_the_class_and_the_text():
    assert prompt_uid("a", "car", "x") == prompt_uid("a", "car", "x") and len(prompt_uid("a", "car", "x")) == 16
    assert len({prompt_uid(*key) for key in (("a", "car", "x"), ("b", "car", "x"), ("a", "c", "arx"))}) == 3


@pytest.mark.parametrize("wrong", [{"embed": "words"}, {"centre": "mean"}, {"lam_div": "automatic"}])
def test_settings_that_cannot_be_say_what_can(wrong):
    with pytest.raises(UsageError, match=r"pooled|'auto'"):
        PromptSettings(**wrong)
