"""Fuse pairs: every frame of a dataset in parallel, or a person's own folder here and now."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from models.errors import BadSample, UsageError
from models.frames import Frames, layer_name, png_bytes, read_png
from models.fusers.settings import FuserSettings, MaskSettings
from tasks import places, progress
from tasks.blobs import write_file
from tasks.cells import Cell, side_by_side
from tasks.fanout import Compute, fan_out
from tasks.fit_fuser import CODE as FITTED
from tasks.fit_fuser import fit_fuser, found_masks
from tasks.stage import stage
from tasks.store import Ref
from tasks.synthesise import image_seed

if TYPE_CHECKING:
    import numpy as np

KIND, LAYER = "fused", "fused"
CODE = (*FITTED, "tasks.fuse")


class Fused(NamedTuple):
    """Pictures of kind "fused" and the fuser that made them."""

    pictures: Ref
    fuser: Ref


def fuse_night(
    frames: Ref, synthetic: Ref, settings: FuserSettings | None, folds: Sequence[int], compute: Compute
) -> Fused | None:
    """Fit a fuser on the train split and fuse every frame that has a pair; None when no settings ask for it."""
    if settings is None:
        return None
    translated = None if settings.visible == "visible" else synthetic
    fuser = fit_fuser(frames, settings, folds, compute, translated)
    return Fused(fuse(frames, fuser, settings, compute, translated), fuser)


@stage("fuse")
def fuse(frames: Ref, fuser: Ref, settings: FuserSettings, compute: Compute, synthetic: Ref | None = None) -> Ref:
    """Rows id, split, fused (the file), and the fusion metrics by name; frames that lack one of the pair are left out.

    `settings.visible` names the visible picture: "visible" is the real one, anything else a layer of `synthetic`.
    Raises UsageError when no frame has a pair.
    """
    rows, told = _question(frames, settings, synthetic)
    inputs = [frames, fuser, *([synthetic] if synthetic is not None else [])]
    return fan_out(Fuse, rows, told, compute, kind=KIND, inputs=inputs, code=CODE)


@stage("fuse_by")
def fuse_by(
    frames: Ref, fusers: Mapping[str, Ref], settings: Mapping[str, FuserSettings], compute: Compute
) -> dict[str, Ref]:
    """Name -> what `fuse` gives for that name's fuser and settings; side by side, one actor each."""
    cells = []
    for name, fuser in fusers.items():
        rows, told = _question(frames, settings[name], None)
        asked = {"settings": told, "rows": rows, "extra": None}  # the same question as a fan-out's
        cells.append(Cell(name, KIND, f"{__name__}:fuse_one", asked, (frames, fuser), CODE))
    return side_by_side(cells, compute)


def fuse_one(asked: dict[str, Any], inputs: list[Path], draft: Any) -> tuple[pd.DataFrame, dict]:
    """All pairs by one fuser, in this process."""
    rows = Fuse(asked["settings"], inputs)(asked["rows"], draft)
    good = [row for row in rows if "error" not in row]
    return pd.DataFrame(good), {"quarantined": len(rows) - len(good)}


def _question(frames: Ref, settings: FuserSettings, synthetic: Ref | None) -> tuple[list[dict], dict[str, Any]]:
    """The frames to fuse, and what the worker is told."""
    store = places.store()
    rows = pairs(store.rows(frames), None if synthetic is None else store.rows(synthetic), settings)
    masks = found_masks(settings.masks)
    return rows, {"seed": settings.seed, "visible": settings.visible, "steps": settings.steps, "masks": masks}


def fuse_again(frames: Ref, model: Ref, synthetic: Ref, compute: Compute) -> Fused | None:
    """Test frames fused by the fuser inside a model's folder, as its config.json says; None when it has none."""
    told = json.loads((places.store().local(model) / "config.json").read_text()).get("fuse")
    if not told:
        return None
    masks = {**told["masks"], "area": tuple(told["masks"]["area"])}
    settings = FuserSettings(**{**told, "masks": MaskSettings(**masks)}, splits=("test",))
    translated = None if settings.visible == "visible" else synthetic
    return Fused(fuse(frames, model, settings, compute, translated), model)


def pairs(frames: pd.DataFrame, synthetic: pd.DataFrame | None, settings: FuserSettings) -> list[dict]:
    """Rows {id, split} of the frames to fuse: in the splits asked for, with infrared and the visible picture."""
    wanted = frames[frames["split"].isin(settings.splits) & frames["infrared"].notna()]
    if settings.visible == "visible":
        wanted = wanted[wanted["visible"].notna()]
    else:
        made = () if synthetic is None or settings.visible not in synthetic else synthetic["id"]
        wanted = wanted[wanted["id"].isin(list(made))]
    if wanted.empty:
        raise UsageError(f"No frame of {', '.join(settings.splits)} has a {settings.visible} picture to fuse with.")
    return wanted[["id", "split"]].to_dict("records")


