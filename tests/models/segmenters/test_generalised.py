"""The segmenter of base and novel classes: class spaces, a head that novel classes enter, and what is asked for."""

import pytest
import torch
from torch.nn.functional import normalize

from models.backbone import Features
from models.errors import UsageError
from models.segmenters.generalised import ClassSpace, CosineHead, Generalised, predict

SPACE = ClassSpace(base=(2, 5, 7), novel=(1, 6))
CHANNELS, GRID, SIZE = (4, 6, 8), (6, 8), (12, 16)


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
