"""Invariant 3, data by arithmetic: the order is a bijection, a pure function of the config, and looks like no order at all."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlane.samples import held_out_ids, permute, sample_ids

seeds = st.integers(0, (1 << 63) - 1)


@settings(deadline=None)  # up to 600 permutations an example
@given(size=st.integers(1, 600), seed=seeds, data_pass=st.integers(0, 1000))
def test_every_pass_visits_every_window_once(size: int, seed: int, data_pass: int) -> None:
    assert sorted(permute(n, size, seed=seed, data_pass=data_pass) for n in range(size)) == list(range(size))


@given(size=st.integers(1, 1 << 50), seed=seeds, data_pass=st.integers(0, 1 << 40), spots=st.sets(st.integers(0, (1 << 50) - 1)))
def test_the_largest_corpora_are_permuted_without_a_table(size: int, seed: int, data_pass: int, spots: set[int]) -> None:
    inside = {spot % size for spot in spots}
    images = {permute(spot, size, seed=seed, data_pass=data_pass) for spot in inside}
    assert len(images) == len(inside)
    assert all(0 <= image < size for image in images)


@settings(deadline=None)
@given(
    num_windows=st.integers(1, 200),
    micro_batches=st.integers(1, 6),
    micro_batch_size=st.integers(1, 8),
    seed=seeds,
)
def test_the_samples_of_a_run_are_whole_passes_one_after_the_other(
    num_windows: int, micro_batches: int, micro_batch_size: int, seed: int
) -> None:
    global_batch_size = micro_batches * micro_batch_size
    steps = 2 * num_windows // global_batch_size + 1
    run = [
        window
        for step in range(steps)
        for m in range(micro_batches)
        for window in sample_ids(
            step, m, num_windows=num_windows, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, seed=seed
        )
    ]
    assert len(run) == steps * global_batch_size > num_windows
    for first in range(0, len(run), num_windows):
        data_pass = run[first : first + num_windows]
        assert max(Counter(data_pass).values()) == 1, "a window came twice before all had come once"


@given(step=st.integers(0, 1 << 40), micro_batch=st.integers(0, 3), seed=seeds)
def test_a_micro_batch_of_any_step_needs_no_history(step: int, micro_batch: int, seed: int) -> None:
    def ids(size: int, m: int) -> list[int]:
        return sample_ids(step, m, num_windows=40_000, global_batch_size=16, micro_batch_size=size, seed=seed)

    assert ids(4, micro_batch) == ids(4, micro_batch)
    # the step's samples do not depend on how the step is cut into micro-batches
    assert [window for m in range(4) for window in ids(4, m)] == ids(16, 0)


def test_seeds_and_passes_give_different_orders() -> None:
    keys = [(seed, data_pass) for seed in range(8) for data_pass in range(8)]
    orders = {tuple(permute(n, 50, seed=seed, data_pass=data_pass) for n in range(50)) for seed, data_pass in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("size", [3, 10, 64, 65])
def test_every_place_is_equally_likely(size: int) -> None:
    passes = 2000
    counts = Counter(permute(0, size, seed=1, data_pass=data_pass) for data_pass in range(passes))
    chi_squared = sum((counts[place] - passes / size) ** 2 / (passes / size) for place in range(size))
    freedom = size - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5, "five standard deviations from uniform"


def test_neighbours_do_not_stay_together() -> None:
    order = [permute(n, 10_000, seed=1234, data_pass=0) for n in range(10_000)]
    close = sum(abs(after - before) <= 10 for before, after in pairwise(order))
    assert close < 50, "20 of 10,000 are expected of a random order"


def test_the_order_never_changes_between_releases() -> None:
    """A resumed run goes on with the samples that its first half left: these numbers are part of the run's mathematics."""
    assert [permute(n, 10, seed=1234, data_pass=0) for n in range(10)] == [8, 5, 2, 1, 0, 9, 7, 6, 3, 4]
    assert sample_ids(7, 1, num_windows=100, global_batch_size=8, micro_batch_size=4, seed=1234) == [75, 43, 88, 78]


def test_validation_sees_the_same_windows_every_time_and_each_once() -> None:
    def micro_batch(index: int) -> list[int]:
        return held_out_ids(index, num_windows=12, micro_batch_size=4)

    assert micro_batch(1) == micro_batch(1)
    assert sorted(micro_batch(0) + micro_batch(1) + micro_batch(2)) == list(range(12))
    assert micro_batch(3) == micro_batch(0), "when all were used it begins again"


def test_a_held_out_text_smaller_than_a_micro_batch_wraps_around() -> None:
    ids = held_out_ids(0, num_windows=2, micro_batch_size=5)
    assert len(ids) == 5 and set(ids) == {0, 1}


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_a_bug(index: int) -> None:
    with pytest.raises(ValueError, match="expected 0 … 9"):
        permute(index, 10, seed=0, data_pass=0)


def test_no_windows_is_a_bug_not_an_endless_walk() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sample_ids(0, 0, num_windows=0, global_batch_size=4, micro_batch_size=4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        held_out_ids(0, num_windows=0, micro_batch_size=4)