class Fuse:
    """Holds the fuser; a shard is read, fused picture by picture, measured and written."""

    def __init__(self, settings: dict[str, Any], inputs: Sequence[Path]) -> None:
        from models.fusers.base import load_fuser
        from models.fusers.masks import MaskProvider

        self.seed, self.visible = settings["seed"], settings["visible"]
        self.more = {} if settings["steps"] is None else {"steps": settings["steps"]}
        inside = inputs[1] / "fuser"  # a model's folder brings the fuser it was trained with
        self.frames, self.fuser = Frames.open(inputs[0]), load_fuser(inside if inside.is_dir() else inputs[1])
        self.synthetic = inputs[2] if len(inputs) > 2 else None
        self.provider = MaskProvider(settings["masks"], places.home() / "masks")

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self._row(row, draft) for row in shard]

    def _row(self, row: dict, draft: Any) -> dict:
        id, name = row["id"], layer_name(row["id"], LAYER)
        try:
            infrared, visible = self._pair(id)
            picture = fused(self.fuser, self.provider, infrared, visible, id, self.seed, **self.more)
        except (OSError, BadSample, UsageError) as error:
            return {**row, "error": f"the pair cannot be fused: {error}"}
        draft.write(name, png_bytes(picture))
        return {**row, LAYER: name, **measured(infrared, visible, picture)}

    def _pair(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        if self.visible == "visible":
            return self.frames.infrared(id), self.frames.visible(id)
        visible = read_png(self.synthetic / layer_name(id, self.visible))
        return self.frames.infrared(id), visible


def fused(
    fuser: Any, provider: Any, infrared: np.ndarray, visible: np.ndarray, name: str, seed: int, **more: Any
) -> np.ndarray:
    """uint8 [H,W,3] of a pair; the seed of its noise depends on the run's seed and its name. more: of `fuse`'s aux."""
    aux = {"seeds": [image_seed(seed, name, LAYER)], **provider.aux(infrared, visible, name), **more}
    return fuser.pictures([infrared], [visible], [aux])[0]


def measured(infrared: np.ndarray, visible: np.ndarray, picture: np.ndarray) -> dict[str, float]:
    """The fusion metrics of one picture; none for pictures too small for them."""
    import torch

    from models.fusers.base import to_unit
    from models.fusers.metrics import SMALLEST, fusion_metrics, grey8

    if min(infrared.shape[:2]) < SMALLEST:
        return {}
    with torch.inference_mode():
        trio = (grey8(to_unit(x)[None]) for x in (infrared, visible, picture))
        return {name: round(float(value[0]), 6) for name, value in fusion_metrics(*trio).items()}


def fuse_folder(folder: Path, fuser: str, out: Path, seed: int = 0) -> pd.DataFrame:
    """Fuse `folder`/infrared with `folder`/visible, matched by file name without suffix, into `out`/<name>.png.

    fuser: a control's name, or the folder of a fitted one. Returns one row per pair: name, error (None when it went
    well) and the metrics, which also go to `out`/metrics.csv. Raises UsageError when there is nothing to fuse.
    """
    from models.datasets.base import pictures
    from models.fusers.base import load_fuser
    from models.fusers.masks import MaskProvider

    layers = [pictures(folder, layer) for layer in ("infrared", "visible")]
    names = sorted(set(layers[0]) & set(layers[1]))
    if not names:
        raise UsageError(f"There are no pairs in {folder}; put pictures of equal names in infrared/ and visible/.")
    opened, provider, rows = load_fuser(fuser), MaskProvider(MaskSettings()), []
    for done, name in enumerate(names, start=1):
        rows.append({"name": name} | _fuse_files(opened, provider, *(folder / x[name][0] for x in layers), out, seed))
        progress.step("fuse", done, len(names))
    table = pd.DataFrame(rows)
    write_file(out / "metrics.csv", table.to_csv(index=False).encode())
    return table


def _fuse_files(fuser: Any, provider: Any, infrared: Path, visible: Path, out: Path, seed: int) -> dict[str, Any]:
    from models.datasets.reading import check_sizes, read_infrared, read_visible

    try:
        grey, colour = read_infrared(infrared), read_visible(visible)
        check_sizes(infrared=grey, visible=colour)
    except BadSample as error:
        return {"error": str(error)}
    picture = fused(fuser, provider, grey, colour, infrared.stem, seed)
    write_file(out / f"{infrared.stem}.png", png_bytes(picture))
    return {"error": None, **measured(grey, colour, picture)}
