"""The device that a worker computes on."""

from __future__ import annotations

from pathlib import Path

import torch

from shardlane.errors import UserError


def memory_of(device: torch.device) -> int:
    """Bytes of the device, or of this machine that nobody uses at present; 0: not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def memory_taken(device: torch.device) -> int:
    """Bytes of a CUDA device that torch holds; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises `UserError`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device for --device cuda; give --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
