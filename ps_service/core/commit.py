"""The decision of a step: a pure function of one record of every chunk of the model (invariant 4)."""

from __future__ import annotations

from collections.abc import Sequence

from ps_service.core.messages import Decision, Record
from shardlane import rates
from shardlane.cadence import checkpoints_at
from shardlane.config import Config
from shardlane.ids import ChunkId, Step
from shardlane.plan import REQUEST_CHECKPOINT, REQUEST_STOP
from shardlane.tally import Tally


def decide(step: Step, records: Sequence[Record], *, config: Config, loss_chunk: ChunkId) -> Decision:
    """`records[c]` is chunk c's record of `step`. Norms add up in chunk order, so no placement can change a bit."""
    tokens = records[loss_chunk].tokens
    clip = rates.clip_scale([record.square_norm for record in records], tokens, config.optimizer.max_grad_norm)
    requests = 0
    for record in records:
        requests |= record.requests
    version = step + 1
    stop = version == config.train.last_step or bool(requests & REQUEST_STOP)
    return Decision(
        skipped=not clip.finite,
        scale=clip.scale,
        grad_norm=clip.grad_norm,
        learning_rate=rates.update_rate(step, config),
        tokens=tokens,
        loss=records[loss_chunk].loss / tokens if tokens else 0.0,
        tally=Tally.over([record.tally for record in records]),
        requests=requests,
        checkpoint=stop or bool(requests & REQUEST_CHECKPOINT) or checkpoints_at(version, config),
        stop=stop,
    )
