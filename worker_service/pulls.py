"""Parameters of a named version, from every shard that owns some of this stage's chunks.

Asked for early, one call a shard, while the step that leads to the version still runs: what comes waits in the transport until
`take` opens the parameters to it. Under ASP several are asked for at a time, for the turns of several lanes come in any order.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
import torch
from torch import Tensor

from shardlane import rpc, wire
from shardlane.chunks import Assembly
from shardlane.errors import MalformedError, RequestError
from shardlane.ids import ChunkId, Incarnation, Version
from shardlane.partition import Chunk, SiteChunk
from shardlane.pb import ps_pb2
from shardlane.plan import Plan
from worker_service.attempt import Attempt
from worker_service.staging import Staging

SHARD = ps_pb2.DESCRIPTOR.services_by_name["ParameterShard"]
CALL_SECONDS = 4 * rpc.WAIT_SECONDS  # a deadline that only a peer that is stuck reaches; the rest is asked for again
RETRY_SECONDS = 0.1

ClientOf = Callable[[Incarnation], Any]


class Superseded(Exception):
    """A shard is past the version that was asked for, at `now`."""

    def __init__(self, now: Version) -> None:
        super().__init__(f"superseded by version {now}")
        self.now = now


@dataclass(slots=True)
class _Asked:
    """One version that was asked for."""

    version: Version
    missing: dict[Incarnation, set[ChunkId]]
    calls: dict[Incarnation, Any] = field(default_factory=dict)
    open: bool = False  # whether values may reach the parameters
    cancelled: bool = False
    superseded: Version | None = None
    refused: int = 0  # ASP: turns of the lane that were refused before this one

    @property
    def settled(self) -> bool:
        return self.superseded is not None or not any(self.missing.values())


class Puller:
    """Pulls a stage's chunks. A tied tensor with two sites in the stage is pulled once and kept twice."""

    def __init__(
        self,
        plan: Plan,
        items: list[SiteChunk],
        parameters: dict[str, Tensor],
        staging: Staging,
        client_of: ClientOf,
        *,
        offer: Callable[[Plan], None],
        on_ended: Callable[[Incarnation], None],
        on_published: Callable[[], None],
        on_fault: Callable[[str], None],
        on_bytes: Callable[[int], None],
        dtype_of: Callable[[Chunk], torch.dtype] = lambda chunk: torch.float32,
        num_places: int = 1,
    ) -> None:
        """`parameters`: flat, fp32, by name; a chunk travels in `dtype_of` it. `num_places`: versions that are so much apart
        follow one another, and those between them are of other lanes (ASP).

        `offer` gets plans that shards attach, `on_ended` hears of a shard that ended a call
        without all that it was asked for, `on_published` that `published` has grown, `on_fault` of one that sent something
        else."""
        self._newest: dict[int, Version] = {}  # by place, the newest version that a shard has answered with, taken or not
        self._num_places = num_places
        self._plan, self._parameters, self._staging, self._client_of = plan, parameters, staging, client_of
        self._offer, self._on_ended, self._on_published = offer, on_ended, on_published
        self._on_fault, self._on_bytes, self._dtype_of = on_fault, on_bytes, dtype_of
        self._chunks: dict[ChunkId, Chunk] = {}
        self._names: defaultdict[ChunkId, list[str]] = defaultdict(list)
        for item in items:
            self._chunks[item.chunk.id] = item.chunk
            self._names[item.chunk.id].append(item.parameter)
        self._changed = threading.Condition()
        self._asked: dict[Version, _Asked] = {}

    @property
    def published(self) -> Version:
        """The newest version that is known here; not under ASP, where the turns of a lane say nothing of another's."""
        return self._newest.get(0, Version(-1)) if self._num_places == 1 else Version(-1)

    def is_past(self, version: Version) -> bool:
        """Whether the version after it is known to be there."""
        return self._newest.get(version % self._num_places, -1) > version

    def wait_any(self, versions: Sequence[Version], attempt: Attempt) -> Version:
        """Asks for all of them and waits until a shard has one, or is past one: the oldest such. Raises `Abandoned`."""
        for version in versions:
            self.ask(version)

        def come() -> list[Version]:
            return [each for each in versions if self._newest.get(each % self._num_places, -1) >= each]

        with self._changed:
            attempt.wait(self._changed, lambda: bool(come()))
            return min(come())

    def ask(self, version: Version) -> None:
        """Begins to pull `version`, instead of another one of its place. Nothing reaches the parameters yet. Harmless when it
        was asked for already."""
        if version in self._asked:
            return
        for other in [each for each in list(self._asked) if (each - version) % self._num_places == 0]:
            self._cancel(other)
        self._begin(_Asked(version, self._by_primary(self._chunks)))

    def _by_primary(self, chunks: Iterable[ChunkId]) -> dict[Incarnation, set[ChunkId]]:
        return {shard: set(each) for shard, each in self._plan.by_primary(list(chunks)).items()}

    def _begin(self, asked: _Asked) -> None:
        with self._changed:
            before = self._asked.get(asked.version)
            self._asked[asked.version] = asked
        self._end(before)
        for shard in asked.missing:
            threading.Thread(target=self._pull_from, args=(asked, shard), name=f"pull-{shard}", daemon=True).start()

    def reroute(self, plan: Plan) -> None:
        """What is still missing is asked of the shards of `plan`, if others have it now."""
        with self._changed:
            self._plan, moved = plan, []
            for asked in self._asked.values():
                if asked.settled:
                    continue
                missing = set().union(*asked.missing.values())
                again = _Asked(asked.version, self._by_primary(missing), open=asked.open, refused=asked.refused)
                if again.missing != {shard: chunks for shard, chunks in asked.missing.items() if chunks}:
                    moved.append(again)
        for again in moved:
            self._begin(again)

    def take(self, version: Version, attempt: Attempt) -> int:
        """Lets `version` into the parameters and waits until all of it is there. Returns, under ASP, how many turns of its lane
        were refused before it.

        Raises `Superseded`, after which they hold parts of several versions; and `Abandoned`, likewise.
        """
        for other in [each.version for each in list(self._asked.values()) if each.open and each.version != version]:
            self._cancel(other)
        self.ask(version)
        with self._changed:
            self._asked[version].open = True
            self._changed.notify_all()
            attempt.wait(self._changed, lambda: version in self._asked and self._asked[version].settled)  # another, if rerouted
            now, refused = self._asked[version].superseded, self._asked[version].refused
        if now is not None:
            self._cancel(version)
            raise Superseded(now)
        return refused

    def cancel(self) -> None:
        """Ends every call. No thread of theirs touches the parameters once this has returned."""
        for version in list(self._asked):
            self._cancel(version)

    def _cancel(self, version: Version) -> None:
        with self._changed:
            asked = self._asked.pop(version, None)
        self._end(asked)

    def _end(self, asked: _Asked | None) -> None:
        with self._changed:
            if asked is None:
                return
            asked.cancelled = True
            calls = list(asked.calls.values())
            self._changed.notify_all()
        for call in calls:
            call.cancel()

    def _pull_from(self, asked: _Asked, shard: Incarnation) -> None:
        while chunks := self._still_missing(asked, shard):
            ended = self._call(asked, shard, chunks)
            if ended != "refused" and self._still_missing(asked, shard):
                self._on_ended(shard)
            if ended != "early":
                with self._changed:
                    self._changed.wait_for(lambda: asked.cancelled or asked.superseded is not None, RETRY_SECONDS)

    def _still_missing(self, asked: _Asked, shard: Incarnation) -> list[ChunkId]:
        with self._changed:
            return [] if asked.cancelled or asked.superseded is not None else sorted(asked.missing[shard])

    def _call(self, asked: _Asked, shard: Incarnation, chunks: list[ChunkId]) -> Literal["early", "refused", "failed"]:
        """One call for `chunks`; how it ended, should some of them still be missing."""
        request = ps_pb2.PullRequest(
            run_id=self._plan.run_id, timeline=self._plan.timeline.id, version=asked.version, chunks=chunks
        )
        arriving = _Arriving(self, asked, shard)
        try:
            call = self._client_of(shard).Pull(request, timeout=CALL_SECONDS)
            with self._changed:
                asked.calls[shard] = call
            for response in call:
                self._note_published(asked, response.header)
                with self._changed:
                    self._changed.wait_for(lambda: asked.open or asked.cancelled)
                if asked.cancelled or arriving.take(response):
                    break
            call.cancel()  # harmless at its end
            return "refused" if arriving.refused else "early"
        except RequestError as fault:
            call.cancel()
            self._on_fault(f"{shard}: {fault}")
            return "refused"
        except (grpc.RpcError, ValueError):  # ValueError: the channel was closed
            return "failed"

    def _note_published(self, asked: _Asked, header: ps_pb2.PullResponse) -> None:
        is_answer = header.outcome in (ps_pb2.PULL_OUTCOME_DATA, ps_pb2.PULL_OUTCOME_SUPERSEDED)
        place = header.version % self._num_places
        if is_answer and header.version > self._newest.get(place, -1):
            with self._changed:
                self._newest[place] = Version(header.version)
                self._changed.notify_all()
            self._on_published()
        if header.outcome == ps_pb2.PULL_OUTCOME_DATA:
            asked.refused = header.refused

    # ---- for _Arriving -------------------------------------------------------------------------------------------------

    def chunk(self, chunk: ChunkId) -> Chunk:
        return self._chunks[chunk]

    def offer(self, plan: Plan) -> None:
        self._offer(plan)

    def target(self, chunk: ChunkId) -> Tensor:
        """Where pieces are put together: the parameter itself, if it is in host memory and of the dtype that travels."""
        if self._is_staged(chunk):
            where = self._chunks[chunk]
            return self._staging.pool.take(where.num_elements, self._dtype_of(where))
        return self._slice(self._names[chunk][0], chunk)

    def _is_staged(self, chunk: ChunkId) -> bool:
        return self._staging.device.type != "cpu" or self._dtype_of(self._chunks[chunk]) != torch.float32

    def finish(self, asked: _Asked, shard: Incarnation, chunk: ChunkId, values: Tensor) -> None:
        names = self._names[chunk]
        with self._changed:
            if asked.cancelled:
                return
            if self._is_staged(chunk):
                for name in names:
                    self._slice(name, chunk).copy_(values)
                self._staging.pool.give(values)
            else:
                for name in names[1:]:
                    self._slice(name, chunk).copy_(values)
            asked.missing[shard].discard(chunk)
            self._changed.notify_all()
        self._on_bytes(values.numel() * values.element_size())

    def supersede(self, asked: _Asked, now: Version) -> None:
        with self._changed:
            asked.superseded = max(now, asked.superseded or now)
            self._changed.notify_all()

    def write(self, asked: _Asked, assembly: Assembly, piece: Any, payload: wire.Buffer) -> bool:
        """Adds a piece, unless the pull is over: the parameters may be in use again."""
        with self._changed:
            return not asked.cancelled and assembly.add(piece, payload)

    def _slice(self, name: str, chunk: ChunkId) -> Tensor:
        where = self._chunks[chunk]
        return self._parameters[name].narrow(0, where.offset, where.num_elements)


