"""The tensors of a shard: parameters, optimizer state, partial sums. It does what the core says and decides nothing.

Parameters are read by pulls and checkpoints while the optimizer wants to write them. A reader takes a *pin*: the next update
then moves on to a copy and leaves the old values to the readers. So nobody waits for a slow reader, and nobody sees a torn chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ps_service.core.messages import Apply, Close, Join, Keep
from shardlane.chunks import BufferPool
from shardlane.config import Config
from shardlane.ids import ChunkId, SiteIndex, Step, Version
from shardlane.lanes import Block
from shardlane.manifest import PARAMETER, tensor_names
from shardlane.numerics import fast_digest, square_sum
from shardlane.optimizers import ChunkOptimizer
from shardlane.partition import Layout, state_names
from shardlane.turns import Clocks, number_of, place_of

POOL_BYTES_MAX = 1 << 30  # of unused buffers that are kept for the next step


@dataclass
class StoredChunk:
    """One chunk's tensors, each fp32 [num_elements]."""

    optimizer: ChunkOptimizer
    version: Version
    clocks: Clocks = ()  # ASP: where the lanes stand
    copies: list[Tensor] = field(default_factory=list)  # ASP: that each lane's turn is computed from; none is ever written again
    partials: dict[tuple[Step, SiteIndex, Block], Tensor] = field(default_factory=dict)
    sum: Tensor | None = None  # while the step is closed
    parameter_pins: int = 0
    state_pins: int = 0
    sum_pins: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # of version, pins and the optimizer's tensors


