"""Joint training: folded shares, hidden objects, and that training learns and leaves alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from models.errors import UsageError
from models.losses import cross_entropy
from models.segmenters.generalised import predict
from models.segmenters.joint import (
    JointBatch,
    JointSettings,
    base_step,
    distillation,
    fold_novel,
    joint_keys,
    joint_losses,
    joint_step,
    optimiser_of,
    relabel_background,
)
from tests.models.segmenters.test_generalised import SIZE, SPACE, features, labels, model

SETTINGS = JointSettings(mix=(2, 2, 2), rate=0.1, steps=60)


def batch(seed=0):
    label = labels(1, 2, 4, 5, 4, 5)
    return JointBatch(features(label, seed), label, torch.tensor([0, 0, 1, 1, 2, 2]))


# ---- losses


def test_novel_shares_count_as_background():
    logits = torch.randn(2, 6, 3, 3)
    folded, shares = fold_novel(logits, 3).exp(), logits.softmax(1)
    assert torch.allclose(folded.sum(1), torch.ones(2, 3, 3), atol=1e-5)
    assert torch.allclose(folded[:, 0], shares[:, 0] + shares[:, 4] + shares[:, 5], atol=1e-5)
    assert torch.allclose(folded[:, 1:], shares[:, 1:4], atol=1e-5)


def test_distillation_is_nothing_for_the_teacher_itself_and_more_for_others():
    teacher = torch.randn(2, 6, 3, 3)
    student = teacher.clone()
    student[:, 4:] = -30.0
    assert distillation(fold_novel(student, 3), teacher) == pytest.approx(0, abs=1e-5)
    moved = student.clone()
    moved[:, [0, 4]] = moved[:, [4, 0]]
    given = fold_novel(moved, 3)
    assert distillation(given, teacher) == pytest.approx(0, abs=1e-5), "novel instead of background is no loss"
    assert distillation(fold_novel(student.roll(1, dims=1), 3), teacher) > 0.1
    assert distillation(fold_novel(teacher[:0], 3), teacher[:0]) == 0


def test_background_that_looks_novel_is_never_background():
    label = torch.tensor([[[0, 0, 0, 1, 255]]])
    logits = torch.full((1, 6, 1, 5), -10.0)
    logits[0, 4, 0] = torch.tensor([10.0, 0.3, -10.0, 10.0, 10.0])
    logits[0, 0, 0] = torch.tensor([-10.0, 0.0, 10.0, -10.0, -10.0])
    assert relabel_background(label, logits, 3, 0.9).tolist() == [[[4, 255, 0, 1, 255]]]


def test_background_may_be_anything_novel_and_nothing_base():
    """Against the definition, pixel by pixel; what novel classes share among themselves is no part of it."""
    draws = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 6, 3, 4, generator=draws), torch.randint(4, (2, 3, 4), generator=draws)
    label[0, 0] = 255
    shares, terms = logits.softmax(1), []
    for n, y, x in (label != 255).nonzero().tolist():
        k = int(label[n, y, x])
        of = shares[n, [0, 4, 5], y, x].sum() if k == 0 else shares[n, k, y, x]
        terms.append(-of.log())
    expected = pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)
    for shown in (logits, logits[:, [4, 1, 2, 3, 5, 0]]):
        assert cross_entropy(fold_novel(shown, 3), label) == expected


def test_hidden_is_the_share_of_base_loss_that_lets_background_be_novel():
    net, teacher, label = model().eval(), model(1).frozen(), labels(1, 2)
    shown = JointBatch(features(label), label, torch.tensor([0, 0]))
    found = [joint_losses(net, teacher, shown, replace(SETTINGS, hidden=share), 0)["base"] for share in (0.0, 0.2, 1.0)]
    plain, mixed, lenient = (float(loss.detach()) for loss in found)
    assert mixed == pytest.approx(0.8 * plain + 0.2 * lenient, rel=1e-5)
    folded = fold_novel(net(shown.features, SIZE), 3)
    assert lenient == pytest.approx(float(cross_entropy(folded, label).detach()), rel=1e-5) and lenient < 0.9 * plain
    with pytest.raises(UsageError, match=r"hidden is a share of 0 to 1, not 1\.5"):
        JointSettings(hidden=1.5)


def test_background_that_may_be_novel_pushes_no_novel_class_away():
    logits = torch.zeros(1, 6, 2, 2, requires_grad=True)
    cross_entropy(fold_novel(logits, 3), torch.zeros(1, 2, 2, dtype=torch.long)).backward()
    assert (logits.grad[:, 4:] < 0).all() and (logits.grad[:, 1:4] > 0).all()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    net = model()
    losses = joint_losses(net, model(1).frozen(), batch(), SETTINGS, 0)
    parts = losses["base"] + 0.5 * losses["synthetic"] + losses["support"] + losses["distil"]
    assert losses["loss"].detach() == pytest.approx(float(parts.detach()), rel=1e-5)
    assert all(x > 0 for x in losses.values())
    late = replace(SETTINGS, alpha=2.0, distil=0.0, warm_up=0.1)
    assert [late.alpha_at(step) for step in (0, 3, 6, 50)] == [0.5, 1.25, 2.0, 2.0]
    assert late.rate_at(0) == 0.1 and late.rate_at(60) == 0


def test_a_kind_that_is_missing_adds_nothing():
    label = labels(4, 5)
    alone = JointBatch(features(label), label, torch.tensor([2, 2]))
    losses = joint_losses(model(), model().frozen(), alone, SETTINGS, 0)
    assert losses["base"] == losses["synthetic"] == losses["distil"] == 0
    assert losses["loss"] == losses["support"] > 0


# ---- steps


def test_joint_training_learns_both_and_leaves_statistics_and_teacher_alone():
    net = model()
    optimiser = optimiser_of(net, SETTINGS)
    for step in range(30):
        base_step(net, optimiser, features(labels(1, 2, 3, 1), step), labels(1, 2, 3, 1))
    teacher = net.frozen()
    statistics = [x.clone() for name, x in net.named_buffers() if "running" in name]
    known = [x.clone() for x in teacher.parameters()]
    optimiser = optimiser_of(net, SETTINGS)
    losses = [joint_step(net, teacher, optimiser, batch(step), SETTINGS, step) for step in range(50)]
    assert losses[-1]["loss"] < 0.5 * losses[0]["loss"] and not losses[0]["loss"].requires_grad
    after = [x for name, x in net.named_buffers() if "running" in name]
    assert all(torch.equal(a, b) for a, b in zip(statistics, after, strict=True)) and statistics
    assert all(torch.equal(a, b) for a, b in zip(known, teacher.parameters(), strict=True))
    net.eval()
    with torch.no_grad():
        found = predict(net(features(labels(1, 4, 5), 99), SIZE), SPACE)
    assert [int(found[n, 5, 6]) for n in range(3)] == [2, 1, 6]


def test_base_training_never_moves_the_novel_rows_by_itself():
    net = model()
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    before = net.trunk.classify.weight.detach().clone()
    first = base_step(net, optimiser, features(labels(1, 2)), labels(1, 2))
    after = net.trunk.classify.weight.detach()
    assert torch.equal(before[4:], after[4:]) and not torch.equal(before[:4], after[:4])
    for _ in range(20):
        last = base_step(net, optimiser, features(labels(1, 2)), labels(1, 2))
    assert last < first


# ---- batches


def test_batches_are_mixed_balanced_and_the_same_every_time():
    base = [f"b{n}" for n in range(20)]
    synthetic = {1: [f"s1-{n}" for n in range(40)], 6: ["s6-0"]}
    supports = {1: ["u1"], 6: ["u6"]}
    drawn = [joint_keys(base, synthetic, supports, (8, 6, 2), 0, step) for step in range(30)]
    assert drawn == [joint_keys(base, synthetic, supports, (8, 6, 2), 0, step) for step in range(30)]
    assert all([role for role, *_ in keys] == ["base"] * 8 + ["synthetic"] * 6 + ["support"] * 2 for keys in drawn)
    assert all(len({id for role, id, _ in keys if role == "base"}) == 8 for keys in drawn)
    counts = Counter(id.split("-")[0] for keys in drawn for role, id, _ in keys if role == "synthetic")
    assert counts == {"s1": 90, "s6": 90}
    assert len({id for keys in drawn for _, id, _ in keys if id.startswith("s1")}) > 30


def test_kinds_without_pictures_are_left_out_and_few_are_repeated():
    keys = joint_keys(["b0"], {1: []}, {1: ["u1"]}, (3, 2, 2), 0, 0)
    assert keys == [("base", "b0", 0)] * 3 + [("support", "u1", 1)] * 2
