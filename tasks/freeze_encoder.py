"""Put the frozen encoder into the store, so that every node and the registry read the same weights."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

from models.backbone import EncoderSettings, save_encoder
from models.errors import UsageError
from tasks import places
from tasks.stage import stage
from tasks.store import Ref, digest_of

GIVEN = ("random", "pretrained")
CODE = ["models.backbone", "models.encoders", "tasks.freeze_encoder"]


@stage("freeze_encoder")
def freeze_encoder(settings: EncoderSettings) -> Ref:
    """Kind "encoder": config.json and encoder.safetensors. The digest knows the weights' bytes, not their path.

    A relative weights file is looked up as given, then under $THERMOFUSE_DATA, its `weights` folder, and the `weights`
    folder beside it. Raises UsageError that says where it looked.
    """
    store = places.store()
    path = settings.weights if settings.weights in GIVEN else str(found_weights(settings.weights))
    content = path if path in GIVEN else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    digest = digest_of("encoder", [], replace(settings, weights=content), CODE)
    if found := store.find("encoder", digest):
        return found
    draft = store.draft("encoder", digest)
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(Path(folder), replace(settings, weights=path))
        draft.upload(Path(folder))
    return draft.commit(None, {"name": settings.name, "weights": Path(settings.weights).name}, count=1)


def found_weights(weights: str) -> Path:
    """The file that `weights` means. Raises UsageError that says where it looked."""
    root = places.data_root()
    places_tried = [Path(weights), root / weights, root / "weights" / weights, root.parent / "weights" / weights]
    for path in places_tried:
        if path.is_file():
            return path
    tried = ", ".join(str(path.absolute()) for path in places_tried)
    raise UsageError(
        f"There are no encoder weights {weights!r} (looked at {tried}); set encoder.weights to a file, "
        "or to pretrained with encoder.normalise=imagenet."
    )
