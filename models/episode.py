"""Few-shot episodes: which frames are asked about, which show the class, and what training may see.

An episode asks for one class in one query frame, shown by K support frames with masks. Every draw goes through blake2b
of what it is about (seed, query, class), never through a random state, so that a list is the same for any number of
workers, any order of asking, and any version of anything.

Protocol: BAM (Lang et al., CVPR 2022) walks 1,000 queries; here `exhaustive` asks every (query, class) pair.
Legend: B episodes, K supports, V streams, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd

from models.errors import UsageError
from models.frames import Frames

if TYPE_CHECKING:  # the workers that only read frames start without torch
    import torch

IGNORE = 255
POLICIES = ("ignore", "background", "drop")
PROTOCOLS = ("exhaustive", "bam1000")
T = TypeVar("T")


@dataclass(frozen=True)
class EpisodeSettings:
    """How an exam is drawn.

    shots: K. min_pixels: a frame counts for a class from this many pixels at native resolution (BAM: 2048 at 473x473).
    protocol: "exhaustive" or "bam1000". seeds: one list per seed. queries: episodes of one bam1000 list.
    """

    shots: int = 1
    min_pixels: int = 100
    protocol: str = "exhaustive"
    seeds: tuple[int, ...] = (510,)
    split: str = "test"
    queries: int = 1000


@dataclass(frozen=True)
class EpisodeKey:
    """One episode by name. fold is -1 in training; supports never hold the query."""

    fold: int
    label: int
    query: str
    supports: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Episode:
    """A batch of episodes as tensors.

    query float [B,V,3,H,W] and support float [B,K,V,3,H,W], 0..1; support_mask uint8 [B,K,H,W] and
    query_mask uint8 [B,H,W], 0 | 1 | 255 ignore; episode_class long [B], the id of the asked class.
    """

    query: torch.Tensor
    support: torch.Tensor
    support_mask: torch.Tensor
    query_mask: torch.Tensor
    episode_class: torch.Tensor

    def to(self, device: torch.device | str) -> Episode:
        return Episode(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


# ---- drawing


def number(*key: object) -> int:
    """A number below 2**64 that depends on `key` alone."""
    return int.from_bytes(blake2b("|".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def draw(candidates: Sequence[T], count: int, *key: object) -> list[T]:
    """`count` of `candidates` without replacement, decided by `key`."""
    left = list(candidates)
    return [left.pop(number(*key, turn) % len(left)) for turn in range(count)]


def class_index(
    frames: Frames, classes: Iterable[int], min_pixels: int = 1, split: str = "train", ids: Iterable[str] | None = None
) -> dict[int, list[str]]:
    """Class id -> ids of the frames of `split` (or of `ids`) that hold at least `min_pixels` of it, in table order."""
    candidates = [id for id in (frames.ids(split) if ids is None else ids) if frames.has(id, "label")]
    return {
        label: [id for id in candidates if frames.pixels(id).get(label, 0) >= max(min_pixels, 1)] for label in classes
    }


def check_enough(frames: Frames, index: Mapping[int, Sequence[str]], shots: int, min_pixels: int) -> None:
    """Raises UsageError when a class has fewer than `shots` + 1 frames: one to ask and `shots` to show."""
    for label, ids in index.items():
        if len(ids) <= shots:
            raise UsageError(
                f"Class {frames.class_name(label)!r} of {frames.dataset} has {len(ids)} frames with {min_pixels} "
                f"pixels or more and {shots}-shot episodes need {shots + 1}; "
                "use fewer shots, fewer min_pixels, or other folds."
            )


# ---- exams


def exhaustive(
    frames: Frames, classes: Iterable[int], shots: int, min_pixels: int, seed: int, split: str = "test", fold: int = -1
) -> list[EpisodeKey]:
    """Every (query, class) pair of `split` once, queries in table order.

    Raises UsageError naming a class that has too few frames.
    """
    index = class_index(frames, sorted(classes), min_pixels, split)
    check_enough(frames, index, shots, min_pixels)
    members = {label: set(ids) for label, ids in index.items()}
    pairs = ((query, label) for query in frames.ids(split) for label in index if query in members[label])
    return [_episode(index, label, query, shots, seed, fold, (seed, query, label)) for query, label in pairs]


def bam1000(
    frames: Frames,
    classes: Iterable[int],
    shots: int,
    min_pixels: int,
    seed: int,
    split: str = "test",
    fold: int = -1,
    queries: int = 1000,
) -> list[EpisodeKey]:
    """The protocol of BAM: walk the query list, over and over, until `queries` episodes are drawn.

    As published, a query needs `min_pixels` of one class, but the class asked is any that it holds, however small.
    """
    index = class_index(frames, sorted(classes), min_pixels, split)
    check_enough(frames, index, shots, min_pixels)
    eligible = {id for ids in index.values() for id in ids}
    listed = [id for id in frames.ids(split) if id in eligible]
    episodes = []
    for turn in range(queries):
        walk, place = divmod(turn, len(listed))
        query = listed[place]
        present = [label for label in index if frames.pixels(query).get(label, 0)]
        label = draw(present, 1, seed, query, walk)[0]
        episodes.append(_episode(index, label, query, shots, seed, fold, (seed, query, label, walk)))
    return episodes


def _episode(index, label, query, shots, seed, fold, key) -> EpisodeKey:
    others = [id for id in index[label] if id != query]
    return EpisodeKey(fold, label, query, tuple(draw(others, shots, *key)), seed)


def exam(
    frames: Frames, fold: int, settings: EpisodeSettings, classes: Iterable[int] | None = None
) -> list[EpisodeKey]:
    """All episodes of one fold over all seeds; `classes` stands in for the novel ones (held-out base classes)."""
    if settings.protocol not in PROTOCOLS:
        raise UsageError(f"There is no protocol {settings.protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
    classes = frames.novel(fold) if classes is None else tuple(classes)
    episodes: list[EpisodeKey] = []
    for seed in settings.seeds:
        shared = (frames, classes, settings.shots, settings.min_pixels, seed, settings.split, fold)
        drawn = exhaustive(*shared) if settings.protocol == "exhaustive" else bam1000(*shared, settings.queries)
        episodes.extend(drawn)
    return episodes


def to_rows(frames: Frames, episodes: Sequence[EpisodeKey]) -> pd.DataFrame:
    """Episodes as a table: episode, fold, label, query, supports, seed, height, width (of the query, pixels)."""
    records = [
        {"episode": number, "fold": key.fold, "label": key.label, "query": key.query, "supports": list(key.supports)}
        | {"seed": key.seed, "height": frames.size(key.query)[0], "width": frames.size(key.query)[1]}
        for number, key in enumerate(episodes)
    ]
    columns = ["episode", "fold", "label", "query", "supports", "seed", "height", "width"]
    return pd.DataFrame(records, columns=columns)


def from_rows(rows: pd.DataFrame) -> list[EpisodeKey]:
    """The inverse of `to_rows`."""
    return [
        EpisodeKey(int(row["fold"]), int(row["label"]), row["query"], tuple(row["supports"]), int(row["seed"]))
        for row in rows.to_dict("records")
    ]


# ---- training


def sample_training_episode(
    frames_index: Mapping[int, Sequence[str]], classes: Sequence[int], shots: int, seed: int, step: int
) -> EpisodeKey:
    """One training episode, a pure function of (seed, step). For batches of B, pass step * B + place.

    frames_index: from `class_index` over base classes, built once. Classes are drawn evenly, so that a rare class is
    trained as often as a common one; those with fewer than K + 1 frames are passed over.
    """
    usable = [label for label in classes if len(frames_index[label]) > shots]
    if not usable:
        raise UsageError(
            f"No base class has {shots + 1} frames for {shots}-shot training; use fewer shots or min_pixels."
        )
    label = draw(usable, 1, seed, step, "class")[0]
    query, *supports = draw(frames_index[label], shots + 1, seed, step, label)
    return EpisodeKey(-1, label, query, tuple(supports), seed)


def split_base_for_validation(
    frames: Frames, fold: int, count: int, seed: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(base classes to train on, `count` base classes held out for model selection); never a novel class.

    Only classes with at least two training frames can be held out. Raises UsageError when too few base classes exist.
    """
    base = frames.base(fold)
    index = class_index(frames, base)
    possible = [label for label in base if len(index[label]) >= 2]
    if count > len(possible) or count >= len(base):
        raise UsageError(f"Fold {fold} has {len(base)} base classes; hold out fewer than {count}.")
    held_out = tuple(sorted(draw(possible, count, seed, fold, "held out")))
    return tuple(label for label in base if label not in held_out), held_out


