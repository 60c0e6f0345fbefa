"""Small tensors on their way to a rank's device, without making the processor wait for a GPU.

A plain copy from pageable memory waits for all that the GPU has been given; one from page-locked memory does not, and
torch keeps that memory until the copy is done. On a CPU nothing is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def put(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a NumPy array or of (nested) sequences of numbers, on the device."""
    here = torch.from_numpy(values) if isinstance(values, np.ndarray) else torch.tensor(values, dtype=dtype)
    return put_tensor(here, device)


def put_tensor(here: Tensor, device: torch.device) -> Tensor:
    """A tensor of this machine's memory, on the device."""
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


def put_into(there: Tensor, values: np.ndarray) -> None:
    """Overwrite a tensor of a device with a NumPy array."""
    here = torch.from_numpy(values)
    there.copy_(here if there.device.type == "cpu" else here.pin_memory(), non_blocking=True)
