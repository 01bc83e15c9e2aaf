"""Shots: which frames show each novel class, and which are asked about; small enough to travel as plain lists."""

from __future__ import annotations

from dataclasses import dataclass

from models.shots import PUBLISHED_PIXELS, draw_supports, remaining_queries
from tasks.prepare import open_frames
from tasks.store import Ref


@dataclass(frozen=True)
class ShotSettings:
    """shots: K. seeds: one list of supports each. min_pixels: of the class in a support. split: where supports come
    from, "train" (CAPL, POP) or "test" (DIaM; they are no queries then). alone: no other novel class in a support."""

    shots: int = 1
    seeds: tuple[int, ...] = (123, 321, 456, 654, 999)
    min_pixels: int = PUBLISHED_PIXELS
    split: str = "train"
    alone: bool = False


def choose_supports(frames: Ref, settings: ShotSettings, fold: int, seed: int) -> dict[int, tuple[str, ...]]:
    """Novel class -> ids. Raises UsageError naming a class without a fitting frame."""
    opened = open_frames(frames)
    chosen = settings.shots, seed, settings.min_pixels, settings.split, settings.alone
    return draw_supports(opened, opened.novel(fold), *chosen)


def choose_queries(frames: Ref, supports: dict[int, tuple[str, ...]]) -> list[str]:
    """The labelled test frames that support nothing."""
    return remaining_queries(open_frames(frames), supports)
