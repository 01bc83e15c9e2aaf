"""Components, filter and relabelling of one 512 x 512 label, against a loop over regions and dense upsampling."""

import time

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import cosine_similarity, interpolate, normalize

from models.pseudolabels import RefineSettings, prototype_filter, unit_features
from models.relabel import RelabelSettings, relabel

pytestmark = pytest.mark.bench
CLASSES, CHANNELS, SIDE, CELLS = 12, 512, 512, 64


@pytest.fixture(scope="module")
def case():
    """A label with a few hundred regions, and features [512, 64, 64]."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(CLASSES, SIDE, SIDE)), (0, 10, 10))
    label = smooth.argmax(0).astype(np.uint8)
    draws = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(CLASSES, CHANNELS, generator=draws), dim=1)
    cells = torch.from_numpy(label[4::8, 4::8].astype(np.int64))
    features = directions[cells].permute(2, 0, 1) + 0.04 * torch.randn(CHANNELS, CELLS, CELLS, generator=draws)
    return label, features, directions


def blocked(label, features, directions, chosen):
    unit = unit_features(features, chosen)
    kept = prototype_filter(label, unit, directions, np.full(CLASSES, 0.5), chosen).label
    return relabel(kept, unit, directions, RelabelSettings()).label


def plain(label, features, directions):
    """The same by the book: components class by class, means over upsampled features region by region."""
    dense = interpolate(normalize(features, dim=0)[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
    kept = label.copy()
    for k in range(1, CLASSES):
        components, count = ndimage.label(label == k, np.ones((3, 3)))
        for n in range(1, count + 1):
            region = components == n
            mean = dense[:, torch.from_numpy(region)].mean(1)
            if float(cosine_similarity(mean, directions[k], dim=0)) < 0.5:
                kept[region] = 255
    free = torch.from_numpy(kept == 255)
    shares = (dense[:, free].T @ directions.T / 0.1).softmax(1)
    kept[free.numpy()] = torch.where(shares.amax(1) >= 0.8, shares.argmax(1), 255).numpy()
    return kept


def test_regions_at_once_are_faster_than_one_by_one(case):
    chosen = RefineSettings(centre=False)
    blocked(*case, chosen)
    start = time.perf_counter()
    found = blocked(*case, chosen)
    middle = time.perf_counter()
    expected = plain(*case)
    end = time.perf_counter()
    print(f"\n{SIDE} x {SIDE}: {middle - start:.3f} s, region by region {end - middle:.2f} s")
    assert (found == expected).mean() > 0.9
    assert middle - start < 0.2 * (end - middle)
