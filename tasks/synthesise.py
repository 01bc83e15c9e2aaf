"""Translate frames to lightness, to RGB, and their lightness to RGB."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import GENERATORS, find
from models.errors import BadSample
from models.frames import Frames, layer_name, png_bytes
from models.generators.settings import SOURCES, TranslateSettings
from tasks import places
from tasks.fanout import Compute, fan_out
from tasks.stage import stage
from tasks.store import Draft, Ref

if TYPE_CHECKING:
    import numpy as np

KIND = "synthetic"
SHARED = ("models.generators.pictures", "models.generators.settings", "tasks.synthesise")


@stage("synthesise")
def synthesise(frames: Ref, translators: Ref, settings: TranslateSettings, compute: Compute) -> Ref:
    """Rows id, split, and for each layer (lightness, rgb, rgb_lightness) its file and `<layer>_edges`.

    The score is the edge agreement of a layer with the picture it was made from (`models.generators.pictures`), in
    [-1,1]: look at it before the pictures are used. rgb_lightness is made from the lightness, by a translator of its
    own where one was fitted, else by the RGB one.
    """
    table = places.store().rows(frames)
    wanted = table[table["split"].isin(settings.splits) & table["infrared"].notna()]
    module = find(GENERATORS, settings.generator).__module__
    return fan_out(
        Translate,
        wanted[["id", "split"]].to_dict("records"),
        {"generator": settings.generator, "directions": settings.directions, "seed": settings.seed},
        compute,
        kind=KIND,
        inputs=[frames, translators],
        code=[*SHARED, module, *(["models.generators.networks"] if module.endswith("syndiff") else [])],
    )


def image_seed(seed: int, id: str, layer: str) -> int:
    """63 bits that depend only on the run's seed, the frame and the layer."""
    digest = hashlib.blake2b(f"{seed}|{id}|{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**63


class Translate:
    """Holds the translators; a shard is read, translated layer by layer, and written."""

    def __init__(self, settings: dict[str, Any], inputs: list[Path]):
        frames, translators = inputs
        generator = find(GENERATORS, settings["generator"])
        self.seed = settings["seed"]
        self.frames = Frames.open(frames)
        inside = translators / "translators"  # a model's folder brings the translators it was trained with
        folder = inside if inside.is_dir() else translators
        names = [name for name in settings["directions"] if name != "rgb_lightness" or (folder / name).is_dir()]
        self.translators = {name: generator.load(folder / name) for name in names}  # an older model's has no third one

    def __call__(self, shard: list[dict], draft: Draft) -> list[dict]:
        results = {row["id"]: dict(row) for row in shard}
        pictures = self._read(results)
        for layer, source in SOURCES.items():
            translator = self.translators.get(layer) or self.translators.get(layer.split("_")[0])
            if translator is not None and source in pictures:
                pictures[layer] = self._translate(translator, layer, pictures[source])
                self._keep(layer, pictures[source], pictures[layer], results, draft)
        return list(results.values())

    def _read(self, results: dict[str, dict]) -> dict[str, dict[str, np.ndarray]]:
        infrared = {}
        for id, row in results.items():
            try:
                infrared[id] = self.frames.infrared(id)
            except (OSError, BadSample) as error:
                row["error"] = f"infrared cannot be read: {error}"
        return {"infrared": infrared}

    def _translate(self, translator: Any, layer: str, sources: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seeds = [image_seed(self.seed, id, layer) for id in sources]
        return dict(zip(sources, translator.translate(list(sources.values()), seeds), strict=True))

    def _keep(self, layer: str, sources: dict, drawn: dict, results: dict[str, dict], draft: Draft) -> None:
        from models.generators.pictures import edge_agreement

        for id, picture in drawn.items():
            name = layer_name(id, layer)
            draft.write(name, png_bytes(picture))
            results[id] |= {layer: name, f"{layer}_edges": round(edge_agreement(sources[id], picture), 4)}
