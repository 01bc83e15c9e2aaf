"""Judge the translations on held-out frames, before anything is trained on them.

One row per layer. Around the translations stand what they have to be better than and what they can at best be: the
infrared frame itself, left as it is (no translator at all); the tone maps of the control generator `thermal`; and,
where a frame has one, its real visible picture. A translator that is worse than the tone maps in every column is not
worth its training. The labels of held-out frames are not read.

Legend: C classes with background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from models.backbone import load_encoder
from models.episode import train_label
from models.errors import BadSample, UsageError
from models.frames import Frames, read_png
from models.generators.pictures import lightness_picture
from models.generators.quality import (
    FEWEST,
    PrototypeSegmenter,
    agreement,
    descriptors,
    edge_scores,
    encode_pictures,
    fid,
    kid,
    mean_iou,
    same_share,
)
from models.generators.thermal import ThermalColour
from models.geometry import Canvas
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.refine import npz_bytes
from tasks.stage import stage
from tasks.store import Ref, digest_of

if TYPE_CHECKING:
    from tasks.tracking import Run

CODE = (
    "tasks.judge_pictures", "models.generators.quality", "models.generators.pictures", "models.generators.thermal",
    "models.backbone", "models.encoders", "models.geometry", "models.views", "models.frames", "models.episode",
)  # fmt: skip
DOMAINS = {
    "infrared": "lightness", "lightness": "lightness", "thermal_lightness": "lightness",
    "rgb": "rgb", "rgb_lightness": "rgb", "thermal_rgb": "rgb", "visible": "rgb",
}  # fmt: skip
"""The rows of the table, in its order, and the real pictures that each is compared with as a set."""
SHARES = ("edges", "agreement", "same")


@dataclass(frozen=True)
class JudgeSettings:
    """How translations are judged.

    layers: the translations to judge; those that were not made are passed over. split: of the frames that are judged;
    frames: most of them, and most real pictures (0: nothing is judged). size: the encoder's input [H, W]. control:
    judge the tone maps, too. examples: most training frames that the segmenter and the tone maps are fitted on.
    fold: its novel classes are kept from the segmenter; None shows it all classes, which is for looking at the table,
    not for choosing by it.
    """

    layers: tuple[str, ...] = ("lightness", "rgb", "rgb_lightness")
    split: str = "test"
    frames: int = 200
    size: tuple[int, int] = (240, 320)
    control: bool = True
    examples: int = 48
    fold: int | None = None


@stage("judge")
def judge_pictures(
    frames: Ref, synthetic: Ref, encoder: Ref, settings: JudgeSettings, compute: Compute, run: Run | None = None
) -> Ref:
    """Kind "judgement", one row per layer of DOMAINS that exists: layer, kid, kid_low, kid_high, fid, edges, agreement,
    same, count, real.

    kid, fid: to the real pictures of the layer's domain (`real` of them; NaN below FEWEST), the visible ones of the
    same split, or, where it has none, of the split "visible"; descriptors are in units of the real ones' size. edges,
    agreement, same: means over pairs with the infrared frame (`count` of them), whose label the layer will carry: edge
    score, mIoU and share of cells of what a training-free segmenter sees. All in 0..1 but kid and fid. run: gets them
    as metrics `pictures/<layer>/<figure>`.
    Raises UsageError when no frame of the split has a translation.
    """
    store = places.store()
    opened, pictures = Frames.open(store.local(frames)), store.rows(synthetic)
    rows = plan(opened, pictures.to_dict("records"), settings)
    judged = fan_out(Judge, rows, settings, compute, kind="judged", inputs=[frames, synthetic, encoder], code=CODE)
    found = _summarised(judged, settings)
    if run:
        run.metrics(points(layer_scores(found)))
    return found


def _summarised(judged: Ref, settings: JudgeSettings) -> Ref:
    store, digest = places.store(), digest_of("judgement", [judged], settings, CODE)
    if found := store.find("judgement", digest):
        return found
    folder = store.local(judged)
    table = summary([dict(np.load(folder / f"judged/{id}.npz")) for id in store.rows(judged)["id"]])
    return store.draft("judgement", digest).commit(table, {"split": settings.split})


def layer_scores(judgement: Ref) -> dict[str, dict[str, float]]:
    """Layer -> its figures by name, in the table's order; NaN where there was nothing to compare with."""
    rows = places.store().rows(judgement).to_dict("records")
    return {row["layer"]: {name: value for name, value in row.items() if name != "layer"} for row in rows}


