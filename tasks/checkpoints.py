"""What a training loop calls in its workers: exact seeding, checkpoints, history.

Everything a step draws is seeded from (seed, step, rank), and a checkpoint holds model, optimiser and averages:
a run that was killed and restored ends with the same weights as one that was left alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import StageFailed

if TYPE_CHECKING:
    import numpy as np
    import pyarrow.fs

    from models.fitting import Fitting, Tell

STATE = "state.pt"
RESULT = "result"
LOG_EVERY = 20


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a folder or an s3:// address, and the path in it."""
    import pyarrow.fs

    if not uri.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return pyarrow.fs.S3FileSystem(endpoint_override=endpoint, region=region), uri.removeprefix("s3://")


def remove(uri: str) -> None:
    """Deletes a folder and what is in it; one that is not there is fine."""
    import pyarrow.fs

    files, path = filesystem(uri)
    if files.get_file_info(path).type != pyarrow.fs.FileType.NotFound:
        files.delete_dir(path)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """63 bits that depend only on the run's seed, the step and the rank."""
    text = f"{seed}|{step}|{rank}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_step(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """Seeds python, numpy and torch for one step and returns a numpy generator of the same seed."""
    import numpy as np
    import torch

    value = step_seed(seed, step, rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    return np.random.default_rng(value)


class Checkpoints:
    """Saves and restores the parts of a loop, and keeps its history.

    parts   anything with state_dict and load_state_dict; a part wrapped by DDP is saved as what it wraps
    rank    this worker's rank; only rank 0 writes, but every rank has to call save and finish equally often
    """

    def __init__(self, config: dict, total: int, **parts: Any):
        import ray.train

        self.place, self.total = config["place"], total
        self.parts = {name: getattr(part, "module", part) for name, part in parts.items()}
        self.rank = ray.train.get_context().get_world_rank()
        self.history: list[dict[str, float]] = []
        self._noted = 0.0

    def restore(self) -> int:
        """Loads the last whole checkpoint; returns how many steps are done (0 for a fresh start)."""
        import ray.train
        import torch

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.history = state["history"]
        return state["step"]

    def log(self, step: int, **values: Any) -> None:
        """Appends one row to the history. Raises StageFailed, naming the step, when a value is not finite.

        Reading a value from a GPU waits for it: call this every few steps.
        """
        row = {name: float(value) for name, value in values.items()}
        for name, value in row.items():
            if not math.isfinite(value):
                raise StageFailed(f"{name} is {value} at step {step}; lower the learning rate or look at the data.")
        self.history.append({"step": step, **row})
        self._show(step, row)

    def save(self, step: int) -> None:
        """Checkpoints after `step` finished steps."""
        self._report(step, None)

    def finish(self, write: Callable[[Path], None]) -> None:
        """The last checkpoint; what `write` puts into the folder it is given becomes the committed result."""
        self._report(self.total, write)

    def _report(self, step: int, write: Callable[[Path], None] | None) -> None:
        import ray.train

        metrics = {"steps": step, **{k: v for k, v in (self.history or [{}])[-1].items() if k != "step"}}
        if self.rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), step, write)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _write(self, folder: Path, step: int, write: Callable[[Path], None] | None) -> None:
        import pandas as pd
        import torch

        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"step": step, "history": self.history, "parts": parts}, folder / STATE)
        if write:
            (folder / RESULT).mkdir()
            write(folder / RESULT)
            pd.DataFrame(self.history).to_parquet(folder / RESULT / "history.parquet")

    def _show(self, step: int, row: dict[str, float]) -> None:
        if self.rank != 0 or time.monotonic() - self._noted < 3:
            return
        self._noted = time.monotonic()
        note = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
        files, path = filesystem(self.place)
        files.create_dir(path, recursive=True)
        with files.open_output_stream(f"{path}/progress.json") as stream:
            stream.write(json.dumps({"done": step + 1, "total": self.total, "note": note}).encode())


def teller(checkpoints: Checkpoints, name: str, fittings: Mapping[str, Fitting], every: int) -> Tell:
    """What a fitting (`models.fitting.run`) calls after each step; the history counts the steps of all together."""
    names = list(fittings)
    before = sum(fittings[other].steps for other in names[: names.index(name)])

    def tell(step: int, numbers: dict[str, float]) -> None:
        if step % LOG_EVERY == 0 or step + 1 == fittings[name].steps:
            checkpoints.log(before + step, **{f"{name}_{key}": value for key, value in numbers.items()})
        if (step + 1) % every == 0:
            checkpoints.save(before + step + 1)

    return tell
