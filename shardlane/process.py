"""How a process begins and ends: what must be settled before torch is imported, signals, the parent's death, the ready file.

A service's `__main__` stands on this; nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from shardlane.errors import ShardlaneError, UserError
from shardlane.files import replace_file

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
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "GRPC_VERBOSITY": "NONE",  # its own lines on stderr say nothing that our errors do not
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


PARENT_VARIABLE = "SHARDLANE_PARENT_PID"
EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130
_PARENT_POLL_SECONDS = 0.25
_ORPHAN_GRACE_SECONDS = 1.0  # for an orderly stop once the parent is gone; then the process ends at once


class Lifetime:
    """When this process is to stop: SIGTERM, Ctrl-C (twice: at once), or the end of its parent."""

    def __init__(self) -> None:
        self.stop_requested = threading.Event()

    def install_signals(self) -> None:
        """From the main thread only. SIGUSR1 writes every thread's stack to stderr: where a process hangs."""
        faulthandler.register(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def watch_parent(self, environment: Mapping[str, str] = os.environ) -> None:
        """If SHARDLANE_PARENT_PID names a process, ends this one within 2 s of that one's end. Raises `UserError`."""
        text = environment.get(PARENT_VARIABLE, "")
        if not text:
            return
        if not text.isdigit():
            raise UserError(f"{PARENT_VARIABLE} is {text!r}; expected the number of a process")
        threading.Thread(target=self._watch, args=(int(text),), name="parent", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_requested.is_set():
            os._exit(_EXIT_INTERRUPTED)
        self.stop_requested.set()

    def _watch(self, parent: int) -> None:
        while _is_running(parent):
            time.sleep(_PARENT_POLL_SECONDS)
        self.stop_requested.set()
        time.sleep(_ORPHAN_GRACE_SECONDS)
        os._exit(1)


def _is_running(pid: int) -> bool:
    """A process that has ended and was not waited for yet (a zombie) does not run."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X")
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_ready_file(path: Path, values: Mapping[str, Any]) -> None:
    """Says, atomically, that this process serves and where. Raises `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(dict(values)) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write the ready file {path}: {error.strerror}; name another place") from error


def run_main(name: str, main: Callable[[], int]) -> int:
    """`main`'s exit status; an error of the person's is one line on stderr and status 2, a bug keeps its traceback."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC says what our errors say better; it looks when it is loaded
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        return main()
    except ShardlaneError as error:
        with contextlib.suppress(OSError):  # a log on a full disk; the status says enough
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def exit_now(status: int) -> NoReturn:
    """Ends the process at once: everything that matters is written, and the interpreter takes seconds to take torch apart."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
