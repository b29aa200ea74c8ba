"""What a device offers to the kernels launched on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def default_device() -> str:
    """Return `cuda` where there is a GPU, and `cpu` elsewhere."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class DeviceLimits:
    """What decides the shape of a launch.

    Attributes:
        multiprocessors: Their number.
        block_shared_bytes: Largest shared memory of a block.
        shared_bytes: Shared memory of a multiprocessor.
    """

    multiprocessors: int
    block_shared_bytes: int
    shared_bytes: int


# Kernels that run elsewhere are emulated: as on a Hopper GPU, but a small one.
EMULATED = DeviceLimits(multiprocessors=2, block_shared_bytes=227 * 1024, shared_bytes=228 * 1024)


def device_limits(device: torch.device) -> DeviceLimits:
    """Return the limits of a device, without waiting for it.

    Args:
        device: The device.

    Returns:
        Its limits.
    """
    if device.type != "cuda":
        return EMULATED
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        multiprocessors=properties.multi_processor_count,
        block_shared_bytes=int(properties.shared_memory_per_block_optin),  # type: ignore[attr-defined]  # not in the stub
        shared_bytes=properties.shared_memory_per_multiprocessor,
    )
