"""Prompts from a chat model behind any OpenAI-compatible endpoint, each reply kept under the digest of its question.

Language models cannot be replayed, so the kept replies are what makes a bank repeatable: with the same folder no
question is asked twice, and a finished bank needs no network (Syn4Seg spec §1.2).
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from models.errors import StageFailed, UsageError
from models.generators.grammar import Candidate
from models.generators.words import ClassWords

SYSTEM = (
    "You write captions of photographs for a dataset. Each caption is one plain sentence of at most 40 words that "
    "names the asked object once and says what surrounds it, from where it is seen, and in which light. Prefer scenes "
    "with several things in them. Vary everything but the object. Answer with a JSON list of strings and nothing else."
)
NUMBER = re.compile(r"^\s*(?:[-*•]|\d+[.):])?\s*")


class Chat:
    """url: up to and including /v1. model: its name there. folder: where replies are kept. seed: sent along, and part
    of the digest. key: the bearer token, if the endpoint wants one. retries: of a busy or failing server."""

    name = "chat"

    def __init__(
        self, url: str, model: str, folder: Path | str, seed: int = 0, key: str | None = None, timeout: float = 120,
        retries: int = 3, temperature: float = 1.0,
    ) -> None:
        self.url, self.model, self.folder, self.seed, self.key = url.rstrip("/"), model, Path(folder), seed, key
        self.timeout, self.retries, self.temperature = timeout, retries, temperature

    def propose(
        self, words: ClassWords, count: int, turn: int, accepted: Sequence[str] = (), rejected: Sequence[str] = (),
    ) -> list[Candidate] | None:
        """Captions of one turn, numbered from turn · count on. None when the model has nothing more to say."""
        lines = captions(self.reply(question(words, count, accepted, rejected), turn))[:count]
        return [Candidate(text, turn * count + i) for i, text in enumerate(lines)] or None

    def reply(self, prompt: str, turn: int) -> str:
        """The text of one reply, from the folder or else from the endpoint."""
        digest = sha256("|".join((self.model, SYSTEM, prompt, str(self.seed), str(turn))).encode()).hexdigest()
        path = self.folder / f"{digest}.json"
        if not path.is_file():
            _write(path, self._ask(prompt, turn))
        try:
            return json.loads(path.read_bytes())["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            path.unlink()
            raise StageFailed(f"{self.url} gave no chat completion ({error!r}); check its path.") from None

    def _ask(self, prompt: str, turn: int) -> bytes:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "seed": self.seed + turn, "temperature": self.temperature}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    raise UsageError(f"{self.url} refuses the question ({reason}); check model and key.") from error
            except OSError as error:
                reason = str(getattr(error, "reason", error))
            time.sleep(0.2 * 4**attempt if attempt + 1 < self.retries else 0)
        raise StageFailed(f"{self.url} does not answer ({reason}); start it, or use the grammar as proposer.")


def question(words: ClassWords, count: int, accepted: Sequence[str], rejected: Sequence[str]) -> str:
    """What is asked in one turn: the class, what was good, what was too near to it."""
    meaning = f" ({words.gloss})" if words.gloss else ""
    parts = [f'Write {count} captions of scenes with "{words.noun}"{meaning}; use that very word.']
    if accepted:
        parts.append("Already used, so write something else:\n" + "\n".join(accepted))
    if rejected:
        parts.append("Turned down as unfit or too similar:\n" + "\n".join(rejected))
    return "\n\n".join(parts)


def captions(reply: str) -> list[str]:
    """The captions of a reply: a JSON list, in a code fence or not, or else one a line, numbered or not."""
    text = re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", reply)
    try:
        listed = json.loads(text)
    except ValueError:
        listed = [NUMBER.sub("", line).strip().strip('"') for line in text.splitlines()]
    listed = listed if isinstance(listed, list) else []
    return [" ".join(item.split()) for item in listed if isinstance(item, str) and item.strip()]


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(data)
    os.replace(part, path)
