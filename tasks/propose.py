"""Propose: names of novel classes become banks of prompts that differ (`models.generators.prompts`).

Banks are filled on the driver, class by class: thousands of candidates cost seconds. Prompts are embedded by the text
encoders of the very pipeline that will draw them. A chat model's replies are kept under the working folder, so that a
bank that is made again asks nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from models.errors import UsageError
from models.frames import Frames
from models.generators.chat import Chat
from models.generators.embedding import text_embedder
from models.generators.grammar import Grammar
from models.generators.prompts import Bank, PromptSettings, Proposer, fill_bank
from models.generators.text2image import open_encoders
from models.generators.words import class_words
from tasks import places, progress
from tasks.prepare import open_frames
from tasks.stage import stage
from tasks.store import Ref, digest_of

CODE = ("tasks.propose", "models.distinct", "models.generators.prompts", "models.generators.grammar",
        "models.generators.words", "models.generators.embedding", "models.generators.chat")
PROPOSERS = ("grammar", "names", "chat")


@dataclass(frozen=True)
class ProposeSettings:
    """proposer: "grammar", "names" (the class template alone, the control) or "chat".

    vocabulary: of the grammar: "photograph", "thermal" or "drawn". bank: one class's bank. url, model: of the chat
    endpoint; its key is read from $THERMOFUSE_CHAT_KEY. pipeline: whose text encoders embed; a folder or id, or
    "foundation" for the pipeline of the recipe's own foundation models.
    """

    proposer: str = "grammar"
    vocabulary: str = "photograph"
    bank: PromptSettings = field(default_factory=PromptSettings)
    pipeline: str = "foundation"
    url: str = ""
    model: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.proposer not in PROPOSERS:
            raise UsageError(f"There is no proposer {self.proposer!r}; choose one of {', '.join(PROPOSERS)}.")


@stage("propose")
def propose(frames: Ref, foundation: Ref | None, fold: int, settings: ProposeSettings) -> Ref:
    """The banks of the fold's novel classes, a Ref of kind "prompts".

    Rows: columns of `models.generators.prompts.COLUMNS`, all candidates with their reasons; the manifest's meta says
    why each bank ended. Companions in a scene are base classes; no prompt names another novel class.
    """
    store, opened = places.store(), open_frames(frames)
    inputs = [frames, *([foundation] if foundation else [])]
    digest = digest_of("prompts", inputs, {"settings": settings, "fold": fold}, CODE)
    if found := store.find("prompts", digest):
        return found
    embed = text_embedder(open_encoders(pipeline_folder(settings.pipeline, foundation)), settings.bank.embed)
    banks = banks_of(opened, fold, settings, embed)
    meta = {"fold": fold, "classes": opened.classes, "stopped": {name: bank.stopped for name, bank in banks.items()}}
    return store.draft("prompts", digest).commit(pd.concat([b.table for b in banks.values()], ignore_index=True), meta)


def banks_of(frames: Frames, fold: int, settings: ProposeSettings, embed) -> dict[str, Bank]:
    """Class name -> bank, for the novel classes of a fold."""
    novel, base = ([frames.class_name(k) for k in ids] for ids in (frames.novel(fold), frames.base(fold)))
    proposer, others, banks = proposer_of(settings, base), [class_words(name) for name in novel], {}
    for k, name in zip(frames.novel(fold), novel, strict=True):
        progress.step("propose", len(banks), len(novel), name)
        banks[name] = fill_bank(class_words(name), k, proposer, embed, settings.bank, others, frames.dataset)
        if not banks[name].table["accepted"].any():
            raise UsageError(f"No prompt for {name!r} was accepted; lower bank.lam_cls or change the proposer.")
    progress.step("propose", len(novel), len(novel))
    return banks


def proposer_of(settings: ProposeSettings, companions: Sequence[str]) -> Proposer:
    """The proposer of the settings; `companions` are classes that may stand beside the asked one."""
    if settings.proposer == "chat":
        if not settings.url or not settings.model:
            raise UsageError("The chat proposer needs url and model; set them, or use the grammar.")
        key = os.environ.get("THERMOFUSE_CHAT_KEY")
        return Chat(settings.url, settings.model, places.home() / "replies", settings.seed, key)
    if settings.proposer == "names":
        return Names(settings.vocabulary)
    return Grammar(settings.vocabulary, settings.seed, companions)


class Names:
    """Nothing but the class's name, once: what a bank is compared with."""

    name = "names"

    def __init__(self, vocabulary: str) -> None:
        self.drawn = vocabulary == "drawn"

    def propose(self, words, count, turn, accepted=(), rejected=()):
        from models.generators.grammar import Candidate, caption
        from models.generators.prompts import template

        if turn:
            return None
        return [Candidate(caption([words.name], dark=False) if self.drawn else template(words), 0)]


def pipeline_folder(pipeline: str, foundation: Ref | None) -> str:
    """Where a pipeline lies: its own name, or the pipeline in the store. Raises UsageError when there is none."""
    if pipeline != "foundation":
        return pipeline
    if foundation is None:
        raise UsageError("There are no foundation models in this run; name a pipeline by folder or id.")
    return str(places.store().local(foundation) / "pipeline")


def accepted_prompts(prompts: Ref) -> pd.DataFrame:
    """The accepted rows of a "prompts" Ref, in the order of acceptance within each class."""
    table = places.store().rows(prompts)
    return table[table["accepted"]].reset_index(drop=True)
