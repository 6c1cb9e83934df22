"""The decision of a step: a pure function of one record of every chunk of the model (invariant 4)."""

from __future__ import annotations

from collections.abc import Sequence

from ps_service.core.messages import Decision, Record
from shardlane import rates
from shardlane.cadence import checkpoints_at
from shardlane.config import Config
from shardlane.ids import ChunkId, Step
from shardlane.plan import DONE, REQUEST_CHECKPOINT, REQUEST_STOP
from shardlane.tally import Tally
from shardlane.turns import is_refused


def decide(step: Step, records: Sequence[Record], *, config: Config, loss_chunk: ChunkId) -> Decision:
    """`records[c]` is chunk c's record of `step`. Norms add up in chunk order, so no placement can change a bit."""
    tokens = records[loss_chunk].tokens
    clip = rates.clip_scale([record.square_norm for record in records], tokens, config.optimizer.max_grad_norm)
    requests = 0
    for record in records:
        requests |= record.requests
    turn, version, refused = records[0].turn, step + 1, False
    if turn is None:
        rate = rates.update_rate(step, config)
    else:
        rate = rates.turn_rate(turn, config)
        refused = is_refused(turn, config.train.staleness_max)
        version, rest = divmod(turn.clock_sum + 1, config.train.lanes)  # in steps, as settings are
        version = 0 if refused or rest else version
        requests |= DONE if version == config.train.last_step else 0
    stop = version == config.train.last_step or bool(requests & REQUEST_STOP)
    return Decision(
        skipped=not clip.finite,
        scale=clip.scale,
        grad_norm=clip.grad_norm,
        learning_rate=rate,
        tokens=tokens,
        loss=records[loss_chunk].loss / tokens if tokens else 0.0,
        tally=Tally.over([record.tally for record in records]),
        requests=requests,
        checkpoint=stop or bool(requests & REQUEST_CHECKPOINT) or checkpoints_at(version, config),
        stop=stop,
        turn=turn,
        refused=refused,
    )
