"""Headless Chromium over its debugging pipe: a page as a person sees it. No driver and no socket; without one tests skip.

python -m tests.browser HOST:PORT FOLDER    takes pictures of a status page
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars", "--no-first-run")
SECONDS_MAX = 60.0


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. Every call waits for its answer."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._next, self._session, self._rest = 0, "", b""
        self.complaints: list[str] = []  # of the console: exceptions, and what the page's policy refused
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def ask(self, expression: str) -> Any:
        """The value of some JavaScript; of a promise what it comes to."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, holds: Callable[[Any], bool] = bool) -> Any:
        end = time.monotonic() + SECONDS_MAX
        while not holds(found := self.ask(expression)):
            assert time.monotonic() < end, f"{expression} is still {found!r}; {self.complaints}"
            time.sleep(0.05)
        return found

    def shoot(self, file: Path) -> None:
        """The whole page, as PNG."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            said = self._read()
            if said.get("id") == self._next:
                assert "error" not in said, said
                return said["result"]
            if said.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(said["params"])[:500])

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 1 << 20)
            assert piece, "the browser has gone"
            self._rest += piece
        whole, _, self._rest = self._rest.partition(b"\0")
        return json.loads(whole)


@contextmanager
def browsing(program: str, profile: Path) -> Iterator[Page]:
    """Chromium reads its commands from file 3, and writes to file 4."""
    (their_in, to), (back, their_out) = os.pipe(), os.pipe()

    def lay() -> None:
        high_in, high_out = os.dup(their_in), os.dup(their_out)  # above 4, whatever they were
        os.dup2(high_in, 3)
        os.dup2(high_out, 4)

    command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=lay, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(to, back)
    finally:
        os.close(to)  # it ends when nobody can command it any more
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(back)


def shoot_both(address: str, folder: Path) -> None:
    """The status page at a desk, and at night on a phone, once it has drawn a run."""
    program = find()
    assert program is not None, f"there is none of {', '.join(NAMES)}"
    with tempfile.TemporaryDirectory() as profile, browsing(program, Path(profile)) as page:
        for width, height, is_dark in ((1440, 900, False), (390, 844, True)):
            page.resize(width, height, is_dark=is_dark)
            page.open(f"http://{address}/")
            page.until("document.querySelector('.seat') !== null && document.querySelector('#chart svg') !== null")
            page.shoot(folder / f"status-page-{width}.png")
        assert page.complaints == [], page.complaints


if __name__ == "__main__":
    shoot_both(sys.argv[1], Path(sys.argv[2]))