def train_label(label: np.ndarray, novel: Iterable[int], policy: str) -> np.ndarray:
    """A label map [H,W] as training may see it: novel ids become 255 ("ignore", "drop") or 0 ("background")."""
    check_policy(policy)
    seen = label.copy()
    seen[np.isin(label, list(novel))] = 0 if policy == "background" else IGNORE
    return seen


def kept_for_training(
    frames: Frames, fold: int, policy: str, split: str = "train", held_out: Iterable[int] = ()
) -> list[str]:
    """Ids of the labelled frames to train on. "drop" leaves out every frame with a novel (or held-out) pixel."""
    check_policy(policy)
    labelled = [id for id in frames.ids(split) if frames.has(id, "label")]
    if policy != "drop":
        return labelled
    hidden = {*frames.novel(fold), *held_out}
    return [id for id in labelled if hidden.isdisjoint(frames.pixels(id))]


def kept_counts(frames: Frames, fold: int, split: str = "train") -> dict[str, int]:
    """Policy -> number of training frames kept in this fold; worth reporting, as "drop" may leave almost none."""
    return {policy: len(kept_for_training(frames, fold, policy, split)) for policy in POLICIES}


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise UsageError(f"There is no policy {policy!r} for novel classes in training; choose {', '.join(POLICIES)}.")
