"""Balance, completeness, and as little movement as can be."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.placement import cover, place_chunks, seat_workers, share_lanes, surviving
from shardlane.ids import Incarnation
from shardlane.lanes import blocks_of, mask_of
from shardlane.plan import Placement


def names(role: str, count: int) -> list[Incarnation]:
    return [Incarnation(f"{role}-{index:02d}") for index in range(count)]


W = names("worker", 12)


# ---- workers to seats --------------------------------------------------------------------------------------------------


def test_seats_are_filled_in_order_of_arrival() -> None:
    assert seat_workers(W[:5], stages=2, replicas=2) == [(W[0], W[1]), (W[2], W[3])]


def test_a_spare_takes_the_place_of_the_dead_and_nobody_else_moves() -> None:
    rows = [(W[0], W[1]), (W[2], W[3])]
    assert seat_workers([W[0], W[2], W[3], W[4]], stages=2, replicas=2, previous=rows) == [(W[0], W[4]), (W[2], W[3])]


def test_without_a_spare_the_broken_replica_is_dissolved() -> None:
    rows = [(W[0], W[1]), (W[2], W[3])]
    assert seat_workers([W[0], W[2], W[3]], stages=2, replicas=2, previous=rows) == [(W[2], W[3])]


def test_two_broken_replicas_make_a_whole_one_and_stages_are_kept() -> None:
    rows = [(W[0], W[1]), (W[2], W[3])]
    assert seat_workers([W[1], W[2]], stages=2, replicas=2, previous=rows) == [(W[2], W[1])]


def test_another_number_of_stages_seats_everybody_anew() -> None:
    assert seat_workers(W[:3], stages=3, replicas=1, previous=[(W[0], W[1])]) == [(W[0], W[1], W[2])]


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_replicas_are_whole_and_those_that_go_on_keep_their_workers(stages: int, replicas: int, data: st.DataObject) -> None:
    before = seat_workers(names("worker", stages * replicas), stages=stages, replicas=replicas)
    pool = names("worker", stages * replicas + 4)
    alive = [worker for worker in pool if data.draw(st.booleans())]
    rows = seat_workers(alive, stages=stages, replicas=replicas, previous=before)
    seated = [worker for row in rows for worker in row]
    assert len(rows) == min(replicas, len(alive) // stages)
    assert all(len(row) == stages for row in rows)
    assert len(set(seated)) == len(seated) and set(seated) <= set(alive)
    whole = [row for row in before if set(row) <= set(alive)]
    assert set(whole[: len(rows)]) <= set(rows)  # a replica that nobody left goes on untouched
    holes = sorted(sum(worker not in alive for worker in row) for row in before)[: len(rows)]
    moved = sum(
        worker not in {seat for row in before for seat in row} or _seat(before, worker) != _seat(rows, worker)
        for worker in seated
    )
    assert moved <= sum(holes) + stages * max(0, len(rows) - len(before)) + _shifted(before, rows) * stages


def _seat(rows: list[tuple[Incarnation, ...]], worker: Incarnation) -> tuple[int, ...]:
    """The stage alone: the number of a replica is nothing that a worker holds."""
    return tuple(row.index(worker) for row in rows if worker in row)


def _shifted(before: list[tuple[Incarnation, ...]], rows: list[tuple[Incarnation, ...]]) -> int:
    """Rows that are made only of what other rows left."""
    return sum(not any(set(row) & set(old) for old in before) for row in rows)


# ---- lanes to replicas -------------------------------------------------------------------------------------------------


@given(st.integers(0, 6).map(lambda k: 1 << k), st.data())
def test_lanes_are_all_covered_once_contiguous_and_balanced(num_lanes: int, data: st.DataObject) -> None:
    num_replicas = data.draw(st.integers(1, num_lanes))
    shares = share_lanes(num_lanes, num_replicas)
    assert [lane for share in shares for block in share for lane in block.lanes] == list(range(num_lanes))
    counts = [sum(block.size for block in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@given(st.sampled_from([2, 4, 8]), st.data())
def test_no_balanced_split_has_fewer_blocks(num_lanes: int, data: st.DataObject) -> None:
    num_replicas = data.draw(st.integers(1, num_lanes))
    found = sum(len(share) for share in share_lanes(num_lanes, num_replicas))
    base, longer = divmod(num_lanes, num_replicas)
    for extras in product((0, 1), repeat=num_replicas):
        if sum(extras) == longer:
            first, count = 0, 0
            for extra in extras:
                count += len(cover(first, first + base + extra))
                first += base + extra
            assert found <= count


def test_three_replicas_of_eight_lanes() -> None:
    shares = share_lanes(8, 3)
    assert [[str(block) for block in share] for share in shares] == [["0..1", "2"], ["3", "4..5"], ["6..7"]]


@given(st.integers(0, 40), st.integers(0, 40))
def test_cover_is_the_fewest_blocks(first: int, count: int) -> None:
    assert list(cover(first, first + count)) == blocks_of(mask_of(range(first, first + count)))


# ---- chunks to shards --------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 1 << 20), min_size=1, max_size=60)


def loads(sizes: list[int], placements: tuple[Placement, ...], shards: list[Incarnation]) -> list[int]:
    return [sum(size for size, each in zip(sizes, placements, strict=True) if each.primary == shard) for shard in shards]


@given(SIZES, st.integers(1, 6), st.integers(1, 3))
def test_every_chunk_has_its_copies_on_different_shards_and_primaries_balance(sizes: list[int], num: int, copies: int) -> None:
    shards = names("shard", num)
    placements = place_chunks(sizes, shards, replication=copies)
    assert len(placements) == len(sizes)
    for placement in placements:
        assert len(set(placement.in_sync)) == len(placement.in_sync) == min(copies, num)
        assert set(placement.in_sync) <= set(shards)
    found = loads(sizes, placements, shards)
    assert max(found) - min(found) <= max(sizes)


@given(st.integers(20, 60), st.integers(2, 5))
def test_backups_balance_where_they_can(num_chunks: int, num: int) -> None:
    shards = names("shard", num)
    placements = place_chunks([4] * num_chunks, shards, replication=2)
    backups = [sum(each.in_sync[1] == shard for each in placements) for shard in shards]
    assert max(backups) - min(backups) <= 2


@given(SIZES, st.integers(1, 6))
def test_nothing_moves_when_nobody_comes_or_goes(sizes: list[int], num: int) -> None:
    before = place_chunks(sizes, names("shard", num))
    assert place_chunks(sizes, names("shard", num), previous=before) == before


@given(SIZES, st.integers(1, 6))
def test_a_newcomer_gets_its_share_from_the_fullest_and_nobody_else_gets_any(sizes: list[int], num: int) -> None:
    shards = names("shard", num + 1)
    before = place_chunks(sizes, shards[:-1])
    after = place_chunks(sizes, shards, previous=before)
    moved = {chunk for chunk in range(len(sizes)) if before[chunk].primary != after[chunk].primary}
    assert {after[chunk].primary for chunk in moved} <= {shards[-1]}
    assert sum(sizes[chunk] for chunk in moved) <= sum(sizes) / len(shards) + max(sizes)
    found = loads(sizes, after, shards)
    assert max(found) - min(found) <= max(sizes)


@given(st.integers(8, 60), st.integers(2, 6))
def test_of_equal_chunks_only_those_of_the_dead_move(num_chunks: int, num: int) -> None:
    shards = names("shard", num)
    before = place_chunks([4] * num_chunks, shards)
    after = place_chunks([4] * num_chunks, shards[1:], previous=before)
    assert all(b.primary == a.primary for b, a in zip(before, after, strict=True) if b.primary != shards[0])


def test_the_next_in_sync_copy_is_promoted_and_a_lost_chunk_is_found() -> None:
    a, b, c = names("shard", 3)
    before = (Placement((a, b), c), Placement((b, a)))
    assert surviving(before, [b, c]) == (Placement((b,), c), Placement((b,)))
    assert surviving(before, [c]) is None
