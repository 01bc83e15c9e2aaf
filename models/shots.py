"""The K supports of each novel class, and the frames that remain to be asked (Syn4Seg spec §4.2).

Published lists ask for 16,384 pixels of the class in the original mask, repeat frames where there are fewer than K, and
take supports from the training set (CAPL, POP) or from the test set (DIaM, BCM; then they are no queries). Draws go
through blake2b of (seed, class), so a list is the same everywhere, and K shots contain the shots of any smaller K.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from models.episode import class_index, draw
from models.errors import UsageError
from models.frames import Frames

PUBLISHED_PIXELS = 16 * 32 * 32


def draw_supports(
    frames: Frames, novel: Iterable[int], shots: int, seed: int, min_pixels: int = PUBLISHED_PIXELS,
    split: str = "train", alone: bool = False,
) -> dict[int, tuple[str, ...]]:
    """Novel class -> ids of its K supports. alone: only frames that hold no other novel class (DIaM).

    Raises UsageError naming a class without any fitting frame.
    """
    novel = tuple(sorted(novel))
    supports = {}
    for k, ids in class_index(frames, novel, min_pixels, split).items():
        if alone:
            ids = [id for id in ids if not set(novel) - {k} & set(frames.pixels(id))]
        if not ids:
            raise UsageError(
                f"Class {frames.class_name(k)!r} of {frames.dataset} has no {split} frame with {min_pixels} pixels; "
                "lower min_pixels or choose another fold."
            )
        order = draw(ids, min(shots, len(ids)), seed, k, "support")
        supports[k] = tuple(order[n % len(order)] for n in range(shots))
    return supports


def remaining_queries(frames: Frames, supports: Mapping[int, Sequence[str]], split: str = "test") -> list[str]:
    """The labelled frames of a split that support nothing."""
    taken = {id for ids in supports.values() for id in ids}
    return [id for id in frames.ids(split) if id not in taken and frames.has(id, "label")]
