"""Where numbers are short and where they must not be."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 where the device has it."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported())


def float32(device: torch.device) -> AbstractContextManager:
    """No short numbers in here, whatever is around it."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cuda", "cpu") else nullcontext()
