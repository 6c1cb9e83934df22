"""Fewer bytes for gradients on their way to the shards, which add them up in fp32 whatever they came in.

Where a code rounds, a lane's part of one chunk is encoded by itself, as a pure function of its values and of what it is of
(step, lane, site, chunk): whoever computes it again sends the same bytes, so recovery stays exact to the bit. Torch operations
only; every one of them is element by element or a maximum, so that neither alignment nor number of threads can change a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardlane.errors import MalformedError

BLOCK_ELEMENTS = 256  # that share a scale: 1.6 % more bytes than the int8 values alone
GROUP_ELEMENTS = 16  # 64 bytes, of which chunks are multiples
FP16_MAX = 65504.0
_HASHED_AT_ONCE = 1 << 16  # elements on a CPU, so that ten passes over them stay in the cache


@dataclass(frozen=True, slots=True)
class Encoded:
    """`data`: uint8 [num_bytes], on the device of the values. `overflowed`: one was beyond the dtype's range, and was scaled."""

    data: Tensor
    overflowed: bool = False


class Codec(Protocol):
    """One way for fp32 values [n] to travel. `number` is `shardlane.ps.v1.Codec`'s.

    What is lossless may be taken of any sum, and of no fixed size; what rounds is taken of single lanes only.
    """

    number: int
    is_lossless: bool
    keeps_residual: bool  # what it leaves out is to be added to the next step's values

    def num_bytes(self, num_elements: int) -> int:
        """Of a code that rounds; the most that a lossless one takes."""

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        """`values`: fp32 [n], contiguous. `nonce`: 32 bits that no other contribution of the run shares by more than chance."""

    def decode(self, data: Tensor, out: Tensor) -> None:
        """`data`: uint8 [num_bytes(n)], aligned to 4 bytes; `out`: fp32 [n]. Raises `MalformedError`."""


