"""The prompt bank of one class: proposed, guarded, kept apart by text embedding, with a reason for each decision.

Syn4Seg (arXiv 2603.27206) accepts prompt p when its largest cosine with the bank is below λ_div. Keeping apart alone
rewards drift away from the class, so a prompt must also name its class, name no other novel one, and lie within
λ_cls of "a photo of a {class}" (spec §1.2). Candidates are decided one by one, in order; how many are proposed at a
time, and where a run was cut, changes nothing.

Legend: N candidates, M accepted ones, d dimensions of a text embedding.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
import pandas as pd

from models.distinct import calibrate_threshold, choose_distinct
from models.errors import UsageError
from models.generators.embedding import MODES, Embed
from models.generators.grammar import Candidate
from models.generators.words import ClassWords, plural, with_article

TAIL = 20  # accepted and rejected prompts that a proposer is shown
COLUMNS = ("prompt_uid", "class_id", "class_name", "text", "slots", "round", "cand_idx", "proposer", "accepted",
           "max_sim", "nn_uid", "cls_sim", "reason", "lam_div")
STOPS = ("full", "stalled", "too many tries", "nothing left")


@dataclass(frozen=True)
class PromptSettings:
    """A bank of `count` prompts a class.

    embed: "pooled", "tokens" or "concat" (`models.generators.embedding`). centre: "none", or "class" (the embedding
    less that of the class). lam_div: "auto" (accepts the share `acceptance` of the first `sample` candidates), or a
    cosine. lam_cls: least cosine with the class template. batch: candidates of one turn. block: rows of one product.
    Stops when full, when of the last `window` candidates fewer than `stall_rate` were accepted, or after
    `max_ratio` · count candidates.
    """

    count: int = 200
    embed: str = "pooled"
    centre: str = "none"
    lam_div: str | float = "auto"
    lam_cls: float = 0.2
    acceptance: float = 0.4
    sample: int = 256
    batch: int = 64
    block: int = 1024
    window: int = 256
    stall_rate: float = 0.02
    max_ratio: int = 50

    def __post_init__(self) -> None:
        if self.embed not in MODES or self.centre not in ("none", "class"):
            raise UsageError(f"embed is one of {', '.join(MODES)} and centre none or class; correct the settings.")
        if isinstance(self.lam_div, str) and self.lam_div != "auto":
            raise UsageError(f"lam_div is 'auto' or a cosine, not {self.lam_div!r}.")


class Proposer(Protocol):
    """Candidates of one turn, or None when nothing is left. The same arguments give the same candidates."""

    name: str

    def propose(
        self, words: ClassWords, count: int, turn: int, accepted: Sequence[str], rejected: Sequence[str],
    ) -> list[Candidate] | None: ...


@dataclass(frozen=True)
class Bank:
    """The table of all candidates (columns COLUMNS), the accepted vectors float32 [M, d], and why it ended."""

    table: pd.DataFrame
    vectors: np.ndarray
    stopped: str


# ---- the guard


def name_pattern(words: ClassWords) -> re.Pattern:
    """Finds the class in a sentence: noun, synonyms and name, in singular and plural."""
    spelled = {words.noun, words.name.replace("_", " "), *words.synonyms}
    forms = sorted({form for noun in spelled for form in (noun, plural(noun))}, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(re.escape(form) for form in forms) + r")\b", re.IGNORECASE)


def guard(text: str, words: ClassWords, others: Sequence[ClassWords]) -> str | None:
    """Why a sentence does not serve its class, or None: it must name it, and none of the other novel classes."""
    pattern = name_pattern(words)
    if not pattern.search(text):
        return "class not named"
    rest = pattern.sub(" ", text)  # "wheel stop for a car" names cars; "car stop" does not
    named = next((other.noun for other in others if other != words and name_pattern(other).search(rest)), None)
    return named and f"names {named}"


def template(words: ClassWords) -> str:
    return f"a photo of {with_article(words.noun)}"


def prompt_uid(namespace: str, name: str, text: str) -> str:
    """16 hexadecimal digits of namespace, class and text."""
    return blake2b(f"{namespace}\x1f{name}\x1f{text}".encode(), digest_size=8).hexdigest()


# ---- the bank


def fill_bank(
    words: ClassWords, label: int, proposer: Proposer, embed: Embed, settings: PromptSettings,
    others: Sequence[ClassWords] = (), namespace: str = "", done: pd.DataFrame | None = None,
) -> Bank:
    """The bank of class `label`. others: the other novel classes. embed: text -> unit rows. done: the table of a bank
    that was cut after any turn; the result is that of one run."""
    bank = _Filling(words, label, proposer, embed, settings, others, namespace)
    if done is not None and len(done):
        bank.restore(done)
    for turn in itertools.count(bank.turn):
        if bank.stopped:
            break
        candidates = proposer.propose(words, settings.batch, turn, *bank.tails())
        bank.take(candidates, turn)
    return Bank(pd.DataFrame(bank.rows, columns=list(COLUMNS)), bank.vectors, bank.stopped)


class _Filling:
    """A bank that is being filled: its rows so far, the accepted vectors, λ, and the candidates that wait for λ."""

    def __init__(self, words, label, proposer, embed, settings, others, namespace) -> None:
        self.words, self.label, self.proposer, self.embed = words, label, proposer.name, embed
        self.settings, self.others, self.namespace = settings, others, namespace
        self.rows: list[dict] = []
        self.waiting: list[dict] = []
        self.anchor = embed([template(words)])
        self.vectors = np.empty((0, self.anchor.shape[1]), np.float32)
        self.threshold = None if settings.lam_div == "auto" else float(settings.lam_div)
        self.turn, self.stopped = 0, ""

    def restore(self, table: pd.DataFrame) -> None:
        self.rows = table.to_dict("records")
        self.threshold = float(table["lam_div"].iloc[0])
        if texts := [row["text"] for row in self.rows if row["accepted"]]:
            self.vectors = self._apart(self.embed(texts))
        self.turn = int(table["round"].max()) + 1
        self.stopped = stopped_at([row["accepted"] for row in self.rows], self.settings)[1]

    def tails(self) -> tuple[list[str], list[str]]:
        """The texts of the last accepted and the last rejected candidates."""
        told = [[row["text"] for row in self.rows if row["accepted"] == kind][-TAIL:] for kind in (True, False)]
        return told[0], told[1]

    def take(self, candidates: list[Candidate] | None, turn: int) -> None:
        """Guard and decide one turn; while λ is not known, only collect."""
        self.waiting += [self._row(candidate, turn) for candidate in candidates or ()]
        usable = sum(not row["reason"] for row in self.waiting)
        if self.threshold is None and candidates is not None and usable < self.settings.sample and not self._late():
            return
        self._decide(self.waiting)
        self.waiting = []
        if candidates is None:
            self.stopped = self.stopped or "nothing left"

    def _late(self) -> bool:
        return len(self.waiting) >= self.settings.count * self.settings.max_ratio

    def _row(self, candidate: Candidate, turn: int) -> dict:
        uid = prompt_uid(self.namespace, self.words.name, candidate.text)
        return dict.fromkeys(COLUMNS) | {
            "prompt_uid": uid, "class_id": self.label, "class_name": self.words.name, "text": candidate.text,
            "slots": candidate.slots_json(), "round": turn, "cand_idx": candidate.index, "proposer": self.proposer,
            "accepted": False, "max_sim": np.nan, "cls_sim": np.nan,
            "reason": guard(candidate.text, self.words, self.others) or "",
        }

    def _apart(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors in which distances between prompts are taken."""
        if self.settings.centre == "none":
            return vectors
        moved = vectors - self.anchor
        return (moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-6)).astype(np.float32)

    def _decide(self, rows: list[dict]) -> None:
        """Decide rows in order; those after the one at which the bank stops are dropped."""
        named = [row for row in rows if not row["reason"]]
        vectors = self.embed([row["text"] for row in named]) if named else self.vectors[:0]
        near = (vectors @ self.anchor.T)[:, 0] if named else np.empty(0)
        for row, cosine in zip(named, near, strict=True):
            row["cls_sim"] = float(cosine)
            row["reason"] = "far from the class" if cosine < self.settings.lam_cls else ""
        fit = np.array([not row["reason"] for row in named], dtype=bool)
        self._choose([row for row in named if not row["reason"]], self._apart(vectors[fit]))
        for row in rows:
            row["lam_div"] = self.threshold
        self._finish(rows)

    def _choose(self, rows: list[dict], vectors: np.ndarray) -> None:
        if self.threshold is None:
            sample = vectors[: self.settings.sample]
            self.threshold = calibrate_threshold(sample, self.settings.acceptance)
        uids = [row["prompt_uid"] for row in self.rows if row["accepted"]]
        chosen = choose_distinct(vectors, self.threshold, self.vectors, self.settings.block, self.settings.count)
        for i, row in enumerate(rows[: len(chosen.accepted)]):
            accepted, nearest = bool(chosen.accepted[i]), int(chosen.nearest[i])
            row |= {"accepted": accepted, "reason": "accepted" if accepted else "too near",
                    "max_sim": float(chosen.similarity[i]), "nn_uid": uids[nearest] if nearest >= 0 else None}
            uids += [row["prompt_uid"]] if accepted else []
        self.vectors = chosen.bank

    def _finish(self, rows: list[dict]) -> None:
        before = len(self.rows)
        self.rows += rows
        end, self.stopped = stopped_at([row["accepted"] for row in self.rows], self.settings)
        lost = sum(row["accepted"] for row in self.rows[max(end, before):])
        self.rows = self.rows[:end]
        self.vectors = self.vectors[: len(self.vectors) - lost]


def stopped_at(accepted: Sequence[bool], settings: PromptSettings) -> tuple[int, str]:
    """How many candidates count, and which rule ended the bank there ("" when none has)."""
    flags = np.asarray(accepted, dtype=np.int64)
    total = np.concatenate([[0], np.cumsum(flags)])
    tried = np.arange(len(flags) + 1)
    recent = total - total[np.maximum(tried - settings.window, 0)]
    rules = (total >= settings.count, (tried >= settings.window) & (recent < settings.stall_rate * settings.window),
             tried >= settings.max_ratio * settings.count)
    ends = [int(np.argmax(rule)) if rule.any() else len(flags) + 1 for rule in rules]
    first = min(ends)
    return (first, STOPS[ends.index(first)]) if first <= len(flags) else (len(flags), "")
