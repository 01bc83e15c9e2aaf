"""What the device has decides, and what must be exact is."""

from __future__ import annotations

import torch

from models.fusers.precision import autocast, float32


def test_long_numbers_inside_short_ones():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with float32(x.device):
            assert (x @ x).dtype == torch.float32


def test_a_cpu_and_tensors_without_memory_stay_as_they_are():
    for device in ("cpu", "meta"):
        x = torch.empty(4, 4, device=device)
        with autocast(x.device), float32(x.device):
            assert (x @ x).dtype == torch.float32