class _Arriving:
    """The answers of one call, in order."""

    def __init__(self, puller: Puller, asked: _Asked, shard: Incarnation) -> None:
        self._puller, self._asked, self._shard = puller, asked, shard
        self._chunk: ChunkId | None = None
        self._assembly: Assembly | None = None
        self.refused = False

    def take(self, response: wire.Framed[ps_pb2.PullResponse]) -> bool:
        """Whether the version is superseded. Raises `MalformedError` for what was not asked for."""
        header = response.header
        chunk = ChunkId(header.chunk)
        if header.HasField("plan"):
            self._puller.offer(wire.plan_from_wire(header.plan))
        if chunk not in self._asked.missing[self._shard]:
            raise MalformedError(f"chunk {chunk} came from {self._shard}, of which it was not asked")
        match header.outcome:
            case ps_pb2.PULL_OUTCOME_DATA:
                self._take_piece(chunk, response)
            case ps_pb2.PULL_OUTCOME_SUPERSEDED:
                self._puller.supersede(self._asked, Version(header.version))
                return True
            case ps_pb2.PULL_OUTCOME_NOT_OWNER | ps_pb2.PULL_OUTCOME_STALE:
                self.refused = True
            case _:
                raise MalformedError(f"chunk {chunk}: pull outcome {header.outcome} is unknown")
        return False

    def _take_piece(self, chunk: ChunkId, response: wire.Framed[ps_pb2.PullResponse]) -> None:
        piece, what = response.header.slice, f"chunk {chunk}"
        where = self._puller.chunk(chunk)
        wire.check_slice(piece, response.payload, total_bytes_max=where.num_bytes, what=what)
        if response.header.version != self._asked.version:
            raise MalformedError(f"{what}: version {response.header.version} came; {self._asked.version} was asked for")
        if self._assembly is None or self._chunk != chunk:
            self._chunk, self._assembly = chunk, Assembly(self._puller.target(chunk), what)
        if self._puller.write(self._asked, self._assembly, piece, response.payload):
            self._puller.finish(self._asked, self._shard, chunk, self._assembly.tensor)
            self._assembly = None
