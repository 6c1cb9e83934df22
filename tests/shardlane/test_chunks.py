"""Tensor ↔ bytes: nothing is copied that need not be, nothing is taken that does not fit."""

from __future__ import annotations

import pytest
import torch

from shardlane import chunks, wire
from shardlane.chunks import Assembly, BufferPool
from shardlane.errors import MalformedError
from shardlane.pb import tensor_pb2

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8]


def piece(tensor: torch.Tensor, offset: int) -> tensor_pb2.Slice:
    dtype = tensor_pb2.DType.Name(chunks.dtype_to_wire(tensor.dtype))
    return tensor_pb2.Slice(dtype=dtype, offset=offset, total=tensor.numel() * tensor.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_numbers_are_those_of_the_proto(dtype: torch.dtype) -> None:
    number = chunks.dtype_to_wire(dtype)
    assert tensor_pb2.DType.Name(number) == "D_TYPE_" + str(dtype).removeprefix("torch.").upper()
    assert wire.ELEMENT_BYTES[number] == dtype.itemsize
    assert chunks.dtype_from_wire(number) is dtype


def test_every_dtype_of_the_proto_is_known() -> None:
    assert {chunks.dtype_to_wire(dtype) for dtype in DTYPES} == set(tensor_pb2.DType.values()) - {0}
    with pytest.raises(MalformedError, match="dtype 9"):
        chunks.dtype_from_wire(9)
    with pytest.raises(ValueError, match="float64"):
        chunks.dtype_to_wire(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_byte_view_is_the_tensor_itself(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).reshape(2, 3)
    view = chunks.byte_view(tensor)
    assert (view.format, view.nbytes, view.readonly) == ("B", 6 * dtype.itemsize, False)
    view[:] = bytes(view.nbytes)
    assert torch.equal(tensor, torch.zeros(2, 3, dtype=dtype))


def test_a_byte_view_of_a_parameter_or_a_scalar() -> None:
    assert len(chunks.byte_view(torch.nn.Parameter(torch.ones(3)))) == 12
    assert bytes(chunks.byte_view(torch.tensor(1, dtype=torch.int32))) == b"\1\0\0\0"


@pytest.mark.parametrize("tensor", [torch.ones(2, 3).T, torch.ones(2, device="meta")])
def test_a_tensor_with_gaps_or_elsewhere_has_no_byte_view(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        chunks.byte_view(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_in_order_make_the_tensor(dtype: torch.dtype) -> None:
    source, target = torch.arange(10).to(dtype), torch.zeros(10, dtype=dtype)
    assembly, view, size = Assembly(target, "chunk 3"), chunks.byte_view(source), dtype.itemsize
    assert not assembly.add(piece(source, 0), view[: 4 * size])
    assert not assembly.add(piece(source, 4 * size), bytes(view[4 * size : 8 * size]))
    assert assembly.add(piece(source, 8 * size), view[8 * size :])
    assert assembly.complete
    assert torch.equal(source, target)


def test_a_misaligned_payload_lands_aligned() -> None:
    source = torch.arange(4, dtype=torch.float32)
    payload = memoryview(b"x" + bytes(chunks.byte_view(source)))[1:]
    target = BufferPool(0).take(4)
    assert Assembly(target, "chunk 0").add(piece(source, 0), payload)
    assert torch.equal(source, target)
    assert target.data_ptr() % 64 == 0


@pytest.mark.parametrize(("offset", "length"), [(12, 4), (4, 4), (0, 4), (8, 12)], ids=["gap", "overlap", "again", "beyond"])
def test_gaps_and_overlaps_are_refused_and_harm_nothing(offset: int, length: int) -> None:
    source, target = torch.arange(4, dtype=torch.float32), torch.zeros(4)
    assembly, view = Assembly(target, "chunk 7"), chunks.byte_view(source)
    assembly.add(piece(source, 0), view[:8])
    with pytest.raises(MalformedError, match=r"chunk 7: .* begin at 8"):
        assembly.add(piece(source, offset), bytes(length))
    assert assembly.add(piece(source, 8), view[8:])
    assert torch.equal(source, target)


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(4, dtype=torch.int32)], ids=["total", "dtype"])
def test_another_total_or_dtype_is_refused(other: torch.Tensor) -> None:
    assembly = Assembly(torch.zeros(4), "chunk 7")
    with pytest.raises(MalformedError, match="chunk 7: a piece of"):
        assembly.add(piece(other, 0), bytes(4))


def test_a_restarted_assembly_begins_at_zero() -> None:
    source, target = torch.arange(4, dtype=torch.float32), torch.zeros(4)
    assembly = Assembly(target, "chunk 7")
    assembly.add(piece(source, 0), bytes(8))
    assembly.restart()
    assert assembly.add(piece(source, 0), chunks.byte_view(source))
    assert torch.equal(source, target)


def test_buffers_are_used_again_up_to_the_bound() -> None:
    pool = BufferPool(keep_bytes_max=100)
    first, second = pool.take(16), pool.take(16)
    address = first.data_ptr()
    pool.give(first)
    pool.give(second.reshape(4, 4))  # beyond the bound: freed
    assert pool.free_bytes == 64
    again = pool.take(8, torch.int64)
    assert (again.data_ptr(), again.dtype, again.shape) == (address, torch.int64, (8,))
    assert pool.free_bytes == 0
