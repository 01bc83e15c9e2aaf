"""The controls, on two pixels."""

from __future__ import annotations

import pytest
import torch

from models import FUSERS, find
from models.fusers.saliency import saliency_blend
from tests.models.fusers.small import pair


@pytest.mark.parametrize(("name", "expected"), [("average", [0.45, 0.55]), ("maximum", [0.8, 0.9])])
def test_the_rule(name, expected):
    infrared = torch.tensor([0.1, 0.9]).view(1, 1, 1, 2)
    visible = torch.tensor([0.8, 0.2]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    out = find(FUSERS, name)().fuse(infrared, visible)
    torch.testing.assert_close(out.luminance.flatten(), torch.tensor(expected))
    torch.testing.assert_close(out.image, out.luminance.expand(1, 3, 1, 2))


def test_saliency_weighs_by_the_maps():
    infrared, visible = pair(1)
    grey = visible.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    out = find(FUSERS, "saliency")().fuse(infrared, grey)
    torch.testing.assert_close(out.luminance, saliency_blend(infrared, grey[:, :1]).clamp(0, 1), atol=2e-3, rtol=0)
