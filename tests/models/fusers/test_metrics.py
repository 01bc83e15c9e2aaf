"""Every measure against a slow one, against torchmetrics, and at points whose value is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import structural_similarity_index_measure, visual_information_fidelity

from models.datasets.pairs import RoadScene
from models.errors import UsageError
from models.fusers.base import to_unit
from models.fusers.metrics import METRICS, fusion_metrics, grey8
from tests.models.fusers import reference_metrics
from tests.models.fusers.reference_metrics import REFERENCE


def scenes(batch: int = 3, size: tuple[int, int] = (60, 75), seed: int = 0) -> list[np.ndarray]:
    """Smooth noise with a flat patch: a, b and something between them, uint8 [B,H,W]."""
    rng = np.random.default_rng(seed)
    a, b = gaussian_filter(rng.normal(size=(2, batch, *size)), (0, 0, 2, 2)) * 350 + 110
    a[:, :20, :30] = 64
    f = 0.7 * a + 0.4 * b + rng.normal(0, 3, a.shape)
    f[:, 40:, 50:] = 200
    return [x.clip(0, 255).round().astype(np.uint8) for x in (a, b, f)]


@pytest.fixture(scope="module")
def found() -> dict:
    return fusion_metrics(*(torch.from_numpy(x) for x in scenes()))


@pytest.mark.parametrize("name", METRICS)
def test_it_equals_the_slow_one(found, name):
    slow = [REFERENCE[name](*(x.astype(np.float64) for x in trio)) for trio in zip(*scenes(), strict=True)]
    assert found[name].shape == (3,) and found[name].dtype == torch.float64
    np.testing.assert_allclose(found[name].numpy(), slow, atol=1e-9)


def test_qabf_of_the_interior_equals_the_slow_one():
    trios = scenes()
    found = fusion_metrics(*(torch.from_numpy(x) for x in trios), ["Qabf"], qabf="interior")["Qabf"]
    floats = [x.astype(np.float64) for x in trios]
    slow = [reference_metrics.qabf(*trio, interior=True) for trio in zip(*floats, strict=True)]
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-9)
    framed = fusion_metrics(*(torch.from_numpy(x) for x in trios), ["Qabf"])["Qabf"]
    assert (framed > found + 0.01).all(), "zero padding draws a frame that all three share"


def test_it_agrees_with_torchmetrics(found):
    a, b, f = (torch.from_numpy(x)[:, None].double() for x in scenes())
    vif = [sum(visual_information_fidelity(f[i : i + 1], x[i : i + 1]) for x in (a, b)) for i in range(3)]
    torch.testing.assert_close(found["VIF"], torch.stack(vif), atol=1e-3, rtol=0)
    inside = [structural_similarity_index_measure(f, x, data_range=255.0, return_full_image=True)[1] for x in (a, b)]
    ssim = sum(each[..., 5:-5, 5:-5].mean((1, 2, 3)) for each in inside)  # torchmetrics averages a padded border, too
    torch.testing.assert_close(found["SSIM"], ssim, atol=1e-3, rtol=0)


def test_known_points():
    a, *_ = (torch.from_numpy(x) for x in scenes())
    same = fusion_metrics(a, a, a)
    torch.testing.assert_close(same["SSIM"], torch.full((3,), 2.0).double())
    torch.testing.assert_close(same["VIF"], torch.full((3,), 2.0).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(same["CC"], torch.ones(3).double())
    torch.testing.assert_close(same["MI"], 2 * same["EN"])
    assert same["PSNR"].isinf().all()
    for mode in ("reference", "interior"):
        ceiling = fusion_metrics(a, a, a, ["Qabf"], qabf=mode)["Qabf"]
        torch.testing.assert_close(ceiling, torch.full((3,), 0.9748).double(), atol=1e-4, rtol=0)
    flat = torch.full((1, 50, 50), 90, dtype=torch.uint8)
    values = fusion_metrics(flat, flat, flat)
    assert values["EN"] == values["SD"] == values["SF"] == values["AG"] == values["MI"] == values["SCD"] == 0
    assert torch.stack([v for name, v in values.items() if name != "PSNR"]).isfinite().all()


def test_a_sum_of_both_sources_correlates_with_what_each_added():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(40, 120, (1, 64, 64), dtype=np.uint8)) for _ in range(2))
    assert fusion_metrics(a, b, a + b - 80 // 2, ["SCD"])["SCD"] == pytest.approx(2, abs=1e-6)


def test_psnr_has_no_48_decibels_too_many():
    a, f = torch.zeros(1, 50, 50, dtype=torch.uint8), torch.full((1, 50, 50), 10, dtype=torch.uint8)
    assert fusion_metrics(a, a, f, ["PSNR"])["PSNR"].item() == pytest.approx(28.1308, abs=1e-4)


def test_an_image_minds_its_own_business(found):
    alone = fusion_metrics(*(torch.from_numpy(x[1:2]) for x in scenes()))
    for name in METRICS:
        torch.testing.assert_close(alone[name], found[name][1:2], atol=1e-12, rtol=0)


def test_grey_is_rounded_once():
    image = torch.tensor([[0.2, 0.5, 0.9], [1.2, 1.0, 1.1]])[:, :, None, None]
    assert grey8(image).flatten().tolist() == [round(255 * (0.299 * 0.2 + 0.587 * 0.5 + 0.114 * 0.9)), 255]
    assert grey8(torch.tensor([[[[0.5]]]])).item() == 128


@pytest.mark.parametrize(("change", "words"), [
    ({"fused": torch.zeros(1, 50, 51, dtype=torch.uint8)}, "of one size"),
    ({"fused": torch.zeros(1, 50, 50)}, "as grey8 makes them"),
    ({"names": ["EN", "FID"]}, "no metric FID; choose from EN"),
    ({"qabf": "zero"}, "reference or interior"),
])  # fmt: skip
def test_what_does_not_fit_is_told(change, words):
    flat = torch.zeros(1, 50, 50, dtype=torch.uint8)
    with pytest.raises(UsageError, match=words):
        fusion_metrics(**{"infrared": flat, "visible": flat, "fused": flat, **change})


def test_a_picture_too_small_for_vif_is_told():
    small = torch.zeros(1, 40, 60, dtype=torch.uint8)
    with pytest.raises(UsageError, match="41 pixels"):
        fusion_metrics(small, small, small)


@pytest.mark.real
def test_a_published_scene_has_the_values_that_toolkits_give():
    """RoadScene's FLIR_00006 with the mean of the pair as the fused picture; values of public toolkits, mended."""
    root = Path(os.environ["THERMOFUSE_DATA"]) / "roadscene"
    if not root.is_dir():
        pytest.skip("there is no roadscene folder under THERMOFUSE_DATA")
    dataset = RoadScene(root)
    scene = dataset.read(next(item for item in dataset.items() if item.id == "FLIR_00006"))
    a, b = (grey8(to_unit(x)[None]) for x in (scene.infrared, scene.visible))
    mean = torch.from_numpy(np.round((a.double() + b.double()).numpy() / 2).astype(np.uint8))
    found = fusion_metrics(a, b, mean)
    expected = {"EN": 6.2423, "SD": 21.993, "SF": 7.833, "AG": 2.742, "MI": 2.398, "SCD": 1.834, "CC": 0.363,
                "VIF": 0.539, "PSNR": 13.22, "Qabf": 0.3666}  # fmt: skip
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=6e-3 if name == "PSNR" else 1e-3), name
