"""Predict: one infrared picture and a few examples in, a mask out, with a registered model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import BadSample, UsageError
from tasks.blobs import write_file
from tasks.register import Version, find_version, known_version, load, names

if TYPE_CHECKING:
    import numpy as np


def predict(
    image: Path, supports: Sequence[str], out: Path, *, model: str | None = None, version: int | None = None,
    fold: int | None = None,
) -> float:  # fmt: skip
    """Write the mask of `image` to `out` (PNG of 0 and 255) and return the share of pixels in it, 0..1.

    Args:
        supports: `IMAGE:MASK` paths; mask values above 0 are the class.
        model, version: what is registered; the only model, and its champion, by default.
        fold: whose learners answer; None lets the model choose.

    Raises UsageError for files, names or sizes that do not fit, and for pictures that cannot be read.
    """
    import numpy as np

    from models.frames import png_bytes

    if not supports:
        raise UsageError("Nothing shows what to look for; give --support IMAGE:MASK at least once.")
    chosen = choose(model, version)
    pairs = [_pair(support) for support in supports]
    if len({mask.shape for _, mask in pairs}) > 1:
        raise UsageError("The support pictures differ in size; give pictures of one size.")
    inputs = {
        "query": _grey(image),
        "support": np.stack([picture for picture, _ in pairs]),
        "support_mask": np.stack([mask for _, mask in pairs]),
    }
    mask = load(chosen).predict(inputs, params={"fold": -1 if fold is None else fold})["mask"]
    write_file(out, png_bytes((mask * 255).astype(np.uint8)))
    return float(mask.mean())


def choose(model: str | None, version: int | None) -> Version:
    """The version to use. Raises UsageError that lists the models or says that there is no champion."""
    known = names()
    if model is None and len(known) != 1:
        say = f"choose one of {', '.join(known)} with --model" if known else "register one with thermofuse run"
        raise UsageError(f"There are {len(known)} registered models; {say}.")
    model = model or known[0]
    if version is not None:
        return known_version(model, version)
    champion = find_version(model)
    if champion is None:
        raise UsageError(f"{model} has no champion; name a version with --version, or one of {', '.join(known)}.")
    return champion


def _pair(support: str) -> tuple:
    """A picture and its mask, uint8 [H, W] both; the mask of 0 and 1."""
    import numpy as np

    from models.datasets.reading import open_image

    picture, colon, mask = support.rpartition(":")
    if not colon or not picture:
        raise UsageError(f"{support!r} is no pair; write --support IMAGE:MASK.")
    with _readable():
        pixels, marked = _grey(Path(picture)), np.asarray(open_image(Path(mask)).convert("L")) > 0
    if pixels.shape != marked.shape:
        raise UsageError(f"{mask} is {marked.shape} and {picture} {pixels.shape}; give a mask of the picture's size.")
    if not marked.any():
        raise UsageError(f"{mask} marks nothing; paint the class with any value above 0.")
    return pixels, marked.astype(np.uint8)


def _grey(path: Path) -> np.ndarray:
    import numpy as np

    from models.datasets.reading import read_infrared

    with _readable():
        return np.array(read_infrared(path))


@contextmanager
def _readable() -> Iterator[None]:
    """One picture that somebody named is no frame among many to be passed over."""
    try:
        yield
    except BadSample as error:
        raise UsageError(f"A picture cannot be used: {error}; give another one.") from error
