"""One real worker group: reuse, exact resume after a kill, and a loss that is not a number."""

from __future__ import annotations

import json
import os
import signal

import pandas
import pytest
import torch
from torch import nn

from models.errors import StageFailed
from tasks import places, progress
from tasks.fanout import Compute
from tasks.train import Checkpoints, fit, seed_step, step_seed

STEPS = 12


def loop(config: dict) -> None:
    """Fits a line by noisy steps; dies or loses its loss on demand."""
    settings = config["settings"]
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimiser = torch.optim.Adam(model.parameters(), 0.1)
    checkpoints = Checkpoints(config, STEPS, model=model, optimiser=optimiser)
    for step in range(checkpoints.restore(), STEPS):
        seed_step(settings["seed"], step, checkpoints.rank)
        loss = (model(torch.randn(8, 3)) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        checkpoints.log(step, loss=loss.item() if step != settings.get("nan_at") else float("nan"))
        if (step + 1) % 4 == 0:
            checkpoints.save(step + 1)
        if step == settings.get("die_at") and _first_time(settings["mark"]):
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.finish(lambda folder: torch.save(model.state_dict(), folder / "model.pt"))


def _first_time(mark: str) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def weights(ref) -> dict:
    return torch.load(places.store().local(ref) / "model.pt")


def train(**settings):
    return fit(loop, "lines", [], settings, [], Compute())


def test_a_killed_worker_ends_where_an_unharmed_one_does(ray_local, thermofuse_home, tmp_path):
    shown = []
    previous = progress.use(lambda *step: shown.append(step))
    try:
        straight = train(seed=1)
        killed = train(seed=1, die_at=5, mark=str(tmp_path / "died"))
        again = train(seed=1)
    finally:
        progress.use(previous)
    assert (tmp_path / "died").exists()
    assert straight.digest != killed.digest and again == straight
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(killed)[name])
    history = [pandas.read_parquet(places.store().local(ref) / "history.parquet") for ref in (straight, killed)]
    pandas.testing.assert_frame_equal(*history)
    assert list(history[0]["step"]) == list(range(STEPS))
    assert places.store().manifest(straight)["meta"]["steps"] == STEPS
    assert not any((tmp_path / "store" / "training").iterdir()), "checkpoints stay behind"
    assert shown[-1] == ("lines", 1, 1, "reused")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_names_its_step(ray_local, thermofuse_home, tmp_path):
    with pytest.raises(StageFailed, match="loss is nan at step 6"):
        train(seed=1, nan_at=6)
    assert not any((tmp_path / "store" / "training").iterdir()), "it would fail again at the same step"


def threads(config: dict) -> None:
    told = {"process": os.environ["OMP_NUM_THREADS"], "loop": torch.get_num_threads()}
    Checkpoints(config, 1).finish(lambda folder: (folder / "threads.json").write_text(json.dumps(told)))


def test_a_loop_has_its_threads_to_itself(ray_local, thermofuse_home):
    """A second pool of them in the main thread would outnumber the cores."""
    found = fit(threads, "threads", [], {}, [], Compute(train_threads=2))
    assert json.loads((places.store().local(found) / "threads.json").read_text()) == {"process": "1", "loop": 2}


def test_seeds_depend_on_seed_step_and_rank():
    seeds = {step_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    first, a = seed_step(3, 4).random(), torch.rand(1)
    second, b = seed_step(3, 4).random(), torch.rand(1)
    assert first == second and torch.equal(a, b)
