"""The fitting loop: it goes on where it was cut, follows its average, and stops at NaN."""

import pytest
import torch
from torch import nn

from models.errors import StageFailed
from models.fitting import Fitting, batch_indices, run


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


def loss_of(net):
    def losses_at(step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        error = (net(x)[:, 0] - x.sum(1)).square().mean()
        return {"loss": error, "error": error}
    return losses_at


def fitted(steps=40, cut=None, average=0.9):
    net, told = network(), []
    fitting = Fitting({"net": net}, 0.1, steps, average)
    if cut:
        def stop(step, numbers):
            if step + 1 == cut:
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            run(fitting, loss_of(net), stop)
        state, net = fitting.state_dict(), network(7)
        fitting = Fitting({"net": net}, 0.1, steps, average)
        fitting.load_state_dict(state)
    run(fitting, loss_of(net), lambda step, numbers: told.append((step, numbers["error"])))
    return net, fitting, told


def test_it_learns_and_tells_each_step():
    net, _, told = fitted()
    assert [step for step, _ in told] == list(range(40)) and told[-1][1] < 0.05 * told[0][1]
    assert not net.training


def test_a_run_that_was_cut_is_the_run_that_was_not():
    whole, cut = fitted(), fitted(cut=13)
    assert cut[2] == whole[2][13:]
    assert torch.equal(whole[0].weight, cut[0].weight) and torch.equal(whole[1].averaged[0], cut[1].averaged[0])


def test_the_average_lags_behind_and_can_be_put_in():
    net, fitting, _ = fitted(average=0.99)
    last = net.weight.detach().clone()
    fitting.use_average()
    assert not torch.equal(net.weight, last) and torch.equal(net.weight, fitting.averaged[0])
    plain, fitting, _ = fitted(average=0.0)
    last = plain.weight.detach().clone()
    fitting.use_average()
    assert torch.equal(plain.weight, last)


def test_the_rate_rises_and_falls():
    fitting = Fitting({"net": network()}, 0.1, 100)
    rates = [fitting.rate_at(step) for step in (0, 1, 50, 99)]
    assert rates[0] == pytest.approx(0.05, rel=1e-2) and rates[1] == pytest.approx(0.1, rel=1e-2)
    assert rates[2] == pytest.approx(0.05, rel=1e-2) and rates[3] < 1e-4


def test_nan_stops_the_run_and_names_the_step():
    fitting = Fitting({"net": network()}, 0.1, 10)
    with pytest.raises(StageFailed, match="step 0"):
        fitting.step({"loss": torch.tensor(float("nan"), requires_grad=True)})


def test_batches_are_decided_by_their_key():
    first = batch_indices(50, 8, 0, "a", 3)
    assert (first == batch_indices(50, 8, 0, "a", 3)).all() and len(set(first.tolist())) == 8
    assert (first != batch_indices(50, 8, 0, "a", 4)).any() and len(batch_indices(3, 8, 0)) == 8
