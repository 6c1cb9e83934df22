"""Only the largest values travel, and what was left out is added to the next step's: top-k with error feedback.

Stich et al. 2018, "Sparsified SGD with Memory"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD". What has been left out
is state: it stays with the worker that runs the lane, and is gone with it. So this is the one code under which a death, or a lane
that moves, may change bits; it never changes what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from shardlane.codecs import BLOCK_ELEMENTS, Codec, Encoded, from_steps, in_steps
from shardlane.errors import MalformedError

SPAN = 1 << 16  # elements within which a place takes two bytes


class TopK:
    """The `fraction` of a chunk's values that are largest, at least one; among equals the first.

    int32 a span: how many of them lie there; uint16 each: where in its span, in order; then the values: fp32, or int8 in steps
    of the largest of every `BLOCK_ELEMENTS` over 127, with these scales before them.
    """

    is_lossless = False
    keeps_residual = True

    def __init__(self, fraction: float, *, int8: bool) -> None:
        self.number = 7 if int8 else 6
        self._fraction, self._int8 = fraction, int8

    def num_kept(self, num_elements: int) -> int:
        return max(1, int(num_elements * self._fraction))

    def num_bytes(self, num_elements: int) -> int:
        kept = self.num_kept(num_elements)
        values = kept + 4 * -(-kept // BLOCK_ELEMENTS) if self._int8 else 4 * kept
        return 4 * _num_spans(num_elements) + 2 * kept + values

    def encode(self, values: Tensor, nonce: int) -> Encoded:
        places = _largest(values, self.num_kept(values.numel()))
        counts = torch.bincount(places // SPAN, minlength=_num_spans(values.numel())).to(torch.int32)
        within = (places % SPAN).to(torch.int32).view(torch.uint8).view(-1, 4)[:, :2].reshape(-1)  # the lower bytes
        kept = values[places]
        return Encoded(torch.cat((counts.view(torch.uint8), within, in_steps(kept) if self._int8 else kept.view(torch.uint8))))

    def decode(self, data: Tensor, out: Tensor) -> None:
        num_spans, num_kept = _num_spans(out.numel()), self.num_kept(out.numel())
        head, end = 4 * num_spans, 4 * num_spans + 2 * num_kept
        counts = data[:head].view(torch.int32).to(torch.int64)
        if bool((counts < 0).any()) or int(counts.sum()) != num_kept:
            raise MalformedError(f"{num_kept} values of {out.numel()} were expected; the spans have {counts.tolist()[:8]}")
        pairs = data[head:end].view(-1, 2).to(torch.int64)
        places = pairs[:, 0] + (pairs[:, 1] << 8) + SPAN * torch.repeat_interleave(torch.arange(num_spans), counts)
        if int(places[-1]) >= out.numel() or bool((places[1:] <= places[:-1]).any()):
            raise MalformedError(f"places within 0..{out.numel() - 1} must rise, each its own; found {places.tolist()[:8]}")
        values = torch.empty(num_kept)
        if self._int8:
            from_steps(data[end:].clone(), values)  # aligned by the copy
        else:
            values.copy_(data[end:].clone().view(torch.float32))
        out.zero_()
        out[places] = values


def _num_spans(num_elements: int) -> int:
    return -(-num_elements // SPAN)


def _largest(values: Tensor, num_kept: int) -> Tensor:
    """int64 [num_kept], rising. Which of equal values `torch.topk` takes is not said, so only its threshold is used."""
    size = values.abs().nan_to_num_(nan=math.inf)
    threshold = size.topk(num_kept).values.min()
    above = size > threshold
    equal = torch.nonzero(size == threshold).view(-1)[: num_kept - int(above.sum())]
    return torch.cat((torch.nonzero(above).view(-1), equal)).sort().values


Place = tuple[int, int, int]  # lane, site, chunk


@dataclass(slots=True)
class _Residual:
    before: dict[int, Tensor | None]  # of the newest steps, for a lane that runs again; None: zeros
    after: Tensor  # of the last of them


class Residuals:
    """What was left out, by lane, site and chunk. One thread encodes; others may ask for `norm`."""

    def __init__(self, num_open: int = 1) -> None:
        """`num_open`: steps that may be open at a time, and so run again."""
        self._num_open = num_open
        self._timeline = 0
        self._held: dict[Place, _Residual] = {}
        self._square_norms: dict[Place, float] = {}
        self.num_begun = 0  # with nothing, for want of what an earlier step has left out

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(list(self._square_norms.values())))

    def begin(self, timeline: int, places: Container[Place]) -> None:
        """What was left out of the steps of another timeline is as void as they are; and what was left out at other places than
        `places` is lost: their lanes go on elsewhere, without it.
        """
        for place in [each for each in self._held if timeline != self._timeline or each not in places]:
            del self._held[place], self._square_norms[place]
        self._timeline = timeline

    def encode(self, codec: Codec, place: Place, step: int, values: Tensor, nonce: int) -> Encoded:
        """`values`, fp32 [n], and what was left out before `step`, if the code leaves anything. The same again gives the same."""
        if not codec.keeps_residual:
            return codec.encode(values, nonce)
        held = self._held.get(place)
        if held is None:
            self.num_begun += 1
            before, earlier = None, dict[int, Tensor | None]()
        else:
            before = held.before.get(step, held.after)
            earlier = {each: left for each, left in held.before.items() if step - self._num_open < each < step}
        total = values.clone() if before is None else values + before
        encoded = codec.encode(total, nonce)
        arrived = torch.empty_like(total, device="cpu")
        codec.decode(encoded.data.cpu(), arrived)
        after = total - arrived.to(total.device)
        square_norm = float(after.square().sum())
        if not math.isfinite(square_norm):  # the step is skipped, and what was left out before it stays so
            after, square_norm = (torch.zeros_like(total), 0.0) if before is None else (before, self._square_norms[place])
        self._held[place], self._square_norms[place] = _Residual({**earlier, step: before}, after), square_norm
        return encoded
