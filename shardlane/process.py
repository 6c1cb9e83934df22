"""What must be settled in a process before torch is imported: a service's `__main__` calls this first."""

from __future__ import annotations

import contextlib
import ctypes
import os

MALLOC_OPTIONS = {"TRIM_THRESHOLD": (-1, 1 << 30), "TOP_PAD": (-2, 64 << 20), "MMAP_THRESHOLD": (-3, 32 << 20)}
"""glibc's `mallopt` (parameter, bytes). Memory once touched is kept and used again: a first touch costs eight times a second
one. 32 MiB is the largest mmap threshold that glibc takes."""


def process_environment(threads: int) -> dict[str, str]:
    """The variables that fix thread counts and cuBLAS's workspace, and tune malloc, for a process that is yet to start."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "OMP_DYNAMIC": "FALSE",
        "MKL_DYNAMIC": "FALSE",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **{f"MALLOC_{name}_": str(num_bytes) for name, (_, num_bytes) in MALLOC_OPTIONS.items()},
    }


def prepare_process(threads: int) -> None:
    """Sets `process_environment` here. Whatever the caller's environment said of threads, the config's count wins.

    glibc reads its own variables only when a process starts, so `mallopt` says the same to this one.
    """
    os.environ.update(process_environment(threads))
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to tune
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, num_bytes in MALLOC_OPTIONS.values():
            mallopt(parameter, num_bytes)
