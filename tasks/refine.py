"""Refine: the label of each infrared frame, checked against each picture that was made of the frame.

A translation is aligned with its frame to the pixel, so the frame's label is its label, too, but for objects that the
translator dropped or redrew. The prototype filter (`models.pseudolabels`) sets those regions to 255. Three steps:

    describe     one pass of the frozen encoder over some real training frames, and over some pictures of each layer
    prototypes   on the driver, from those few numbers: class prototypes, thresholds λ, the mean feature of each domain
    refine       every picture of every labelled training frame, in parallel

A label file holds every class and serves all folds. Training takes the real label under its fold's policy and adds 255
only where a base class was freed: `models.pseudolabels.carry_freed`. Prototypes and thresholds of the base classes
know nothing of the novel ones, and the means know no labels, so nothing of a novel class reaches training.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from models.backbone import load_encoder
from models.errors import BadSample, UsageError
from models.frames import Frames, layer_name, png_bytes, read_png
from models.geometry import Canvas, as_image
from models.pseudolabels import (
    RefineSettings,
    calibrate,
    class_prototypes,
    find_regions,
    freed_counts,
    large_enough,
    left_out_similarities,
    pool_regions,
    prototype_filter,
    unit_features,
)
from tasks import places, progress
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Ref, digest_of

CODE = ("tasks.refine", "models.pseudolabels", "models.backbone", "models.geometry", "models.frames")
ALARM = 0.6  # share of a class's pixels; more freed than this means a wrong λ or a translator that drifts (§2.5)


@stage("refine")
def refine(frames: Ref, synthetic: Ref, encoder: Ref, settings: RefineSettings, compute: Compute) -> Ref:
    """Check the labels of all synthetic training pictures; the Ref is of kind "pseudolabels".

    Rows: id, one column per layer with its label file, `counts` (JSON: layer -> class id -> {"kept", "freed"} pixels).
    Raises UsageError when no labelled training frame has a synthetic picture.
    """
    store = places.store()
    pictures, opened = store.rows(synthetic), Frames.open(store.local(frames))
    layers = [layer for layer in settings.layers if layer in pictures.columns]
    labelled = {id for id in opened.ids("train") if opened.has(id, "label")}
    rows = [{"id": row["id"]} | {layer: row[layer] for layer in layers if isinstance(row[layer], str)}
            for row in pictures.to_dict("records") if row["id"] in labelled]
    if not rows or not layers:
        raise UsageError("No labelled training frame has a synthetic picture; synthesise the training split first.")
    prototypes = find_prototypes(frames, synthetic, sorted(labelled), rows, encoder, settings, compute)
    ref = fan_out(Refiner, rows, settings, compute, kind="pseudolabels",
                  inputs=[frames, synthetic, encoder, prototypes], code=CODE, meta={"layers": layers})
    if alarms := alarming(freed_table(store.rows(ref), opened.classes)):
        progress.step("refine", ref.count, ref.count, alarms)
    return ref


def find_prototypes(
    frames: Ref, synthetic: Ref, labelled: Sequence[str], pictures: Sequence[dict], encoder: Ref,
    settings: RefineSettings, compute: Compute,
) -> Ref:
    """Prototypes, thresholds and domain means, a Ref of kind "prototypes"; its rows are one per class.

    λ is no part of the encoder's pass: another threshold costs a fraction of a second.
    """
    store = places.store()
    chosen, shown = _spread(labelled, settings.frames), _spread([row["id"] for row in pictures], settings.mean_frames)
    layers = {row["id"]: {k: v for k, v in row.items() if k != "id"} for row in pictures if row["id"] in shown}
    rows = [{"id": id, "label": id in chosen, "layers": layers.get(id, {})} for id in sorted({*chosen, *shown})]
    seen = replace(RefineSettings(), pixel_norm=settings.pixel_norm, level=settings.level, size=settings.size)
    described = fan_out(Describer, rows, seen, compute, kind="descriptions", inputs=[frames, synthetic, encoder],
                        code=CODE)
    digest = digest_of("prototypes", [described, frames], settings, CODE)
    if found := store.find("prototypes", digest):
        return found
    classes = Frames.open(store.local(frames)).classes
    arrays, table = gather(store.local(described), list(store.rows(described)["id"]), classes, settings)
    draft = store.draft("prototypes", digest)
    draft.write("prototypes.npz", npz_bytes(arrays))
    return draft.commit(table, {"level": settings.level})


def _spread(ids: Iterable[str], most: int) -> set[str]:
    """At most `most` of the ids, chosen by their digest: the same ones in any order, and not the first of a video."""
    return set(sorted(ids, key=lambda id: blake2b(id.encode(), digest_size=8).digest())[:most])


def gather(
    folder: Path, ids: Sequence[str], classes: Sequence[str], settings: RefineSettings,
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """Prototypes [K + 1, C], thresholds [K + 1] and mean_<domain> [C] from the descriptions, and a table of classes."""
    described = [dict(np.load(folder / f"regions/{id}.npz")) for id in ids]
    means = {name: np.mean([d[name] for d in described if name in d], axis=0)
             for name in sorted({name for d in described for name in d if name.startswith("mean_")})}
    real = [d for d in described if "vectors" in d]
    frame = np.repeat(np.arange(len(real)), [len(d["class_id"]) for d in real])
    class_id, area, pixels, vectors = (np.concatenate([d[k] for d in real])
                                       for k in ("class_id", "area", "pixels", "vectors"))
    mean = torch.from_numpy(means["mean_infrared"]) if settings.centre else None
    tensors = [torch.from_numpy(x) for x in (class_id, area, vectors)]
    similarity = left_out_similarities(torch.from_numpy(frame), *tensors, len(classes), mean).numpy()
    similarity[~large_enough(area, pixels, settings)] = np.nan  # judged by area, not by features
    prototypes = class_prototypes(*tensors, len(classes), mean).numpy()
    thresholds = calibrate(class_id, similarity, len(classes), settings)
    table = [{"label": k, "name": name, "threshold": thresholds[k], **_quantiles(similarity[class_id == k])}
             for k, name in enumerate(("background", *classes))]
    return {"prototypes": prototypes, "thresholds": thresholds, **means}, pd.DataFrame(table)


def _quantiles(similarity: np.ndarray) -> dict[str, float]:
    found = similarity[~np.isnan(similarity)]
    low, middle = np.quantile(found, (0.05, 0.5)) if len(found) else (np.nan, np.nan)
    return {"regions": len(found), "similarity_low": float(low), "similarity_median": float(middle)}


class _Encoding:
    """A frozen encoder that gives f̂ of pictures, one picture per forward so that neighbours change no bit of it."""

    def __init__(self, folder: Path, settings: RefineSettings) -> None:
        self.settings, self.canvas = settings, Canvas(settings.size)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = load_encoder(folder).to(self.device)

    def __call__(self, picture: np.ndarray) -> Tensor:
        """uint8 [H, W] or [H, W, 3] -> float [C, h, w] on the CPU."""
        image = self.canvas.image(as_image(picture)[None]).to(self.device)
        with torch.inference_mode():
            features = getattr(self.encoder(image), self.settings.level)[0].cpu()
        return unit_features(features, self.settings)


class Describer:
    """The worker of the first pass: region vectors of a real frame, mean features of pictures."""

    def __init__(self, settings: RefineSettings, inputs: Sequence[Path]) -> None:
        frames, self.synthetic, encoder = inputs
        self.frames, self.encode = Frames.open(frames), _Encoding(encoder, settings)

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        for row in shard:
            arrays = self.real(row["id"]) if row["label"] else {}
            for layer, name in row["layers"].items():
                arrays[f"mean_{layer}"] = self.encode(read_png(self.synthetic / name)).mean((1, 2)).numpy()
            draft.write(f"regions/{row['id']}.npz", npz_bytes(arrays))
        return [{"id": row["id"]} for row in shard]

    def real(self, id: str) -> dict[str, np.ndarray]:
        features, label = self.encode(self.frames.infrared(id)), self.frames.label(id)
        regions = find_regions(label)
        return {"class_id": regions.class_id, "area": regions.area, "pixels": np.full(len(regions.area), label.size),
                "vectors": pool_regions(regions.index, features).numpy(),
                "mean_infrared": features.mean((1, 2)).numpy()}


class Refiner:
    """The worker of the last pass: one label per picture."""

    def __init__(self, settings: RefineSettings, inputs: Sequence[Path]) -> None:
        frames, self.synthetic, encoder, prototypes = inputs
        self.frames, self.rule, self.encode = Frames.open(frames), settings, _Encoding(encoder, settings)
        arrays = dict(np.load(prototypes / "prototypes.npz"))
        self.prototypes, self.thresholds = torch.from_numpy(arrays["prototypes"]), arrays["thresholds"]
        self.means = {k.removeprefix("mean_"): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("mean_")}

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self.row(row["id"], {k: v for k, v in row.items() if k != "id"}, draft) for row in shard]

    def row(self, id: str, pictures: dict[str, str], draft: Any) -> dict:
        label, done, counts = self.frames.label(id), {"id": id}, {}
        try:
            for layer, name in pictures.items():
                refined = self.check(label, self.synthetic / name, layer)
                done[f"{layer}.label"] = layer_name(id, f"{layer}.label")
                draft.write(done[f"{layer}.label"], png_bytes(refined))
                counts[layer] = freed_counts(label, refined)
        except BadSample as error:
            return {"id": id, "error": str(error)}
        return done | {"counts": json.dumps(counts, sort_keys=True)}

    def check(self, label: np.ndarray, path: Path, layer: str) -> np.ndarray:
        picture = read_png(path)
        if picture.shape[:2] != label.shape:
            raise BadSample(f"{path.name} has size {picture.shape[:2]}, its label {label.shape}")
        mean = self.means[layer] if self.rule.centre else None
        features = self.encode(picture)
        return prototype_filter(label, features, self.prototypes, self.thresholds, self.rule, mean).label


def freed_table(rows: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Per layer and class of a "pseudolabels" Ref's rows: layer, label, name, kept, freed (pixels), share freed."""
    sums: dict[tuple[str, int], list[int]] = {}
    for text in rows["counts"]:
        for layer, per_class in json.loads(text).items():
            for k, found in per_class.items():
                total = sums.setdefault((layer, int(k)), [0, 0])
                total[0] += found["kept"]
                total[1] += found["freed"]
    names = ("background", *classes)
    table = [(layer, k, names[k], kept, freed, freed / (kept + freed)) for (layer, k), (kept, freed) in sums.items()]
    return pd.DataFrame(sorted(table), columns=["layer", "label", "name", "kept", "freed", "share"])


def alarming(table: pd.DataFrame) -> str:
    """The classes of which more than ALARM was freed, in words; empty when there are none."""
    rows = table[table["share"] > ALARM].to_dict("records")
    return ", ".join(f"{row['layer']}: {row['share']:.0%} of {row['name']} freed" for row in rows)


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as one .npz; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
