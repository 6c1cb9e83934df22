"""Codecs: how far a value may be off, the same bytes whoever encodes, and what cannot have been encoded is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shardlane.codecs import BLOCK_ELEMENTS, GROUP_ELEMENTS, Codec
from shardlane.communication import TOUCHED, codec_for, codec_of, nonce_of, pull_dtype
from shardlane.config import CommunicationConfig
from shardlane.errors import MalformedError
from shardlane.partition import EMBEDDING, HEAD, TensorSpec
from shardlane.pb import ps_pb2
from shardlane.top_k import SPAN, Residuals, TopK


def coded(name: str) -> Codec:
    codec = codec_of(CommunicationConfig.model_validate({"push": name, "top_k_fraction": 0.05}))
    assert codec is not None
    return codec


NAMES = ["bf16", "fp16", "int8", "int8_stochastic"]
SPARSE = ["top_k", "top_k_int8"]
CODECS = {name: coded(name) for name in (*NAMES, *SPARSE)}
SIZES = st.integers(1, 3 * BLOCK_ELEMENTS)


def through(codec: Codec, values: torch.Tensor, nonce: int = 7) -> torch.Tensor:
    data = codec.encode(values, nonce).data
    assert (data.dtype, data.numel()) == (torch.uint8, codec.num_bytes(values.numel()))
    out = torch.full_like(values, math.nan)
    codec.decode(data, out)
    return out


def some(size: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale


def bound_of(name: str, values: torch.Tensor) -> torch.Tensor:
    """How far each value may be off, with a little for the arithmetic of the test itself."""
    if name == "bf16":
        return values.abs() * 2.0**-8 + 2.0**-133
    if name == "fp16":
        return values.abs() * 2.0**-11 + values.abs().max() * 2.0**-38 + 2.0**-149
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK_ELEMENTS)).view(-1, BLOCK_ELEMENTS)
    step = (blocks.abs().amax(1) / 127).repeat_interleave(BLOCK_ELEMENTS)[: len(values)]
    return step * (1.0 if name == "int8_stochastic" else 0.5) * 1.001 + 2.0**-140


@pytest.mark.parametrize("name", NAMES)
@given(values=arrays(np.float32, SIZES, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_no_value_is_off_by_more_than_is_promised(name: str, values: np.ndarray) -> None:
    original = torch.from_numpy(values)
    off = (through(CODECS[name], original) - original).abs()
    assert bool((off <= bound_of(name, original)).all()), (off - bound_of(name, original)).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_does_not_become_so(name: str, bad: float) -> None:
    values = some(2 * BLOCK_ELEMENTS + 5)
    values[BLOCK_ELEMENTS + 3] = bad
    assert not bool(torch.isfinite(through(CODECS[name], values)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 255, 256, 257, 70_000])
def test_neither_where_values_lie_nor_how_many_threads_there_are_changes_a_byte(name: str, size: int) -> None:
    codec, values = CODECS[name], some(size)
    expected = codec.encode(values, 3).data
    shifted = torch.empty(size + 1)[1:].copy_(values)
    assert torch.equal(codec.encode(shifted, 3).data, expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(codec.encode(values, 3).data, expected)
    finally:
        torch.set_num_threads(threads)


def test_stochastic_rounding_is_right_in_the_mean_and_differs_from_contribution_to_contribution() -> None:
    codec, values = CODECS["int8_stochastic"], torch.full((1 << 16,), 0.3)
    values[::BLOCK_ELEMENTS] = 127.0  # so that a step is 1
    inner = torch.ones(len(values), dtype=torch.bool)
    inner[::BLOCK_ELEMENTS] = False
    one, other = (through(codec, values, nonce_of(seed=1, step=2, lane=lane, site=0, chunk=4))[inner] for lane in (0, 1))
    for rounded in (one, other):
        assert set(rounded.tolist()) == {0.0, 1.0}
        assert rounded.mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / len(rounded)))
    both = (one * other).mean().item()
    assert both == pytest.approx(0.09, abs=4 * math.sqrt(0.09 * 0.91 / len(one)))  # as of two that know nothing of each other


def test_fp16_scales_what_would_overflow_and_says_so() -> None:
    codec = CODECS["fp16"]
    small, large = codec.encode(some(100), 0), codec.encode(some(100, 1e7), 0)
    assert (small.overflowed, large.overflowed) == (False, True)
    assert bool(torch.isfinite(through(codec, some(100, 1e7))).all())


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("fp16", lambda data: data[:4].view(torch.float32).fill_(0.0)),
        ("fp16", lambda data: data[:4].view(torch.float32).fill_(math.nan)),
        ("fp16", lambda data: data[:4].view(torch.float32).fill_(-2.0)),
        ("int8", lambda data: data[:4].view(torch.float32).fill_(-1.0)),
    ],
)
def test_scales_that_cannot_be_are_refused(name: str, spoil: Callable[[torch.Tensor], object]) -> None:
    data = CODECS[name].encode(some(300), 0).data
    spoil(data)
    with pytest.raises(MalformedError, match="scale"):
        CODECS[name].decode(data, torch.empty(300))


@given(data=st.binary(min_size=700, max_size=700))
def test_any_bytes_of_the_right_number_are_decoded_or_refused(data: bytes) -> None:
    for codec in (*CODECS.values(), TOUCHED):
        received = torch.frombuffer(bytearray(data), dtype=torch.uint8)[: codec.num_bytes(150)].clone()
        try:
            codec.decode(received, torch.empty(150))
        except MalformedError:
            continue


def test_small_tensors_travel_as_they_are() -> None:
    communication = CommunicationConfig(push="int8", pull="bf16", coded_elements_min=100)
    small, large = (TensorSpec(0, HEAD, (size,), (0,), (HEAD,), decay=False) for size in (99, 100))
    assert codec_for(communication, small, 0) is None and codec_for(communication, large, 0) is codec_of(communication)
    assert (pull_dtype(communication, small), pull_dtype(communication, large)) == (torch.float32, torch.bfloat16)
    assert codec_for(CommunicationConfig(), large, 0) is None and pull_dtype(CommunicationConfig(), large) == torch.float32


def test_only_a_look_up_pushes_touched_rows() -> None:
    tied = TensorSpec(0, EMBEDDING, (512, 64), (0, 3), (EMBEDDING, HEAD), decay=True)
    assert [codec_for(CommunicationConfig(), tied, site) for site in (0, 1)] == [TOUCHED, None]
    assert codec_for(CommunicationConfig(touched_rows=False), tied, 0) is None


@given(
    values=arrays(np.float32, SIZES, elements=st.sampled_from([0.0, -0.0, 1.5, -(2.0**-140), math.inf])),
    hidden=st.integers(0, 3 * BLOCK_ELEMENTS),
)
def test_touched_groups_lose_no_bit(values: np.ndarray, hidden: int) -> None:
    values[:hidden] = 0.0
    original = torch.from_numpy(values)
    data = TOUCHED.encode(original, 0).data
    assert data.numel() <= TOUCHED.num_bytes(len(values))
    out = torch.full_like(original, math.nan)
    TOUCHED.decode(data, out)
    assert torch.equal(out.view(torch.int32), original.view(torch.int32))


def test_touched_groups_take_as_many_bytes_as_there_are() -> None:
    gradient = torch.zeros(1000, 64)
    gradient[::50] = 1.0
    data = TOUCHED.encode(gradient.view(-1), 0).data
    assert data.numel() == 1000 * 64 // GROUP_ELEMENTS // 8 + 20 * 64 * 4


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[:-64], lambda data: torch.cat((data, data[-64:]))])
def test_groups_that_do_not_match_their_bits_are_refused(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(MalformedError, match="groups"):
        TOUCHED.decode(spoil(TOUCHED.encode(some(300), 0).data), torch.empty(300))


def test_a_bit_of_no_group_is_refused() -> None:
    data = TOUCHED.encode(torch.zeros(16), 0).data
    data[0] = 2
    with pytest.raises(MalformedError, match="groups"):
        TOUCHED.decode(torch.cat((data, data.new_zeros(64))), torch.empty(16))


def test_the_numbers_are_those_of_the_wire() -> None:
    assert {"CODEC_" + name.upper(): codec.number for name, codec in {**CODECS, "touched": TOUCHED}.items()} == {
        name: number for name, number in ps_pb2.Codec.items() if number
    }
    assert CODECS["int8"].num_bytes(1 << 20) * 3.8 < 4 << 20


# ---- top-k -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPARSE)
@given(values=arrays(np.float32, SIZES, elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_the_largest_values_arrive_and_the_others_are_zeros(name: str, values: np.ndarray) -> None:
    original = torch.from_numpy(values)
    arrived = through(CODECS[name], original)
    num_kept = max(1, int(len(values) * 0.05))
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))[:num_kept]
    left_out = torch.ones(len(values), dtype=torch.bool)
    left_out[order] = False
    assert not bool(arrived[left_out].any())
    kept = original[~left_out]
    bound = kept.abs() * 0 if name == "top_k" else bound_of("int8", kept)
    assert bool(((arrived[~left_out] - kept).abs() <= bound).all())


def test_a_sparse_chunk_of_more_than_one_span() -> None:
    values = some(3 * SPAN + 17)
    arrived = through(CODECS["top_k"], values)
    kept = arrived.nonzero().view(-1)
    assert len(kept) == int(len(values) * 0.05) and torch.equal(arrived[kept], values[kept])
    assert values.abs()[arrived == 0].max() <= arrived[kept].abs().min()


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_chunk_that_is_not_finite_does_not_become_so(name: str) -> None:
    values = some(1000)
    values[400] = math.nan
    assert not bool(torch.isfinite(through(CODECS[name], values)).all())


@pytest.mark.parametrize(
    ("at", "byte", "reason"), [(0, 9, "spans have"), (3, 0x80, "spans have"), (4, 0xFF, "must rise"), (5, 0xFF, "must rise")]
)
def test_places_that_cannot_be_are_refused(at: int, byte: int, reason: str) -> None:
    data = CODECS["top_k"].encode(some(300), 0).data
    data[at] = byte
    with pytest.raises(MalformedError, match=reason):
        CODECS["top_k"].decode(data, torch.empty(300))


def test_one_in_a_hundred_in_int8_takes_a_sixtieth() -> None:
    codec = TopK(0.01, int8=True)
    assert codec.num_bytes(1 << 20) * 60 <= 4 << 20


def test_nothing_is_left_out_for_good() -> None:
    residuals, codec, sent = Residuals(), CODECS["top_k"], torch.zeros(400)
    gradients = [some(400) * (step + 1) for step in range(30)]
    for step, gradient in enumerate(gradients):
        first = residuals.encode(codec, (0, 0, 0), step, gradient, 0).data
        assert torch.equal(residuals.encode(codec, (0, 0, 0), step, gradient, 0).data, first)  # the lane runs again
        out = torch.empty(400)
        codec.decode(first, out)
        sent += out
    left_out = sum(gradients) - sent
    assert residuals.norm == pytest.approx(float(left_out.norm()), rel=1e-4) and residuals.num_begun == 1
    bad = gradients[0].clone()
    bad[0] = math.inf
    residuals.encode(codec, (0, 0, 0), 30, bad, 0)
    assert residuals.norm == pytest.approx(float(left_out.norm()), rel=1e-4)  # that step is skipped
    residuals.begin(0, {(0, 0, 0)})
    assert residuals.norm > 0
    residuals.begin(1, {(0, 0, 0)})
    assert residuals.norm == 0


def test_what_was_left_out_goes_with_the_lane_and_comes_out_alike_when_several_steps_run_again() -> None:
    residuals, codec = Residuals(num_open=3), CODECS["top_k"]
    gradients = [some(400) * (step + 1) for step in range(6)]
    first = [residuals.encode(codec, (0, 0, 0), step, gradient, 0).data for step, gradient in enumerate(gradients)]
    again = [residuals.encode(codec, (0, 0, 0), step, gradients[step], 0).data for step in (3, 4, 5)]
    assert all(torch.equal(one, other) for one, other in zip(first[3:], again, strict=True))
    residuals.begin(0, {(1, 0, 0)})
    assert residuals.norm == 0, "its lane is run by somebody else now"
