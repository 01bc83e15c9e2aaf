"""The joint segmenter: class spaces, folded shares, hidden objects, and that training learns and leaves alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from models.backbone import Features
from models.errors import UsageError
from models.segmenters.generalised import (
    ClassSpace,
    CosineHead,
    Generalised,
    JointBatch,
    JointSettings,
    base_step,
    distillation,
    fold_novel,
    joint_keys,
    joint_losses,
    joint_step,
    optimiser_of,
    predict,
    relabel_background,
)

SPACE = ClassSpace(base=(2, 5, 7), novel=(1, 6))
CHANNELS, GRID, SIZE = (4, 6, 8), (6, 8), (12, 16)
SETTINGS = JointSettings(mix=(2, 2, 2), rate=0.1, steps=60)


def model(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generalised(CHANNELS, SPACE, width=16)


def features(label, seed=0, noise=0.1):
    """Levels [B, c, h, w] that know the class indices [B, H, W]."""
    draws = torch.Generator().manual_seed(seed)
    codes = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))
    cells = codes[label[:, ::2, ::2].clamp(max=6)].permute(0, 3, 1, 2)
    high = cells + noise * torch.randn(cells.shape, generator=draws)
    return Features(high[:, :4], high[:, :6], high)


def labels(*indices):
    """[B, H, W]: each picture with a rectangle of one class index on background."""
    out = torch.zeros(len(indices), *SIZE, dtype=torch.long)
    for n, k in enumerate(indices):
        out[n, 3:9, 2 + n : 10 + n] = k
    return out


def batch(seed=0):
    label = labels(1, 2, 4, 5, 4, 5)
    return JointBatch(features(label, seed), label, torch.tensor([0, 0, 1, 1, 2, 2]))


# ---- classes


def test_ids_and_indices_are_one_to_one():
    ids = torch.tensor([0, 2, 5, 7, 1, 6, 255, 3], dtype=torch.uint8)
    index = SPACE.encode(ids)
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 255, 255]
    assert SPACE.decode(index).tolist() == [0, 2, 5, 7, 1, 6, 255, 255]
    with pytest.raises(UsageError, match="base or novel"):
        ClassSpace((1, 2), (2,))


def test_the_head_is_a_scaled_cosine():
    head, x = CosineHead(8, 3), torch.randn(2, 8, 4, 5)
    expected = 10 * torch.cosine_similarity(x[:, None], head.weight[None, :, :, None, None], dim=2)
    assert torch.allclose(head(x), expected, atol=1e-5)


def test_a_registered_prototype_wins_where_the_features_are_its_own():
    net = model().eval()
    shown = features(labels(4, 5))
    with torch.no_grad():
        rows = normalize(net.embed(shown), dim=1)
        inside = torch.stack([rows[0, :, 2:4, 2:4].mean((1, 2)), rows[1, :, 2:4, 2:4].mean((1, 2))])
        before = net.trunk.classify.weight[:4].clone()
        net.register_novel(inside)
        assert torch.equal(net.trunk.classify.weight[:4], before)
        found = predict(net(shown, SIZE), SPACE)
    assert found[0, 5, 5] == 1 and found[1, 5, 6] == 6
    assert torch.allclose(net.rows()[6], normalize(inside[1], dim=0), atol=1e-5) and net.rows()[3].abs().sum() == 0


def test_classes_that_are_not_asked_for_are_out_of_the_question():
    logits = torch.zeros(1, 6, 2, 2)
    logits[:, 4], logits[:, 5], logits[:, 2] = 3.0, 2.0, 1.0
    assert (predict(logits, SPACE) == 1).all() and (predict(logits, SPACE, novel=(6,)) == 6).all()
    assert (predict(logits, SPACE, novel=()) == 5).all()
    assert logits[0, 4, 0, 0] == 3, "the logits are left alone"


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
    assert distillation(student, teacher, 3) == pytest.approx(0, abs=1e-5)
    moved = student.clone()
    moved[:, [0, 4]] = moved[:, [4, 0]]
    assert distillation(moved, teacher, 3) == pytest.approx(0, abs=1e-5), "novel instead of background is no loss"
    assert distillation(student.roll(1, dims=1), teacher, 3) > 0.1
    assert distillation(teacher[:0], teacher[:0], 3) == 0


def test_background_that_looks_novel_is_never_background():
    label = torch.tensor([[[0, 0, 0, 1, 255]]])
    logits = torch.full((1, 6, 1, 5), -10.0)
    logits[0, 4, 0] = torch.tensor([10.0, 0.3, -10.0, 10.0, 10.0])
    logits[0, 0, 0] = torch.tensor([-10.0, 0.0, 10.0, -10.0, -10.0])
    assert relabel_background(label, logits, 3, 0.9).tolist() == [[[4, 255, 0, 1, 255]]]


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