class Touched:
    """Only the groups of `GROUP_ELEMENTS` that are not all zeros: of a look-up's gradient, the rows of tokens that occurred. The
    groups go first, a bit each, lowest first.
    """

    number = 5
    is_lossless = True
    keeps_residual = False

    def num_bytes(self, num_elements: int) -> int:
        num_groups = -(-num_elements // GROUP_ELEMENTS)
        return -(-num_groups // 8) + 4 * GROUP_ELEMENTS * num_groups

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        groups = _padded(values, GROUP_ELEMENTS)
        touched = groups.view(torch.int32).ne(0).any(dim=1)  # by bits: -0.0 is none of our zeros
        bits = _padded(touched.to(torch.uint8), 8) << torch.arange(8, dtype=torch.uint8, device=values.device)
        return Encoded(torch.cat((bits.sum(dim=1, dtype=torch.uint8), groups[touched].view(-1).view(torch.uint8))))

    def decode(self, data: Tensor, out: Tensor) -> None:
        num_groups = -(-out.numel() // GROUP_ELEMENTS)
        num_bit_bytes = -(-num_groups // 8)
        bits = (data[:num_bit_bytes, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).view(-1)
        touched, num_due = bits[:num_groups].bool(), 4 * GROUP_ELEMENTS * int(bits.sum())
        if data.numel() != num_bit_bytes + num_due or bool(bits[num_groups:].any()):
            raise MalformedError(
                f"{int(bits.sum())} groups of {num_groups} take {num_bit_bytes + num_due} bytes; found {data.numel()}"
            )
        whole = torch.zeros(num_groups, GROUP_ELEMENTS)
        whole[touched] = data[num_bit_bytes:].clone().view(torch.float32).view(-1, GROUP_ELEMENTS)  # aligned by the copy
        out.copy_(whole.view(-1)[: out.numel()])


class Bf16:
    """Rounded to nearest even: a relative error of at most 2^-8."""

    number = 1
    is_lossless = False
    keeps_residual = False

    def num_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        return Encoded(values.to(torch.bfloat16).view(torch.uint8))

    def decode(self, data: Tensor, out: Tensor) -> None:
        out.copy_(data.view(torch.bfloat16))


class Fp16:
    """Scaled by a power of two, which is exact, so that the largest value lies in [2^14, 2^15): nothing overflows, and an error
    is at most 2^-11 of a value, or 2^-40 of the largest one. The scale goes first, as fp32.
    """

    number = 2
    is_lossless = False
    keeps_residual = False

    def num_bytes(self, num_elements: int) -> int:
        return 4 + 2 * num_elements

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        largest = values.abs().max()
        _, exponent = torch.frexp(largest)  # largest < 2^exponent
        scale = torch.ldexp(torch.ones_like(largest), (15 - exponent).clamp(-126, 126))
        scale = torch.where(torch.isfinite(largest) & (largest > 0), scale, torch.ones_like(scale))
        data = torch.cat((scale.reshape(1).view(torch.uint8), (values * scale).to(torch.float16).view(torch.uint8)))
        return Encoded(data, overflowed=bool(largest > FP16_MAX))

    def decode(self, data: Tensor, out: Tensor) -> None:
        scale = data[:4].view(torch.float32)
        if not bool(torch.isfinite(scale) & (scale > 0)):
            raise MalformedError(f"the scale of fp16 values is {scale.item()}; expected a positive number")
        out.copy_(data[4:].view(torch.float16)).div_(scale)


class Int8:
    """Blocks of `BLOCK_ELEMENTS` in steps of their largest value over 127. The scales go first, as fp32.

    To the nearest step (an error of at most half of one), or `stochastic`: up with the probability of the part below, by a
    generator that counts elements from `nonce`, so that the error, less than one step, is 0 in the mean.
    """

    is_lossless = False
    keeps_residual = False

    def __init__(self, *, stochastic: bool) -> None:
        self.number = 4 if stochastic else 3
        self._stochastic = stochastic

    def num_bytes(self, num_elements: int) -> int:
        return 4 * _num_blocks(num_elements) + num_elements

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        return Encoded(in_steps(values, nonce if self._stochastic else None))

    def decode(self, data: Tensor, out: Tensor) -> None:
        from_steps(data, out)


def in_steps(values: Tensor, nonce: int | None = None) -> Tensor:
    """`values`, fp32 [n], as `Int8` has them: uint8. `nonce`: rounds by chance."""
    blocks = _padded(values, BLOCK_ELEMENTS)
    scales = blocks.abs().amax(dim=1).div_(127.0)
    finite = torch.isfinite(scales)
    steps = blocks / scales.masked_fill(~finite | (scales == 0), 1.0)[:, None]
    steps.masked_fill_(~finite[:, None], 0.0)  # its scale says that the block is not finite, and the step is skipped
    if nonce is None:
        steps.round_()
    else:
        steps.view(-1).narrow(0, 0, values.numel()).add_(_uniform(values.numel(), nonce, values.device)).floor_()
    whole = steps.clamp_(-127, 127).to(torch.int8).view(-1)[: values.numel()]
    return torch.cat((scales.view(torch.uint8), whole.view(torch.uint8)))


def from_steps(data: Tensor, out: Tensor) -> None:
    """Back to `out`, fp32 [n]. Raises `MalformedError`."""
    num_elements = out.numel()
    num_scale_bytes = 4 * _num_blocks(num_elements)
    scales = data[:num_scale_bytes].view(torch.float32)
    if bool((scales < 0).any()):
        raise MalformedError(f"the scale of a block of int8 values is {scales.min().item()}; expected none below 0")
    out.copy_(data[num_scale_bytes:].view(torch.int8))
    full = num_elements // BLOCK_ELEMENTS
    out[: full * BLOCK_ELEMENTS].view(full, BLOCK_ELEMENTS).mul_(scales[:full, None])
    out[full * BLOCK_ELEMENTS :].mul_(scales[full:])


def _num_blocks(num_elements: int) -> int:
    return -(-num_elements // BLOCK_ELEMENTS)


def _padded(values: Tensor, row: int) -> Tensor:
    """[rows, row], the last one filled up with zeros."""
    missing = -values.numel() % row
    return (torch.cat((values, values.new_zeros(missing))) if missing else values).view(-1, row)


def _uniform(num_elements: int, nonce: int, device: torch.device) -> Tensor:
    """fp32 [num_elements] in [0, 1), 24 bits each: a hash of (nonce, element).

    Two rounds of the 32-bit mixer of C. Wellons' "hash-prospector" (lowbias32), in int32 arithmetic that wraps around.
    """
    at_once = _HASHED_AT_ONCE if device.type == "cpu" else num_elements
    out = torch.empty(num_elements, dtype=torch.float32, device=device)
    for start in range(0, num_elements, at_once):
        count = min(at_once, num_elements - start)
        x = torch.arange(start, start + count, dtype=torch.int32, device=device)
        x = _mixed(_mixed(x) ^ _signed(nonce))
        out[start : start + count] = (x >> 8) & 0xFFFFFF  # an arithmetic shift: the sign's copies are masked away
    return out.mul_(2.0**-24)


def _mixed(x: Tensor) -> Tensor:
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(bits: int) -> int:
    """The int32 of the same 32 bits."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits
