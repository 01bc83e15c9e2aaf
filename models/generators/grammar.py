"""Prompts from slots: every combination once, in an order that looks random and needs no memory (Syn4Seg spec §1.2).

Candidate i of a class is the combination j = (a · i + b) mod N, gcd(a, N) = 1, written in the mixed radix of the slots;
a and b come from blake2b of (seed, class). So a list can be cut anywhere and goes on from its last index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import gcd, prod

from models.errors import UsageError
from models.generators.words import INDOOR, OUTDOOR, VOCABULARIES, ClassWords, class_words, plural, with_article


@dataclass(frozen=True)
class Candidate:
    """A prompt that was proposed: its text, the phrase of each slot, and its index in the order of its class."""

    text: str
    index: int
    slots: dict[str, str] = field(default_factory=dict)

    def slots_json(self) -> str:
        return json.dumps(self.slots, sort_keys=True)


class Grammar:
    """Proposes combinations of phrases. vocabulary: "photograph", "thermal" or "drawn" (toy scenes).

    companions: names of classes that may be in the scene, too; base classes, never novel ones. At most ten are used;
    drawn scenes have none, as the toy pipeline has learnt one thing at a time.
    """

    name = "grammar"

    def __init__(self, vocabulary: str = "photograph", seed: int = 0, companions: Sequence[str] = ()) -> None:
        if vocabulary not in VOCABULARIES:
            raise UsageError(f"There is no vocabulary {vocabulary!r}; choose one of {', '.join(VOCABULARIES)}.")
        self.vocabulary, self.seed = VOCABULARIES[vocabulary], seed
        self.companions = [class_words(name).noun for name in companions][:10]

    def slots(self, words: ClassWords) -> dict[str, tuple[str, ...]]:
        """The phrases of each slot for one class, in the order of the mixed radix."""
        if self.vocabulary.name == "drawn":
            return dict(self.vocabulary.slots)
        nouns = ("", *(noun for noun in self.companions if noun != words.noun))
        own = {"kind": words.kinds[:12], "state": words.states[:10], "companion": nouns}
        return own | self.vocabulary.slots | self._place(words)

    def _place(self, words: ClassWords) -> dict[str, tuple[str, ...]]:
        """Scenes where the class may be; under a roof there is one weather."""
        rooms, scenes = self.vocabulary.indoor, self.vocabulary.slots["scene"]
        if words.place == INDOOR:
            return {"scene": rooms, "weather": (self.vocabulary.calm,)}
        return {"scene": tuple(s for s in scenes if words.place != OUTDOOR or s not in rooms)}

    def size(self, words: ClassWords) -> int:
        """N: all combinations, plausible or not."""
        return prod(len(phrases) for phrases in self.slots(words).values())

    def propose(
        self, words: ClassWords, count: int, turn: int, accepted: Sequence[str] = (), rejected: Sequence[str] = (),
    ) -> list[Candidate] | None:
        """The plausible ones among the candidates turn · count ... (turn + 1) · count - 1; None past the last one."""
        slots = self.slots(words)
        total = prod(len(phrases) for phrases in slots.values())
        if turn * count >= total:
            return None
        step, start = self._order(words.name, total)
        places = range(turn * count, min((turn + 1) * count, total))
        drawn = ((i, _decode((step * i + start) % total, slots)) for i in places)
        return [Candidate(self.text(words, choice), i, choice) for i, choice in drawn if self.plausible(choice)]

    def plausible(self, choice: dict[str, str]) -> bool:
        """No rain under a roof."""
        calm = choice.get("weather", self.vocabulary.calm) == self.vocabulary.calm
        return calm or choice["scene"] not in self.vocabulary.indoor

    def text(self, words: ClassWords, choice: dict[str, str]) -> str:
        """The sentence of one combination."""
        kind = choice.get("kind", words.noun)
        count = choice.get("count", "one")
        parts = dict(choice) | {"subject": with_article(kind) if count == "one" else f"{count} {plural(kind)}"}
        if companion := choice.get("companion"):
            parts["companion"] = f"with {with_article(companion)} nearby, "
        return self.vocabulary.template.format_map(parts)

    def _order(self, name: str, total: int) -> tuple[int, int]:
        """(a, b) of the class: a without a common divisor with N."""
        digest = blake2b(f"{self.seed}|{name}".encode(), digest_size=16).digest()
        step, start = int.from_bytes(digest[:8], "big") % total, int.from_bytes(digest[8:], "big") % total
        step = max(step, 1)
        while gcd(step, total) != 1:
            step += 1
        return step, start


def _decode(place: int, slots: dict[str, tuple[str, ...]]) -> dict[str, str]:
    choice = {}
    for slot, phrases in slots.items():
        place, digit = divmod(place, len(phrases))
        choice[slot] = phrases[digit]
    return choice


def caption(names: Sequence[str], dark: bool, ground: str = "", thing: str = "") -> str:
    """The words of a drawn scene that shows `names`, in that order; the tints of its ground and of the things may be
    told. Of one name, what the "drawn" vocabulary also says, but for the thing's tint: the pipeline knows what colours
    a class has. Asked for any colour, it draws what the judge turns down and SAM does not find."""
    shown = " and ".join(_tinted(class_words(name).noun, thing) for name in names) or "nothing"
    return " ".join(filter(None, (shown, "on", "dark" if dark else "bright", ground, "ground")))


def _tinted(noun: str, tint: str) -> str:
    return with_article(f"{tint} {noun}".strip())
