"""Fuse pairs: every frame of a dataset in parallel, or a person's own folder here and now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from models.errors import BadSample, UsageError
from models.frames import Frames, layer_name, png_bytes, read_png
from models.fusers.settings import FuserSettings
from tasks import places, progress
from tasks.blobs import write_file
from tasks.fanout import Compute, fan_out
from tasks.fit_fuser import CODE as FITTED
from tasks.fit_fuser import found_masks
from tasks.stage import stage
from tasks.store import Ref
from tasks.synthesise import image_seed

if TYPE_CHECKING:
    import numpy as np

KIND, LAYER = "fused", "fused"
CODE = (*FITTED, "tasks.fuse")


@stage("fuse")
def fuse(frames: Ref, fuser: Ref, settings: FuserSettings, compute: Compute, synthetic: Ref | None = None) -> Ref:
    """Rows id, split, fused (the file), and the fusion metrics by name; frames that lack one of the pair are left out.

    `settings.visible` names the visible picture: "visible" is the real one, anything else a layer of `synthetic`.
    Raises UsageError when no frame has a pair.
    """
    store = places.store()
    rows = pairs(store.rows(frames), None if synthetic is None else store.rows(synthetic), settings)
    told = {"seed": settings.seed, "visible": settings.visible, "masks": found_masks(settings.masks)}
    inputs = [frames, fuser, *([synthetic] if synthetic is not None else [])]
    return fan_out(Fuse, rows, told, compute, kind=KIND, inputs=inputs, code=CODE)


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
        self.frames, self.fuser = Frames.open(inputs[0]), load_fuser(inputs[1])
        self.synthetic = inputs[2] if len(inputs) > 2 else None
        self.provider = MaskProvider(settings["masks"], places.home() / "masks")

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self._row(row, draft) for row in shard]

    def _row(self, row: dict, draft: Any) -> dict:
        id, name = row["id"], layer_name(row["id"], LAYER)
        try:
            infrared, visible = self._pair(id)
            picture = fused(self.fuser, self.provider, infrared, visible, id, self.seed)
        except (OSError, BadSample, UsageError) as error:
            return {**row, "error": f"the pair cannot be fused: {error}"}
        draft.write(name, png_bytes(picture))
        return {**row, LAYER: name, **measured(infrared, visible, picture)}

    def _pair(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        if self.visible == "visible":
            return self.frames.infrared(id), self.frames.visible(id)
        visible = read_png(self.synthetic / layer_name(id, self.visible))
        return self.frames.infrared(id), visible


def fused(fuser: Any, provider: Any, infrared: np.ndarray, visible: np.ndarray, name: str, seed: int) -> np.ndarray:
    """uint8 [H,W,3] of a pair; the seed of its noise depends on the run's seed and its name."""
    aux: dict[str, Any] = {"seeds": [image_seed(seed, name, LAYER)]}
    if provider.settings.backend != "none":
        aux |= dict(zip(("mask_infrared", "mask_visible"), provider.masks(infrared, visible, name), strict=True))
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
    from models.fusers.settings import MaskSettings

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
