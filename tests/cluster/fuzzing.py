"""Hostile calls from a seed: every method of every service, as its descriptor says, in the forms that a network can bring.

A message may be noise, a sound one that was damaged, or fields at their bounds around words that are true of the run (its id, its
members, its plan). Lies that keep all the rules are another matter (SECURITY.md): see `tests/cluster/lies.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from shardlane import pb

WAIT_SECONDS = 0.3  # for calls that wait by design, or of which the stream stays open
ANSWER_SECONDS = 30.0  # for all others
RESPONSES_MAX = 8  # that are read of a stream of answers

_OVERSIZED = bytes(17 << 20)  # one MiB more than any message may have
_INTEGERS = (0, 1, 2, 3, 5, 127, 128, 65_535, 65_536, *(2**bits + by for bits in (31, 32, 53, 63, 64) for by in (-1, 0)))
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, float("inf"), float("-inf"), float("nan"))
_STRINGS = ("", "x", "%s{}\0\r\n", "../../x", "\N{CRAB}" * 1024, "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 100, "a" * 100_000)
_LENGTHS = (0, 0, 1, 3, 4, 16, 24)
_TAILS = (b"\x0b", b"\x7a\xff\xff\x7f", b"\xff" * 11, b"\xc0\x3e\x01", b"\xc5\x3e\x01", b"\x7a\x04abcd", b"\x70\x01")
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64),
}


def services() -> list[ServiceDescriptor]:
    """All that `protos/` declares, so that a new method is fuzzed by itself."""
    names = sorted(each.name for each in pkgutil.iter_modules(pb.__path__) if each.name.endswith("_pb2"))
    files = [importlib.import_module(f"{pb.__name__}.{name}").DESCRIPTOR for name in names]
    return [service for file in files for service in file.services_by_name.values()]


@dataclass(frozen=True)
class Knowledge:
    """What is true of one server and its run, and so gets further than noise: values by the field that they fit."""

    words: Mapping[str, Sequence[Any]]
    openings: Mapping[str, Sequence[Message]] = field(default_factory=dict)  # by method: messages that begin a stream soundly


@dataclass(frozen=True)
class Hostile:
    """One call that is to be made."""

    method: MethodDescriptor
    messages: list[bytes]
    stays_open: bool = False

    @property
    def waits(self) -> bool:
        """Whether the server may hold it."""
        return self.stays_open or self.method.server_streaming or self.method.name == "Transfer"


@dataclass(frozen=True)
class Ending:
    """What became of it. The messages are not kept."""

    method: MethodDescriptor
    waits: bool
    code: grpc.StatusCode
    details: str
    seconds: float


class Fuzzer:
    """The same calls for the same seed and knowledge."""

    def __init__(self, seed: int, known: Knowledge) -> None:
        self._random = random.Random(seed)
        self._known = known

    def calls(self, method: MethodDescriptor, number: int) -> Iterator[Hostile]:
        """The first is oversized, and so much for that."""
        yield Hostile(method, [_OVERSIZED])
        for _ in range(number - 1):
            yield Hostile(method, *(self._stream(method) if method.client_streaming else ([self._message(method)], False)))

    # ---- streams -------------------------------------------------------------------------------------------------------

    def _stream(self, method: MethodDescriptor) -> tuple[list[bytes], bool]:
        """A beginning, and what does not follow from it: nothing, the same again, something of another, or silence."""
        chance = self._random
        openings = [each.SerializeToString() for each in self._known.openings.get(method.name, ())]
        begun = [chance.choice(openings)] if openings and chance.random() < 0.6 else [self._message(method)]
        following = chance.choice(
            [
                list,
                lambda: begun * chance.randint(1, 3),
                lambda: [chance.choice(openings or begun)],
                lambda: [self._damaged(begun[0])],
                lambda: [self._message(method) for _ in range(chance.randint(1, 3))],
            ]
        )()
        starts_late = following and chance.random() < 0.3
        return (following if starts_late else begun + following), chance.random() < 0.15

    # ---- messages ------------------------------------------------------------------------------------------------------

    def _message(self, method: MethodDescriptor) -> bytes:
        chance = self._random.random()
        if chance < 0.1:
            return self._random.randbytes(self._random.choice((1, 7, 64, 5000)))
        openings = self._known.openings.get(method.name)
        if openings and chance < 0.4:
            made = type(openings[0]).FromString(self._random.choice(openings).SerializeToString())
            self._vary(made)
        else:
            made = self._made(method.input_type, 0)
        return self._damaged(made.SerializeToString()) if self._random.random() < 0.25 else made.SerializeToString()

    def _damaged(self, sound: bytes) -> bytes:
        chance, data = self._random, bytearray(sound)
        match chance.randrange(4):
            case 0 if data:
                for _ in range(chance.randint(1, 8)):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1 if data:
                del data[chance.randrange(len(data)) :]
            case 2:
                data += data[chance.randrange(len(data) + 1) :]
            case _:
                data += chance.choice(_TAILS)
        return bytes(data)

    def _vary(self, message: Message) -> None:
        """Other values in one to three of its fields, at any depth."""
        for _ in range(self._random.randint(1, 3)):
            inner = message
            while True:
                at = self._random.choice(inner.DESCRIPTOR.fields)
                if at.message_type is None or at.is_repeated or not inner.HasField(at.name) or self._random.random() < 0.2:
                    break
                inner = getattr(inner, at.name)
            inner.ClearField(at.name)
            self._fill(inner, at, 1)

    def _made(self, descriptor: Descriptor, depth: int) -> Message:
        message = message_factory.GetMessageClass(descriptor)()
        chosen = {each.name: self._random.choice(each.fields).name for each in descriptor.oneofs}
        for each in descriptor.fields:
            is_out = each.containing_oneof is not None and chosen[each.containing_oneof.name] != each.name
            if not is_out and self._random.random() < 0.85:
                self._fill(message, each, depth)
        return message

    def _fill(self, message: Message, at: FieldDescriptor, depth: int) -> None:
        is_message = at.message_type is not None
        if is_message and depth > 4:
            return
        if is_message and at.message_type.GetOptions().map_entry:
            getattr(message, at.name).update({self._random.choice(_STRINGS): "0" for _ in range(3)})
        elif at.is_repeated and is_message:
            number = 3000 if depth < 2 and self._random.random() < 0.03 else self._random.choice((0, 1, 1, 2, 3))
            made = [self._made(at.message_type, depth + 1) for _ in range(min(number, 3))]
            getattr(message, at.name).extend(made[i % len(made)] for i in range(number))
        elif is_message:
            getattr(message, at.name).CopyFrom(self._made(at.message_type, depth + 1))
        elif at.is_repeated:
            number = 200_000 if self._random.random() < 0.05 else self._random.choice((0, 1, 1, 2, 4))
            made = [self._value(at) for _ in range(min(number, 4))]
            getattr(message, at.name).extend(made[i % len(made)] for i in range(number) if len(str(made[0])) < 1000)
        else:
            setattr(message, at.name, self._value(at))

    def _value(self, at: FieldDescriptor) -> Any:
        chance, words = self._random, self._known.words.get(at.name)
        if words and chance.random() < 0.75:
            return chance.choice(words)
        match at.cpp_type:
            case FieldDescriptor.CPPTYPE_ENUM:
                return chance.choice([*at.enum_type.values_by_number, -1, 99, 2**31 - 1])
            case FieldDescriptor.CPPTYPE_BOOL:
                return chance.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return chance.choice(_DOUBLES)
            case FieldDescriptor.CPPTYPE_STRING if at.type == FieldDescriptor.TYPE_BYTES:
                return chance.randbytes(chance.choice(_LENGTHS) if chance.random() < 0.95 else 9 << 20)
            case FieldDescriptor.CPPTYPE_STRING:
                return chance.choice(_STRINGS)
            case integer:
                least, beyond = _RANGES[integer]
                return chance.choice([value for each in _INTEGERS for value in (each, -each) if least <= value < beyond])


# ---- making them -------------------------------------------------------------------------------------------------------


def make(channel: grpc.Channel, call: Hostile) -> Ending:
    """Makes a call with the bytes as they are. It ends by its deadline, whatever the server does."""
    method = call.method
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    stub = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
    over, began = threading.Event(), time.monotonic()

    def stream() -> Iterator[bytes]:
        yield from call.messages
        if call.stays_open:
            over.wait(WAIT_SECONDS * 4)

    request: Any = stream() if method.client_streaming else call.messages[0]
    code, details = grpc.StatusCode.OK, ""
    try:
        answer = stub(request, timeout=WAIT_SECONDS if call.waits else ANSWER_SECONDS)
        if method.server_streaming:
            for _ in zip(range(RESPONSES_MAX), answer, strict=False):
                pass
            answer.cancel()
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
    finally:
        over.set()
    return Ending(method, call.waits, code, details, time.monotonic() - began)


def noises(seed: int) -> Iterator[bytes]:
    """What no gRPC client would send to its port."""
    chance, preface = random.Random(seed), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings = b"\0\0\0\x04\0\0\0\0\0"
    yield from (b"", preface[:9], preface, preface + settings, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01")
    for _ in range(10):
        yield chance.randbytes(chance.choice((1, 100, 10_000)))
        yield preface + settings + chance.randbytes(300)
        length, kind = chance.choice((8, 1 << 14, (1 << 24) - 1)), chance.randrange(12)
        yield preface + settings + length.to_bytes(3, "big") + bytes([kind, 0xFF]) + chance.randbytes(2000)


Reader = Callable[[bytes], Message]


def reader(method: MethodDescriptor) -> Reader:
    return message_factory.GetMessageClass(method.input_type).FromString