@dataclass(frozen=True, slots=True)
class ChunkImage:
    """A pinned, unchanging view of a chunk at one version."""

    version: Version
    num_steps: int
    tensors: Mapping[str, Tensor]  # "parameter" and the optimizer's states
    clocks: Clocks
    copies: tuple[Tensor, ...]  # ASP: that each lane's turn is computed from


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a version: its parameters, fp32 [num_elements]; None: the chunk is past it, at `version`."""

    version: Version
    parameter: Tensor | None
    refused: int = 0  # ASP: turns of the lane that were refused so far


class TensorStore:
    """All chunks that this shard holds. Called under the shard's lock, but for pins and images."""

    def __init__(self, config: Config, layout: Layout) -> None:
        self._config = config
        self._layout = layout
        self._num_lanes = config.train.lanes
        self.pool = BufferPool(keep_bytes_max=POOL_BYTES_MAX)
        self.chunks: dict[ChunkId, StoredChunk] = {}
        self._left_sums: dict[int, int] = {}  # sums that were dropped while still being read: address → readers

    # ---- state ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that a chunk is, in the order in which they go to a learner."""
        copies = (_copy_name(each) for each in range(self._num_lanes if self._config.train.goes_by_turns else 0))
        return (*tensor_names(self._config.optimizer.name, self._config.train.num_past), *copies)

    def put(self, chunk: ChunkId, version: Version, tensors: Mapping[str, Tensor], num_steps: int, clocks: Clocks = ()) -> None:
        """Takes over `tensors["parameter"]` and copies the optimizer's states, absent ones meaning a fresh optimizer. Under ASP
        lanes go on from `clocks`; a copy that is absent means that its lane's turn is computed from `version`.
        """
        decay = self._layout.tensors[self._layout.chunks[chunk].tensor].decay
        num_past = self._config.train.num_past
        optimizer = ChunkOptimizer(self._config.optimizer, tensors["parameter"], decay=decay, num_past=num_past)
        if num_steps:
            names = state_names(self._config.optimizer.name, num_past)
            optimizer.load({name: tensors[name] for name in names if name in tensors}, num_steps)
        present = tensors[PARAMETER].clone() if clocks else None
        copies = [tensors.get(_copy_name(each), present) for each in range(len(clocks))]
        self.chunks[chunk] = StoredChunk(optimizer, version, clocks, [each for each in copies if each is not None])

    def forget(self, chunk: ChunkId) -> None:
        stored = self.chunks.pop(chunk, None)
        if stored is not None:
            self._drop_sums(stored, keep_closed=False)

    def apply(self, effect: Apply) -> None:
        """One optimizer step, or none, and the next version."""
        stored = self.chunks[effect.chunk]
        assert stored.sum is not None
        with stored.lock:
            stored.optimizer.begin_version()
            if effect.scale is not None:
                self._leave_to_readers(stored)
                stored.optimizer.apply(stored.sum, scale=effect.scale, learning_rate=effect.learning_rate)
            stored.version, stored.clocks = Version(effect.step + 1), effect.clocks
            if effect.lane is not None:
                stored.copies[effect.lane] = stored.optimizer.parameter.detach().clone()
        self._drop_sum(stored)

    def _leave_to_readers(self, stored: StoredChunk) -> None:
        optimizer = stored.optimizer
        if stored.parameter_pins or stored.state_pins:
            optimizer.parameter.data = optimizer.parameter.data.clone()
            stored.parameter_pins = 0
        if stored.state_pins:
            optimizer.load(optimizer.states(), optimizer.num_steps)  # copies; the old tensors stay with the readers
            stored.state_pins = 0
        if stored.sum_pins:
            assert stored.sum is not None
            copy = self.pool.take(stored.sum.numel()).copy_(stored.sum)
            self._drop_sum(stored)
            stored.sum = copy

    def parameters_digest(self, chunk: ChunkId) -> int:
        """xxh3_64 of the chunk's parameters; never 0, which stands for none."""
        return fast_digest(self.chunks[chunk].optimizer.parameter) or 1

    # ---- sums ----------------------------------------------------------------------------------------------------------

    def keep(self, effect: Keep, values: Tensor) -> None:
        """`values`, from the pool, become the partial sum of a block."""
        self.chunks[effect.chunk].partials[effect.step, effect.site, effect.block] = values

    def join(self, effect: Join) -> None:
        """left += right: lanes add up along the tree, the lower lanes on the left."""
        partials, step, site = self.chunks[effect.chunk].partials, effect.step, effect.site
        right_values = partials.pop((step, site, effect.right))
        partials[step, site, effect.left.parent] = partials.pop((step, site, effect.left)).add_(right_values)
        self.pool.give(right_values)

    def close(self, effect: Close) -> tuple[float, int]:
        """Adds the sites in order. Returns the sum's square norm (fp64) and digest."""
        stored, step = self.chunks[effect.chunk], effect.step
        total = stored.partials.pop((step, SiteIndex(0), effect.block))  # the first addend is taken, never added to zeros
        for site in range(1, self._layout.num_sites(effect.chunk)):
            values = stored.partials.pop((step, SiteIndex(site), effect.block))
            total.add_(values)
            self.pool.give(values)
        stored.sum = total
        return square_sum(total), fast_digest(total)

    def keep_sum(self, chunk: ChunkId, values: Tensor) -> None:
        """`values`, from the pool, become the chunk's whole sum."""
        self.chunks[chunk].sum = values

    def drop_sums(self, chunk: ChunkId, *, keep_closed: bool) -> None:
        self._drop_sums(self.chunks[chunk], keep_closed)

    def _drop_sums(self, stored: StoredChunk, keep_closed: bool) -> None:
        for values in stored.partials.values():
            self.pool.give(values)
        stored.partials.clear()
        if stored.sum is not None and not keep_closed:
            self._drop_sum(stored)

    def _drop_sum(self, stored: StoredChunk) -> None:
        """Whoever is the last to read it gives it back."""
        assert stored.sum is not None
        if stored.sum_pins:
            self._left_sums[stored.sum.data_ptr()] = stored.sum_pins
        else:
            self.pool.give(stored.sum)
        stored.sum, stored.sum_pins = None, 0

    @property
    def num_sum_bytes(self) -> int:
        """Bytes of partial and whole sums held at this moment."""
        held = list(self.chunks.values())
        return sum(4 * each.numel() for chunk in held for each in (*list(chunk.partials.values()), chunk.sum) if each is not None)

    # ---- readers -------------------------------------------------------------------------------------------------------

    @contextmanager
    def parameter_of(self, chunk: ChunkId, version: int) -> Iterator[Found | None]:
        """Of `version`, under ASP a turn's number. Unchanging while the context lasts. None: the chunk is not here."""
        stored = self.chunks.get(chunk)
        if stored is None:
            yield None
            return
        with stored.lock:
            found = self._past(stored, version)
            parameter = stored.optimizer.parameter.detach()
            stored.parameter_pins += found is None
        if found is not None:
            yield found
            return
        try:
            yield Found(Version(version), parameter)
        finally:
            with stored.lock:
                if stored.optimizer.parameter.data_ptr() == parameter.data_ptr():
                    stored.parameter_pins -= 1

    def _past(self, stored: StoredChunk, version: int) -> Found | None:
        """Anything but the present parameters; None: those."""
        place = num_lanes = self._num_lanes
        if stored.clocks:
            place, version = place_of(version, num_lanes)
        if place < num_lanes:
            clock = stored.clocks[place]
            values = stored.copies[place] if version == clock.taken else None
            return Found(Version(number_of(place, clock.taken, num_lanes)), values, clock.refused)
        back = stored.version - version
        if not back:
            return None
        now = number_of(place, stored.version, num_lanes) if stored.clocks else stored.version
        return Found(Version(now), stored.optimizer.version_ago(back) if 0 < back <= self._config.train.num_past else None)

    def pin_image(self, chunk: ChunkId) -> ChunkImage:
        """The chunk as it is now, for a checkpoint or a refill; give it back by `unpin_image`."""
        stored = self.chunks[chunk]
        with stored.lock:
            stored.state_pins += 1
            tensors = {"parameter": stored.optimizer.parameter.detach(), **stored.optimizer.states()}
            return ChunkImage(stored.version, stored.optimizer.num_steps, tensors, stored.clocks, tuple(stored.copies))

    def unpin_image(self, chunk: ChunkId, image: ChunkImage) -> None:
        """Without this the next update merely copies once for nothing."""
        stored = self.chunks.get(chunk)
        if stored is None:
            return
        with stored.lock:
            if stored.state_pins and stored.optimizer.parameter.data_ptr() == image.tensors["parameter"].data_ptr():
                stored.state_pins -= 1

    def pin_sum(self, chunk: ChunkId) -> Tensor:
        """The chunk's sum for a backup, unchanging until `unpin_sum`: if it is applied meanwhile, a copy of it is."""
        stored = self.chunks[chunk]
        assert stored.sum is not None
        stored.sum_pins += 1
        return stored.sum

    def unpin_sum(self, chunk: ChunkId, values: Tensor) -> None:
        stored, address = self.chunks.get(chunk), values.data_ptr()
        if address in self._left_sums:
            self._left_sums[address] -= 1
            if not self._left_sums[address]:
                del self._left_sums[address]
                self.pool.give(values)
        elif stored is not None and stored.sum is values:
            stored.sum_pins -= 1


def _copy_name(lane: int) -> str:
    return f"parameter_of_lane_{lane}"
