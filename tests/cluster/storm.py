"""A gRPC network that loses answers and says things twice: calls fail after they were executed, or are executed two times."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc

LOST, DOUBLED = "lost", "doubled"
DECK = [LOST, DOUBLED] + [""] * 18  # 5 % of a method's calls each, and of every twenty of them exactly one
BREAK_SHARE = 0.05  # of the messages of a Transfer, which lasts as long as a plan: there its stream breaks
RESPONSES_BEFORE_LOSS = 2  # of a stream of answers


class LostError(grpc.RpcError):
    """The call was executed; its answer never came."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "the storm took the answer"


class Storm:
    """Decides by one seed what happens to which call, and counts it by (method, what)."""

    def __init__(self, seed: int) -> None:
        self.happened: Counter[tuple[str, str]] = Counter()
        self._rng = random.Random(seed)
        self._decks: defaultdict[str, list[str]] = defaultdict(list)
        self._lock = threading.Lock()

    def connect(self, connect: Callable[..., grpc.Channel]) -> Callable[..., Channel]:
        """In place of `shardlane.rpc.connect`."""
        return lambda *arguments, **options: Channel(connect(*arguments, **options), self)

    def draw(self, method: str) -> str:
        with self._lock:
            deck = self._decks[method]
            if not deck:
                deck += self._rng.sample(DECK, len(DECK))
            if what := deck.pop():
                self.happened[method, what] += 1
            return what

    def breaks(self, method: str) -> bool:
        with self._lock:
            if self._rng.random() >= BREAK_SHARE:
                return False
            self.happened[method, LOST] += 1
            return True


class Channel:
    """A channel to what is beyond the storm, as far as `shardlane.rpc.Client` uses one."""

    def __init__(self, channel: grpc.Channel, storm: Storm) -> None:
        self._channel, self._storm = channel, storm

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def unary_unary(self, path: str, *, request_serializer: Any, response_deserializer: Any) -> Any:
        inner = self._channel.unary_unary(path, request_serializer, response_deserializer)
        method = path.rpartition("/")[2]

        def call(request: Any, timeout: float | None = None) -> Any:
            what = self._storm.draw(method)
            answer = inner(request, timeout=timeout)
            if what == DOUBLED:
                answer = inner(request, timeout=timeout)
            if what == LOST:
                raise LostError
            return answer

        return call

    def unary_stream(self, path: str, *, request_serializer: Any, response_deserializer: Any) -> Any:
        inner = self._channel.unary_stream(path, request_serializer, response_deserializer)
        method = path.rpartition("/")[2]

        def call(request: Any, timeout: float | None = None) -> Responses:
            return Responses(lambda: inner(request, timeout=timeout), self._storm.draw(method))

        return call

    def stream_unary(self, path: str, *, request_serializer: Any, response_deserializer: Any) -> Any:
        inner = self._channel.stream_unary(path, None, response_deserializer)  # messages are bytes: copies that stay as they are
        return Sender(inner, path.rpartition("/")[2], request_serializer, self._storm)


class Responses:
    """Answers that come one by one: only the first few; or all, while the same call is made again and its answers are lost."""

    def __init__(self, begin: Callable[[], Any], what: str) -> None:
        self._what = what
        self._call = begin()
        if what == DOUBLED:
            threading.Thread(target=self._waste, args=(begin(),), daemon=True).start()

    def _waste(self, call: Any) -> None:
        with suppress(grpc.RpcError):
            for _ in call:
                pass

    def __iter__(self) -> Iterator[Any]:
        for index, response in enumerate(self._call, start=1):
            yield response
            if self._what == LOST and index == RESPONSES_BEFORE_LOSS:
                self._call.cancel()
                raise LostError

    def cancel(self) -> None:
        self._call.cancel()


class Sender:
    """A stream of messages with one answer."""

    def __init__(self, inner: Any, method: str, encode: Callable[[Any], bytes], storm: Storm) -> None:
        self._inner, self._method, self._encode, self._storm = inner, method, encode, storm

    def __call__(self, messages: Iterable[Any], timeout: float | None = None) -> Any:
        return self.future(messages, timeout).result()

    def future(self, messages: Iterable[Any], timeout: float | None = None) -> Sending:
        what = "" if self._method == "Transfer" else self._storm.draw(self._method)
        return Sending(self._inner, self._pieces(messages), what, timeout)

    def _pieces(self, messages: Iterable[Any]) -> Iterator[bytes]:
        for message in messages:
            yield self._encode(message)
            if self._method == "Transfer" and self._storm.breaks(self._method):
                raise LostError  # gRPC cancels a call whose messages end with an error


class Sending:
    """A call under way."""

    def __init__(self, inner: Any, pieces: Iterator[bytes], what: str, timeout: float | None) -> None:
        self._inner, self._what, self._timeout = inner, what, timeout
        self._sent: list[bytes] = []
        self._call = inner.future(self._kept(pieces) if what == DOUBLED else pieces, timeout=timeout)

    def _kept(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._sent.append(piece)
            yield piece

    def cancel(self) -> None:
        self._call.cancel()

    def result(self) -> Any:
        with suppress(grpc.FutureCancelledError):
            answer = self._call.result()
            if self._what == DOUBLED:
                answer = self._inner(iter(self._sent), timeout=self._timeout)
            if self._what == LOST:
                raise LostError
            return answer
        raise LostError
