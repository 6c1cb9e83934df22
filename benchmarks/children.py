"""Processes of a benchmark: each answers a line of JSON on stdout for each line on stdin, and ends when stdin does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from shardlane.process import process_environment

STOP_SECONDS = 10.0


def free_port() -> int:
    """One that was free a moment ago; rendezvous by address takes no listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Child:
    """`python -m module *arguments`, with the threads and the malloc that our services run with: peers have them, too."""

    def __init__(
        self,
        module: str,
        *arguments: str,
        threads: int = 1,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix`: a command that runs another one, somewhere else."""
        variables = {**os.environ, **process_environment(threads), **(environment or {})}
        self._name = " ".join((module, *arguments))
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=variables,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, **question: Any) -> Any:
        """The answer to a question. Raises `RuntimeError` if the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> Any:
        """The next line of it, such as the first, which says that it is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}")
        return json.loads(line)


def serve(first: Any, answer: Callable[[dict[str, Any]], Any] = lambda question: None) -> None:
    """In the child: says `first`, then answers until stdin ends."""
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
