"""Data by arithmetic (invariant 3): which windows of the token file make up micro-batch *(t, m)*.

A pure function of the config. There is no iterator to save, and any worker can produce any micro-batch of any step.

The order of a pass is a keyed bijection of 0 … size-1: a Feistel network over the next even power of two, walked along its
cycle until it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). O(1) in time and memory; the
domain is less than four times `size`, so a walk takes fewer than four networks on average.
"""

from __future__ import annotations

_MASK_64 = (1 << 64) - 1
_GOLDEN_64 = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: splitmix64's increment
_NUM_ROUNDS = 6  # 4 make a strong pseudo-random permutation (Luby and Rackoff); small domains deserve some more
_HELD_OUT_SEED = 0  # not the run's: validation losses of two runs on the same data are over the same text


def permute(index: int, size: int, *, seed: int, data_pass: int) -> int:
    """Where `index` lands in pass `data_pass`: for every key a bijection of 0 … size-1.

    Raises `ValueError` for an index outside 0 … size-1.
    """
    if not 0 <= index < size:
        raise ValueError(f"index is {index}; expected 0 … {size - 1}")
    half_bits = ((size - 1).bit_length() + 1) // 2
    half_mask = (1 << half_bits) - 1
    key = _mix(_mix(seed) + data_pass)
    round_keys = [_mix(key + r * _GOLDEN_64) for r in range(1, _NUM_ROUNDS + 1)]
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & half_mask)
        index = left << half_bits | right
        if index < size:  # outside: walk on; the cycle through a point inside comes back inside
            return index


def sample_ids(
    step: int, micro_batch: int, *, num_windows: int, global_batch_size: int, micro_batch_size: int, seed: int
) -> list[int]:
    """The `micro_batch_size` window ids of micro-batch (t, m), in order.

    Sample n of the run is window `permute(n mod num_windows)` of pass n // num_windows: each window is seen once a pass, and a
    step may straddle two passes. Raises `ValueError` if there is no window.
    """
    if num_windows < 1:
        raise ValueError(f"num_windows is {num_windows}; expected at least 1")
    first = step * global_batch_size + micro_batch * micro_batch_size
    return [
        permute(n % num_windows, num_windows, seed=seed, data_pass=n // num_windows)
        for n in range(first, first + micro_batch_size)
    ]


def held_out_ids(index: int, *, num_windows: int, micro_batch_size: int) -> list[int]:
    """The window ids of validation micro-batch `index`: the same at every validation, spread over the held-out text.

    No window repeats before all were used; then it begins again. Raises `ValueError` if there is no window.
    """
    if num_windows < 1:
        raise ValueError(f"num_windows is {num_windows}; expected at least 1")
    first = index * micro_batch_size
    return [
        permute(n % num_windows, num_windows, seed=_HELD_OUT_SEED, data_pass=0) for n in range(first, first + micro_batch_size)
    ]


def _mix(value: int) -> int:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014; constants by Stafford): integer → 64 well-mixed bits."""
    value = (value + _GOLDEN_64) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31
