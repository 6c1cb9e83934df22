"""Who does what, as pure functions of who is there: workers to seats, lanes to replicas, chunks to shards.

All of them are deterministic and move as little as they can: what stays where it is needs no new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from shardlane.ids import ChunkId, Incarnation, Lane
from shardlane.lanes import Block
from shardlane.plan import Placement

Row = tuple[Incarnation, ...]  # the workers of a replica, one a stage


def seat_workers(alive: Sequence[Incarnation], *, stages: int, replicas: int, previous: Sequence[Row] = ()) -> list[Row]:
    """As many whole replicas as `alive` allows, at most `replicas`.

    A worker keeps its seat while its replica goes on; replicas with the fewest holes go on. Holes are filled by who sat at the
    same stage, then by who has no seat, in the order of `alive`.
    """
    num_rows = min(replicas, len(alive) // stages)
    here = set(alive)
    rows = [[worker if worker in here else None for worker in row] for row in previous if len(row) == stages]
    by_holes = sorted(range(len(rows)), key=lambda index: rows[index].count(None))  # stable: among equals the older one goes on
    kept = [rows[index] for index in sorted(by_holes[:num_rows])]
    dissolved = [rows[index] for index in sorted(by_holes[num_rows:])]
    kept += [[None] * stages for _ in range(num_rows - len(kept))]
    last_stage = {worker: stage for row in dissolved for stage, worker in enumerate(row)}
    seated = {worker for row in kept for worker in row}
    free = [worker for worker in alive if worker not in seated]
    for same_stage in (True, False):
        for row in kept:
            for stage, worker in enumerate(row):
                if worker is None and (fits := [w for w in free if not same_stage or last_stage.get(w) == stage]):
                    row[stage] = fits[0]
                    free.remove(fits[0])
    return [tuple(worker for worker in row if worker is not None) for row in kept]


def share_by_speed(num_lanes: int, lane_seconds: Sequence[float]) -> list[int]:
    """Lanes for each replica, given its seconds a lane: the slowest is done as soon as can be, and may get none."""
    counts = [0] * len(lane_seconds)
    for _ in range(num_lanes):  # for equal pieces of work greed is optimal
        quickest = min(range(len(counts)), key=lambda each: (counts[each] + 1) * lane_seconds[each])
        counts[quickest] += 1
    return counts


def share_lanes(num_lanes: int, num_replicas: int) -> list[tuple[Block, ...]]:
    """Contiguous lanes for each replica, in order: counts differ by one at most, and are cut where the fewest blocks arise.

    Dynamic programming over (replicas, how many of them have one lane more); among equals the longer share comes first.
    """
    base, num_longer = divmod(num_lanes, num_replicas)
    costs = [0] + [_UNREACHABLE] * num_longer  # fewest blocks of the replicas so far, by how many of them are longer
    choices: list[list[bool]] = []
    for index in range(num_replicas):
        step, chosen = [_UNREACHABLE] * (num_longer + 1), [False] * (num_longer + 1)
        for longer, cost in enumerate(costs):
            first = index * base + longer
            for extra in (1, 0):
                if longer + extra > num_longer or cost == _UNREACHABLE:
                    continue
                total = cost + len(cover(first, first + base + extra))
                if total < step[longer + extra] or (total == step[longer + extra] and not extra):
                    step[longer + extra], chosen[longer + extra] = total, bool(extra)
        costs = step
        choices.append(chosen)
    ends, longer = [num_lanes], num_longer
    for index in reversed(range(num_replicas)):
        extra = choices[index][longer]
        ends.append(ends[-1] - base - extra)
        longer -= extra
    ends.reverse()
    return [cover(first, end) for first, end in pairwise(ends)]


_UNREACHABLE = 1 << 60


@lru_cache(maxsize=1 << 16)
def cover(first: int, end: int) -> tuple[Block, ...]:
    """The fewest blocks that cover lanes `first … end - 1`."""
    blocks = []
    while first < end:
        size = first & -first or 1 << (end - first).bit_length()
        while size > end - first:
            size >>= 1
        blocks.append(Block(Lane(first), size))
        first += size
    return tuple(blocks)


def place_chunks(
    sizes: Sequence[int],
    shards: Sequence[Incarnation],
    *,
    replication: int = 1,
    previous: Sequence[Placement] = (),
) -> tuple[Placement, ...]:
    """`min(replication, len(shards))` holders for each chunk of `sizes` bytes, all in sync: for the beginning of a timeline.

    Primaries are balanced to within the largest chunk, then each rank of backups, as far as a backup must lie elsewhere. Chunks
    stay where `previous` had them as far as balance allows.
    """
    ranks: list[list[Incarnation]] = []
    for rank in range(min(replication, len(shards))):
        before = [each.in_sync[rank] if rank < len(each.in_sync) else None for each in previous] or [None] * len(sizes)
        taken = [{holders[chunk] for holders in ranks} for chunk in range(len(sizes))]
        ranks.append(_assign(sizes, shards, before, lambda chunk, shard, taken=taken: shard not in taken[chunk]))  # type: ignore[misc]
    return tuple(Placement(holders) for holders in zip(*ranks, strict=True))


def surviving(
    previous: Sequence[Placement],
    alive: Sequence[Incarnation],
    dropped: Mapping[Incarnation, frozenset[ChunkId]] | None = None,
) -> tuple[Placement, ...] | None:
    """The placements without the dead: the next in-sync copy is primary (rule 13). None if a chunk has no copy left.

    `dropped`: copies that a shard which lives does not hold any more.
    """
    here, dropped = set(alive), dropped or {}
    placements = []
    for chunk, placement in enumerate(previous):
        in_sync = tuple(shard for shard in placement.in_sync if shard in here and chunk not in dropped.get(shard, ()))
        if not in_sync:
            return None
        placements.append(Placement(in_sync, placement.learner if placement.learner in here else None))
    return tuple(placements)


def with_learners(
    placements: Sequence[Placement],
    sizes: Sequence[int],
    shards: Sequence[Incarnation],
    *,
    replication: int,
) -> tuple[Placement, ...]:
    """Every chunk with fewer than `replication` copies on `shards` gets a learner, if it has none and there is a shard for it.

    Largest first to the shard that holds the fewest bytes. Copies on others, which leave, do not count.
    """
    loads = held_bytes(placements, sizes, shards)
    result = list(placements)
    for chunk in _largest_first(sizes):
        placement = placements[chunk]
        free = [shard for shard in shards if shard not in placement.in_sync]
        if placement.learner is None and len(shards) - len(free) < replication and free:
            learner = min(free, key=loads.__getitem__)
            loads[learner] += sizes[chunk]
            result[chunk] = Placement(placement.in_sync, learner)
    return tuple(result)


def with_fair_shares(
    placements: Sequence[Placement], sizes: Sequence[int], shards: Sequence[Incarnation]
) -> tuple[Placement, ...]:
    """Makes shards that hold much less than an equal share of bytes learners of chunks of the fullest.

    Nobody is sent more than its share. Shares that are even to within the largest chunk stay as they are.
    """
    loads = held_bytes(placements, sizes, shards)
    fair = sum(loads.values()) / len(shards)
    result, largest_first = list(placements), _largest_first(sizes)
    while loads[poorest := min(shards, key=loads.__getitem__)] < fair - max(sizes):
        chunk = next(
            (
                each
                for each in largest_first
                if result[each].learner is None
                and poorest not in result[each].in_sync
                and loads[poorest] + sizes[each] <= fair < max(loads[shard] for shard in result[each].in_sync)
            ),
            None,
        )
        if chunk is None:
            break
        loads[max(result[chunk].in_sync, key=loads.__getitem__)] -= sizes[chunk]  # who will not be needed (`trimmed`)
        loads[poorest] += sizes[chunk]
        result[chunk] = Placement(result[chunk].in_sync, poorest)
    return tuple(result)


def trimmed(
    placements: Sequence[Placement], sizes: Sequence[int], shards: Sequence[Incarnation], *, replication: int
) -> tuple[Placement, ...]:
    """Without copies beyond `replication`: first those that are not on `shards`, then those of the fullest."""
    loads = held_bytes(placements, sizes, shards)
    result = []
    for placement, size in zip(placements, sizes, strict=True):
        kept = list(placement.in_sync)
        while len(kept) > replication:
            dropped = max(kept, key=lambda shard: (shard not in shards, loads[shard]))
            kept.remove(dropped)
            loads[dropped] -= size
        result.append(Placement(tuple(kept), placement.learner))
    return tuple(result)


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda chunk: (-sizes[chunk], chunk))


def listed(placements: Sequence[Placement], caught_up: Mapping[ChunkId, Incarnation]) -> tuple[Placement, ...]:
    """12. Learners that have caught up are in sync from now on."""
    return tuple(
        Placement((*placement.in_sync, placement.learner))
        if placement.learner is not None and caught_up.get(ChunkId(chunk)) == placement.learner
        else placement
        for chunk, placement in enumerate(placements)
    )


def with_even_primaries(
    placements: Sequence[Placement], sizes: Sequence[int], shards: Sequence[Incarnation]
) -> tuple[Placement, ...]:
    """Hands chunks from the shard that serves the most bytes to backups of `shards` that serve fewer, until they are within a
    chunk.

    A copy that is in sync has all that a primary needs, so nothing is sent.
    """
    result = list(placements)
    loads: dict[Incarnation, int] = {}
    for placement, size in zip(placements, sizes, strict=True):
        for shard in placement.in_sync:
            loads.setdefault(shard, 0)
        loads[placement.primary] += size
    while True:
        best: tuple[int, int, Incarnation] | None = None  # (by how much the pair comes closer, chunk, its next primary)
        for chunk, placement in enumerate(result):
            for backup in placement.in_sync[1:]:
                if backup not in shards:
                    continue
                gap = loads[placement.primary] - loads[backup]
                gain = min(sizes[chunk], gap - sizes[chunk])
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, chunk, backup
        if best is None:
            return tuple(result)
        _, chunk, backup = best
        placement = result[chunk]
        loads[placement.primary] -= sizes[chunk]
        loads[backup] += sizes[chunk]
        rest = tuple(shard for shard in placement.in_sync if shard != backup)
        result[chunk] = Placement((backup, *rest), placement.learner)


def held_bytes(placements: Sequence[Placement], sizes: Sequence[int], shards: Sequence[Incarnation]) -> dict[Incarnation, int]:
    """Bytes of the chunks that each shard holds, learners included."""
    loads = dict.fromkeys(shards, 0)
    for placement, size in zip(placements, sizes, strict=True):
        for shard in placement.holders:
            loads[shard] = loads.get(shard, 0) + size
    return loads


def _assign(
    sizes: Sequence[int],
    shards: Sequence[Incarnation],
    before: Sequence[Incarnation | None],
    allowed: Callable[[int, Incarnation], bool],
) -> list[Incarnation]:
    """Largest first to the least loaded (Graham 1969), then from the fullest to the emptiest until they are within a chunk."""
    loads = dict.fromkeys(shards, 0)
    owners: list[Incarnation | None] = [None] * len(sizes)
    largest_first = _largest_first(sizes)
    for chunk, owner in enumerate(before):
        if owner is not None and owner in loads and allowed(chunk, owner):
            owners[chunk] = owner
            loads[owner] += sizes[chunk]
    for chunk in largest_first:
        if owners[chunk] is None:
            shard = min((each for each in shards if allowed(chunk, each)), key=loads.__getitem__)
            owners[chunk] = shard
            loads[shard] += sizes[chunk]
    held = {shard: [chunk for chunk in largest_first if owners[chunk] == shard] for shard in shards}
    while True:
        fullest, emptiest = max(shards, key=loads.__getitem__), min(shards, key=loads.__getitem__)
        gap = loads[fullest] - loads[emptiest]
        movable = [chunk for chunk in held[fullest] if allowed(chunk, emptiest)] if gap > max(sizes, default=0) else []
        if not movable:
            break
        chunk = movable[0]
        held[fullest].remove(chunk)
        held[emptiest].append(chunk)
        owners[chunk] = emptiest
        loads[fullest] -= sizes[chunk]
        loads[emptiest] += sizes[chunk]
    return [owner for owner in owners if owner is not None]
