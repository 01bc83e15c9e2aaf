"""Prepare: a dataset's root becomes checked frames in the store; its test split becomes a frozen exam.

A frame that is corrupt, mismatched or without its label is quarantined with the reason; the others go on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.datasets.base import Dataset, Item, Picture, check_folds, frame_id, open_dataset, pictures, stem_of
from models.datasets.reading import IGNORE, read_visible
from models.episode import EpisodeSettings, class_index, exam, kept_counts, to_rows
from models.errors import BadSample, UsageError
from models.frames import Frames, layer_name, png_bytes
from tasks import places
from tasks.contents import contents
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Ref, digest_of

LAYERS = ("infrared", "visible", "label")


@dataclass(frozen=True)
class DataSettings:
    """Which data.

    dataset: a name of the table, or "module:attribute". root: its folder, absolute or under $THERMOFUSE_DATA, where it
    is looked for by the dataset's name by default. fold: the one to run, or None for every fold. folds: novel class
    names of each fold, instead of the dataset's own. options: keyword arguments of the dataset. limit: only the first
    frames of each split. unpaired_visible: a folder of RGB pictures that show no frame of this dataset; they become the
    split "visible".
    """

    dataset: str = "toy"
    root: str | None = None
    fold: int | None = None
    folds: tuple[tuple[str, ...], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    unpaired_visible: str | None = None


@stage("prepare")
def prepare(data: DataSettings, compute: Compute) -> Ref:
    """Read, check and store every frame; the Ref is of kind "frames".

    Raises UsageError when the data is not where it should be, StageFailed when too many frames are unusable.
    """
    dataset = open_data(data)
    items = _first(dataset.items(), data.limit)
    if not items:
        raise UsageError(f"{dataset.name} lists no frames; put some in its folder, or name another root.")
    rows = _rows(items, getattr(dataset, "root", None), unpaired=False)
    rows += _unpaired_rows(data)
    settings = replace(data, fold=None, limit=None)  # neither changes what is read from a row
    code = ("tasks.prepare", "models.frames", "models.datasets", type(dataset).__module__)
    return fan_out(Reader, rows, settings, compute, kind="frames", inputs=[], code=code, meta=_info(dataset, data))


@stage("freeze_episodes")
def freeze_episodes(frames: Ref, settings: EpisodeSettings, data: DataSettings) -> Ref:
    """Draw the exam of the fold, or of all folds, once and for all; the Ref is of kind "episodes", its rows the list.

    Raises UsageError when a class has too few frames, or the fold does not exist.
    """
    store = places.store()
    digest = digest_of("episodes", [frames], {"settings": settings, "fold": data.fold}, ("models.episode",))
    if found := store.find("episodes", digest):
        return found
    opened = open_frames(frames)
    folds = chosen_folds(frames, data)
    episodes = [key for fold in folds for key in exam(opened, fold, settings)]
    if not episodes:
        raise UsageError(f"{opened.dataset} has no folds to examine; name some classes or choose other data.")
    meta = {"dataset": opened.dataset, "settings": asdict(settings), "folds": list(folds)}
    meta["frames_kept_for_training"] = {str(fold): kept_counts(opened, fold) for fold in folds}
    meta["frames_of_class"] = _frames_of_class(opened, settings)
    return store.draft("episodes", digest).commit(to_rows(opened, episodes), meta)


def chosen_folds(frames: Ref, data: DataSettings) -> tuple[int, ...]:
    """The folds to run: the one of the settings, or all that the dataset has."""
    return tuple(range(len(open_frames(frames).folds))) if data.fold is None else (data.fold,)


def open_frames(ref: Ref) -> Frames:
    """The frames behind a Ref of kind "frames", on local disk."""
    return Frames.open(places.store().local(ref))


def open_data(data: DataSettings) -> Dataset:
    """The dataset of the settings, with its root found. Raises UsageError when it is not there."""
    folder = None
    if data.dataset != "toy" or data.root is not None:
        folder = _under_data_root(data.root or data.dataset.rpartition(":")[2].lower())
    return open_dataset(data.dataset, folder, dict(data.options))


def _under_data_root(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.is_absolute() else places.data_root() / path


def _first(items: Sequence[Item], limit: int | None) -> list[Item]:
    splits = {item.split: [other for other in items if other.split == item.split] for item in items}
    return [item for split in splits.values() for item in split[:limit]]


def _rows(items: Sequence[Item], root: Path | None, unpaired: bool) -> list[dict]:
    """Each item, and which bytes its layers have: None where there is no file."""
    files = [[root / name if root and name else None for name in (getattr(item, layer) for layer in LAYERS)]
             for item in items]
    found = contents(path for layers in files for path in layers if path)
    return [asdict(item) | {"content": [found.get(path) for path in layers], "unpaired": unpaired}
            for item, layers in zip(items, files, strict=True)]


def _unpaired_rows(data: DataSettings) -> list[dict]:
    if data.unpaired_visible is None:
        return []
    root = _under_data_root(data.unpaired_visible)
    names = [name for found in pictures(root, ".").values() for name in found]
    if not names:
        raise UsageError(f"There are no pictures in {root}; put RGB pictures there, or leave unpaired_visible out.")
    items = [Item("unpaired__" + frame_id(stem_of(name)), "visible", visible=name) for name in sorted(names)]
    return _rows(items[: data.limit], root, unpaired=True)


def _info(dataset: Dataset, data: DataSettings) -> dict[str, Any]:
    folds = dataset.folds if data.folds is None else data.folds
    check_folds(dataset.classes, folds, dataset.ignored)
    facts = ("classes", "palette", "ignored", "homepage", "citation")
    return {"dataset": dataset.name, "folds": folds} | {fact: getattr(dataset, fact) for fact in facts}


def _frames_of_class(frames: Frames, settings: EpisodeSettings) -> dict[str, int]:
    asked = sorted({label for fold in range(len(frames.folds)) for label in frames.novel(fold)})
    index = class_index(frames, asked, settings.min_pixels, settings.split)
    return {frames.class_name(label): len(ids) for label, ids in index.items()}


class Reader:
    """The worker of `prepare`: one dataset, opened once; a shard is some of its items."""

    def __init__(self, settings: DataSettings, inputs: Sequence[Path]) -> None:
        self.dataset = open_data(settings)
        self.unpaired = _under_data_root(settings.unpaired_visible) if settings.unpaired_visible else None

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self._prepare(row, draft) for row in shard]

    def _prepare(self, row: dict, draft: Any) -> dict:
        try:
            picture = self._read(row)
        except BadSample as reason:
            return {"id": row["id"], "error": str(reason)}
        return {"id": row["id"], "split": row["split"]} | _write(row["id"], picture, draft) | _facts(picture)

    def _read(self, row: dict) -> Picture:
        if row["unpaired"]:
            return Picture(visible=read_visible(self.unpaired / row["visible"]))
        return self.dataset.read(Item(*(row[name] for name in ("id", "split", *LAYERS))))


def _write(id: str, picture: Picture, draft: Any) -> dict[str, str | None]:
    """Store the layers of a picture; returns layer -> file name, None where there is none."""
    names: dict[str, str | None] = {}
    for layer in LAYERS:
        pixels = getattr(picture, layer)
        names[layer] = None if pixels is None else layer_name(id, layer)
        if pixels is not None:
            draft.write(names[layer], png_bytes(pixels))
    return names


def _facts(picture: Picture) -> dict[str, Any]:
    """Size, sha256 of the pixels, and pixels of each class."""
    present = [layer for name in LAYERS if (layer := getattr(picture, name)) is not None]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(layer).tobytes() for layer in present)).hexdigest()
    labels, counts = np.unique([] if picture.label is None else picture.label, return_counts=True)
    classes = {int(label): int(count) for label, count in zip(labels, counts, strict=True) if label not in (0, IGNORE)}
    height, width = present[0].shape[:2]
    return {"height": height, "width": width, "sha256": digest, "classes": json.dumps(classes)}
