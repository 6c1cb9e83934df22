"""Torch set up so that equal inputs give equal bits, and the sums and digests over a chunk (DESIGN.md, section 8).

Bit identity is promised within one *numerics class*: device model and ISA, torch build, threads, precision.
"""

from __future__ import annotations

import contextlib
import math
import platform
from pathlib import Path

import numpy as np
import torch
import torch.utils.deterministic
import xxhash

from shardlane.config import NumericsConfig

SQUARE_SUM_BLOCK = 32_768  # elements: 256 KiB of doubles, which stay in the second-level cache


def configure_torch(numerics: NumericsConfig) -> None:
    """Pins threads and algorithms of this process. `shardlane.process.prepare_process` comes before torch's import."""
    torch.set_num_threads(numerics.threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # too late once a graph was executed in parallel; we never do that
            torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)
    # We read nothing unwritten, and filling every new buffer with NaN is slow.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")  # no TF32 on CUDA, no bf16 passes of oneDNN on the CPU
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_flush_denormal(False)


def numerics_class(numerics: NumericsConfig, device: torch.device | str = "cpu") -> str:
    """What bit identity holds within, e.g. `Intel(R) Xeon(R) Processor AVX512, torch 2.13.0+cpu, threads 1, fp32`."""
    if torch.device(device).type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)} sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    else:
        hardware = f"{_cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{hardware}, torch {torch.__version__}, threads {numerics.threads}, {numerics.precision}"


def square_sum(values: torch.Tensor) -> float:
    """Sum of squares of an fp32 tensor of any shape, in fp64: inf or NaN if a value is.

    Blocks of fixed size are widened into a scratch of our own and reduced by numpy's pairwise sum on one thread, so
    neither threads nor the alignment of `values` can change a bit, as they do in `torch.dot` and `torch.sum`.
    """
    flat = values.detach().reshape(-1).cpu().numpy()
    scratch = np.empty(min(SQUARE_SUM_BLOCK, flat.size), np.float64)
    sums = []
    for start in range(0, flat.size, SQUARE_SUM_BLOCK):
        block = flat[start : start + SQUARE_SUM_BLOCK]
        wide = scratch[: block.size]
        np.copyto(wide, block)
        np.multiply(wide, wide, out=wide)
        sums.append(float(np.add.reduce(wide)))
    return math.fsum(sums)


def fast_digest(values: torch.Tensor) -> int:
    """xxh3_64 of the tensor's bytes in row-major order: to compare copies within a class, not against malice."""
    flat = values.detach().reshape(-1).cpu().contiguous()
    return xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy().data)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
