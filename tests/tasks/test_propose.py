"""Banks of a fold's novel classes, embedded by the encoders of a saved (tiny) pipeline."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from models.errors import UsageError
from models.generators.prompts import PromptSettings
from tasks import places
from tasks.propose import ProposeSettings, accepted_prompts, pipeline_folder, propose
from tests.models.generators.tiny import pipeline

CLASSES = ("disc", "ring", "bar", "star")
SETTINGS = ProposeSettings(vocabulary="drawn", bank=PromptSettings(count=4, lam_div=0.99999, lam_cls=-1.0, batch=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipeline("sd15").save_pretrained(path / "pipeline")
    return path


@pytest.fixture
def refs(thermofuse_home, folder):
    """Refs of a dataset with two folds, and of foundation models that hold a pipeline."""
    info = {"dataset": "tiny", "classes": CLASSES, "palette": [], "folds": [["disc", "ring"], ["bar", "star"]],
            "ignored": []}
    frames = places.store().draft("frames", "a" * 16).commit(pd.DataFrame({"id": []}), info)
    draft = places.store().draft("foundation", "b" * 16)
    draft.upload(folder)
    return frames, draft.commit(None, {}, count=1)


def test_every_novel_class_has_its_bank(refs):
    ref = propose.fn(*refs, 1, SETTINGS)
    table = accepted_prompts(ref)
    assert table.groupby("class_id").size().to_dict() == {3: 4, 4: 4} and set(table["class_name"]) == {"bar", "star"}
    assert places.store().manifest(ref)["meta"]["stopped"] == {"bar": "full", "star": "full"}


def test_companions_are_base_classes(refs):
    many = replace(SETTINGS, vocabulary="photograph", bank=replace(SETTINGS.bank, count=16))
    table = accepted_prompts(propose.fn(*refs, 1, many))
    for name, other in (("bar", "star"), ("star", "bar")):
        text = " ".join(table[table["class_name"] == name]["text"])
        assert other not in text and ("disc" in text or "ring" in text)


def test_a_bank_is_made_once_and_another_fold_is_another_bank(refs):
    first = propose.fn(*refs, 0, SETTINGS)
    assert propose.fn(*refs, 0, SETTINGS) == first and propose.fn(*refs, 1, SETTINGS) != first
    assert propose.fn(*refs, 0, replace(SETTINGS, seed=1)) != first


def test_names_alone_are_the_control(refs):
    table = accepted_prompts(propose.fn(*refs, 0, replace(SETTINGS, proposer="names")))
    assert list(table["text"]) == ["a disc on bright ground", "a ring on bright ground"]
    words = replace(SETTINGS, proposer="names", vocabulary="photograph")
    assert list(accepted_prompts(propose.fn(*refs, 0, words))["text"]) == ["a photo of a disc", "a photo of a ring"]


def test_a_chat_bank_is_made_of_kept_replies(refs, monkeypatch):
    """No server is there: the replies lie in the working folder, as a first run leaves them."""
    asked = []

    def ask(self, prompt, turn):
        asked.append(prompt)
        text = json.dumps([f"a ring number {turn} {n}, a disc apart" if '"ring"' in prompt else f"disc {turn} {n}"
                           for n in range(8)] if turn < 2 else [])
        return json.dumps({"choices": [{"message": {"content": text}}]}).encode()

    monkeypatch.setattr("models.generators.chat.Chat._ask", ask)
    chat = replace(SETTINGS, proposer="chat", url="http://127.0.0.1:9/v1", model="tiny")
    with pytest.raises(UsageError, match="No prompt for 'ring'"):
        propose.fn(*refs, 0, chat)  # each of its captions names the other novel class
    count = len(asked)
    with pytest.raises(UsageError, match="No prompt for 'ring'"):
        propose.fn(*refs, 0, chat)
    assert len(asked) == count > 1


def test_what_is_missing_is_told(refs):
    with pytest.raises(UsageError, match="no foundation models"):
        pipeline_folder("foundation", None)
    with pytest.raises(UsageError, match="needs url and model"):
        propose.fn(*refs, 0, replace(SETTINGS, proposer="chat"))
    with pytest.raises(UsageError, match="grammar, names, chat"):
        ProposeSettings(proposer="poet")
    assert pipeline_folder("some/id", None) == "some/id"
