"""Fit the translators infrared -> lightness, infrared -> RGB and, where asked, lightness -> RGB on unpaired pictures.

The infrared domain is the train and the unlabelled frames; the visible domain is the visible layer of the train frames
and the split "visible". Each step draws from both on its own, so a pair meets only by chance. Test frames are never
read, and labels are not either. The third direction learns from the lightness of visible pictures, not of the ones it
is to draw: translated lightness is not there before its own translator is, and is meant to look the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from models import GENERATORS, find
from models.errors import UsageError
from models.frames import Frames, png_bytes
from models.generators.settings import CHANNELS, SOURCES, TranslateSettings
from tasks import places
from tasks.checkpoints import Checkpoints, seed_step
from tasks.fanout import Compute
from tasks.stage import stage
from tasks.store import Ref, digest_of
from tasks.train import fit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

KIND = "translators"
SHARED = ("models.generators.pictures", "models.generators.settings", "tasks.fit_translators")
ADVERSARIAL = tuple(f"models.generators.{name}" for name in ("adversaries", "networks", "syndiff"))
LOG_EVERY = 10  # reading a loss waits for the GPU
CACHED = 2000  # frames a worker keeps in memory per domain


@stage("fit_translators")
def fit_translators(frames: Ref, settings: TranslateSettings, compute: Compute) -> Ref:
    """One folder per direction, `history.parquet` and the contact sheet `contact.png` (infrared | lightness | rgb ...).

    Raises UsageError when there is no visible picture, or the settings do not fit together.
    """
    generator = find(GENERATORS, settings.generator)
    settings = replace(settings, splits=())  # which frames are translated later changes nothing here
    check_directions(settings)
    if hasattr(generator, "fit"):
        return _fit_directly(generator, frames, settings)
    folder = places.store().local(frames)
    check(settings, Frames.open(folder))
    return fit(adversarial_loop, KIND, [frames], settings, [*SHARED, *ADVERSARIAL], compute)


def infrared_domain(frames: Frames) -> list[str]:
    """Ids of the frames whose infrared the translators may see."""
    return [id for split in ("train", "unlabelled") for id in frames.ids(split) if frames.has(id, "infrared")]


def visible_domain(frames: Frames) -> list[str]:
    """Ids of the frames whose visible picture the translators may see."""
    return [id for split in ("train", "visible") for id in frames.ids(split) if frames.has(id, "visible")]


def check_directions(settings: TranslateSettings) -> None:
    """Raises UsageError for directions that do not exist, or whose source nothing makes."""
    unknown = set(settings.directions) - set(CHANNELS)
    if unknown or not settings.directions:
        raise UsageError(f"translate.directions holds {sorted(unknown)}; choose from {', '.join(CHANNELS)}.")
    if "rgb_lightness" in settings.directions and "lightness" not in settings.directions:
        raise UsageError("rgb_lightness is drawn from lightness; add lightness to translate.directions.")
    if "thermal" in settings.directions and hasattr(find(GENERATORS, settings.generator), "fit"):
        raise UsageError("The direction thermal has to be learnt; use translate.generator=syndiff.")


def check(settings: TranslateSettings, frames: Frames) -> None:
    """Raises UsageError before a worker group is started for nothing."""
    unit = max(settings.patch * 2 ** (len(settings.channels) - 1), 2 ** (len(settings.discriminator_channels) - 1), 4)
    if settings.crop % unit:
        raise UsageError(f"translate.crop is {settings.crop}; with these networks use a multiple of {unit}.")
    if not visible_domain(frames):
        raise UsageError(
            f"{frames.dataset} has no visible pictures to learn from; "
            "supply data.unpaired_visible or use translate.generator=thermal."
        )
    if not infrared_domain(frames):
        raise UsageError(f"{frames.dataset} has no infrared train or unlabelled frames; prepare it with some.")


def adversarial_loop(config: dict) -> None:
    """What each training worker runs: all directions, one iteration of each per step."""
    import torch

    from models.generators.adversaries import Adversaries

    settings: TranslateSettings = config["settings"]
    frames = Frames.open(config["folders"][0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_step(settings.seed, -1)  # the same start on every rank
    trained = {direction: Adversaries(settings, direction).to(device) for direction in settings.directions}
    parts = {key: part for name, adversaries in trained.items() for key, part in adversaries.parts(name).items()}
    checkpoints = Checkpoints(config, settings.iterations, **parts)
    draw = Crops(frames, settings)
    for step in range(checkpoints.restore(), settings.iterations):
        rng = seed_step(settings.seed, step, checkpoints.rank)
        infrared, visible, others = (batch.to(device) for batch in draw(rng))
        losses = {}
        for direction, adversaries in trained.items():
            source, target = _pair(direction, infrared, visible, others)
            step_losses = adversaries.iterate(source, target, step)
            losses |= {f"{direction}_{name}": loss for name, loss in step_losses.items()}
        if step % LOG_EVERY == 0 or step + 1 == settings.iterations:
            checkpoints.log(step, **losses)
        if (step + 1) % settings.checkpoint_every == 0:
            checkpoints.save(step + 1)
    translators = {direction: adversaries.translator for direction, adversaries in trained.items()}
    checkpoints.finish(lambda folder: write(folder, translators, frames, settings.seed))


class Crops:
    """Draws one batch of infrared and two of visible crops, each on its own; keeps the frames it has read."""

    def __init__(self, frames: Frames, settings: TranslateSettings):
        self.settings = settings
        self.ids = infrared_domain(frames), visible_domain(frames)
        self.read = lru_cache(CACHED)(frames.infrared), lru_cache(CACHED)(frames.visible)

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """infrared [B,1,crop,crop], visible [B,3,crop,crop] and other visible ones, in [-1,1].

        The others are drawn last, and only for a direction that starts from them: B is 0 otherwise.
        """
        wanted = any(SOURCES[direction] == "lightness" for direction in self.settings.directions)
        infrared, visible = self._batch(0, rng), self._batch(1, rng)
        return infrared, visible, self._batch(1, rng) if wanted else visible[:0]

    def _batch(self, domain: int, rng: np.random.Generator) -> Tensor:
        import torch

        from models.generators.pictures import random_crop

        s, ids, read = self.settings, self.ids[domain], self.read[domain]
        chosen = [ids[i] for i in rng.integers(len(ids), size=s.batch)]
        return torch.stack([random_crop(read(id), s.crop, s.short_side, rng) for id in chosen])


def _pair(direction: str, infrared: Tensor, visible: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """What a direction starts from, and what it is to look like."""
    if direction == "thermal":
        return _view(visible, "lightness"), infrared
    return _view(others, "lightness") if SOURCES[direction] == "lightness" else infrared, _view(visible, direction)


def _view(visible: Tensor, direction: str) -> Tensor:
    from models.generators.pictures import lightness

    return lightness(visible) if direction == "lightness" else visible


def _fit_directly(generator: type, frames: Ref, settings: TranslateSettings) -> Ref:
    """For generators that need no worker group: fitted here, in one pass."""
    store = places.store()
    digest = digest_of(KIND, [frames], settings, [*SHARED, generator.__module__])
    if found := store.find(KIND, digest):
        return found
    opened = Frames.open(store.local(frames))
    fitted = {
        direction: generator.fit(
            direction,
            infrared=_pictures(opened.infrared, infrared_domain(opened)),
            visible=_pictures(opened.visible, visible_domain(opened)),
        )
        for direction in settings.directions
    }
    draft = store.draft(KIND, digest)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), fitted, opened, settings.seed)
        draft.upload(Path(folder))
    return draft.commit(None, {}, count=len(fitted))


def _pictures(read: Callable[[str], np.ndarray], ids: list[str]) -> Iterator[np.ndarray]:
    return (read(id) for id in ids)


def write(folder: Path, translators: dict, frames: Frames, seed: int, rows: int = 4) -> None:
    """Saves each translator in a folder of its name, and some of the frames it was fitted on as a contact sheet."""
    for direction, translator in translators.items():
        translator.save(folder / direction)
    ids = infrared_domain(frames)
    shown = {"infrared": [frames.infrared(id) for id in ids[:: max(1, len(ids) // rows)][:rows]]}
    if "thermal" in translators:
        from models.generators.pictures import lightness_picture

        shown["visible"] = [lightness_picture(frames.visible(id)) for id in visible_domain(frames)[:rows]]
    for name in [name for name in CHANNELS if name in translators]:
        sources = shown[SOURCES[name]]
        shown[name] = translators[name].translate(sources, [seed] * len(sources))
    (folder / "contact.png").write_bytes(png_bytes(contact_sheet(list(shown.values()))))


def contact_sheet(columns: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures side by side, one row a frame; a row of another size is cut or padded to the first one's."""
    import numpy as np

    height, width = columns[0][0].shape[:2]
    sheet = np.zeros((height * len(columns[0]), width * len(columns), 3), np.uint8)
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            colour = picture[..., None] if picture.ndim == 2 else picture
            cut = colour[:height, :width]
            sheet[y * height : y * height + cut.shape[0], x * width : x * width + cut.shape[1]] = cut
    return sheet