def points(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """`layer_scores` as metrics such as `pictures/rgb/edges`, shares in points (0..100)."""
    return {f"pictures/{layer}/{name}": value * (100 if name in SHARES else 1)
            for layer, figures in scores.items() for name, value in figures.items()}


def plan(frames: Frames, pictures: Sequence[dict], settings: JudgeSettings) -> list[dict]:
    """What is to be read of each frame: its translated layers (file names) and whether its visible picture is `real`,
    one of those that the layers are compared with as a set."""
    held_out = {id for id in frames.ids(settings.split) if frames.has(id, "infrared")}
    layers = {row["id"]: {name: row[name] for name in settings.layers if isinstance(row.get(name), str)}
              for row in pictures if row["id"] in held_out}
    layers = {id: names for id, names in layers.items() if names}
    if not layers:
        absent = f"No frame of the split {settings.split!r} has a translation"
        raise UsageError(f"{absent}; add it to translate.splits or set judge.split.")
    real = [id for id in frames.ids(settings.split) if frames.has(id, "visible")]
    real = real or [id for id in frames.ids("visible") if frames.has(id, "visible")]
    shown, compared = _spread(layers, settings.frames), _spread(real, settings.frames)
    return [{"id": id, "real": id in compared, "layers": layers[id] if id in shown else {}}
            for id in sorted(shown | compared)]


def _spread(ids: Iterable[str], most: int) -> set[str]:
    """At most `most` of the ids, chosen by their digest: the same ones in any order, and not the first of a video."""
    return set(sorted(ids, key=lambda id: blake2b(id.encode(), digest_size=8).digest())[:most])


class Judge:
    """The worker: descriptors, edge scores and segmenter counts of one frame at a time."""

    def __init__(self, settings: JudgeSettings, inputs: Sequence[Path]) -> None:
        frames, self.synthetic, encoder = inputs
        self.frames, self.canvas = Frames.open(frames), Canvas(settings.size)
        self.encoder = load_encoder(encoder).to("cuda" if torch.cuda.is_available() else "cpu")
        self.classes = 1 + len(self.frames.classes)
        labelled = [id for id in self.frames.ids("train") if self.frames.has(id, "label")]
        novel = () if settings.fold is None else self.frames.novel(settings.fold)
        examples = ((self.frames.infrared(id), train_label(self.frames.label(id), novel, "ignore"))
                    for id in sorted(_spread(labelled, settings.examples)))
        self.segment = PrototypeSegmenter.fit(self.encoder, self.canvas, examples, self.classes)
        self.controls = self._fitted(settings) if settings.control else {}

    def _fitted(self, settings: JudgeSettings) -> dict[str, ThermalColour]:
        ids = [id for split in ("train", "visible") for id in self.frames.ids(split) if self.frames.has(id, "visible")]
        seen = [self.frames.visible(id) for id in sorted(_spread(ids, settings.examples))]
        return {f"thermal_{direction}": ThermalColour.fit(direction, [], seen) for direction in ("lightness", "rgb")}

    def __call__(self, shard: list[dict], draft: Any) -> list[dict]:
        return [self.row(row, draft) for row in shard]

    def row(self, row: dict, draft: Any) -> dict:
        try:
            arrays = self._real(row["id"]) if row["real"] else {}
            arrays |= self._pairs(row["id"], row["layers"]) if row["layers"] else {}
        except (OSError, BadSample) as error:
            return {"id": row["id"], "error": f"cannot be judged: {error}"}
        draft.write(f"judged/{row['id']}.npz", npz_bytes(arrays))
        return {"id": row["id"]}

    def _real(self, id: str) -> dict[str, np.ndarray]:
        visible = self.frames.visible(id)
        both = {"real_rgb": visible, "real_lightness": lightness_picture(visible)}
        return {name: descriptors(self._encode(picture))[0].cpu().numpy() for name, picture in both.items()}

    def _pairs(self, id: str, names: dict[str, str]) -> dict[str, np.ndarray]:
        """<layer>, <layer>.edges and <layer>.counts of each layer, beside the infrared frame."""
        source, arrays = self.frames.infrared(id), {}
        features = self._encode(source)
        for layer, picture in self._pictures(id, source, names).items():
            if picture.shape[:2] != source.shape:
                raise BadSample(f"{layer} has size {picture.shape[:2]}, the frame {source.shape}")
            drawn = self._encode(picture)
            arrays[layer] = descriptors(drawn)[0].cpu().numpy()
            arrays[f"{layer}.edges"] = edge_scores([source], [picture])[0]
            arrays[f"{layer}.counts"] = agreement(self.segment, features, drawn, self.classes).cpu().numpy()
        return arrays

    def _pictures(self, id: str, source: np.ndarray, names: dict[str, str]) -> dict[str, np.ndarray]:
        drawn = {layer: read_png(self.synthetic / name) for layer, name in names.items()}
        mapped = {layer: control.translate([source], [0])[0] for layer, control in self.controls.items()}
        real = {"visible": self.frames.visible(id)} if self.frames.has(id, "visible") else {}
        real = {layer: picture for layer, picture in real.items() if picture.shape[:2] == source.shape}
        return {"infrared": source, **drawn, **mapped, **real}

    def _encode(self, picture: np.ndarray):
        return encode_pictures(self.encoder, self.canvas, [picture])


def summary(judged: Sequence[dict[str, np.ndarray]]) -> pd.DataFrame:
    """The table of `judge_pictures` from the arrays of its frames."""
    rows = []
    for layer, domain in DOMAINS.items():
        pairs = [frame for frame in judged if layer in frame]
        real = [frame[f"real_{domain}"] for frame in judged if f"real_{domain}" in frame]
        if pairs:
            compared = layer != "visible" and min(len(pairs), len(real)) >= FEWEST
            rows.append({
                "layer": layer, **_distances([frame[layer] for frame in pairs], real if compared else []),
                **_sameness(pairs, layer), "count": len(pairs), "real": len(real) if compared else 0,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _distances(made: list[np.ndarray], real: list[np.ndarray]) -> dict[str, float]:
    if not real:
        return dict.fromkeys(("kid", "kid_low", "kid_high", "fid"), float("nan"))
    sets = [torch.from_numpy(np.stack(x)) for x in (made, real)]
    scale = sets[1].square().mean().sqrt().clamp_min(1e-30)  # what leaves random weights may be as small as 1e-8
    sets = [x / scale for x in sets]
    return dict(zip(("kid", "kid_low", "kid_high"), kid(*sets), strict=True)) | {"fid": fid(*sets)}


def _sameness(pairs: list[dict[str, np.ndarray]], layer: str) -> dict[str, float]:
    counts = torch.from_numpy(np.sum([frame[f"{layer}.counts"] for frame in pairs], axis=0))
    edges = float(np.mean([frame[f"{layer}.edges"] for frame in pairs]))
    return {"edges": edges, "agreement": mean_iou(counts), "same": same_share(counts)}
