"""Who plays in these tests: a small config, members by name, reports that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.core.beginning import Beginning
from coordinator.core.events import CheckpointReport, Effect, Heartbeat, Note, Registration, StepSummary, ValidationReport
from coordinator.core.run import Run
from shardlane import config as configs
from shardlane.config import Config
from shardlane.ids import PROTOCOL_VERSION, ChunkId, Incarnation, PlanNumber, RunId, Step, Timeline, Version
from shardlane.ledger import Expected
from shardlane.manifest import checkpoint_folder, tensor_names
from shardlane.partition import Layout
from shardlane.plan import Role
from shardlane.tally import LaneRun, Tally

RUN = RunId("run-0123")
CPU = "a cpu, torch 2, threads 1, fp32"


def small_config(**changes: Any) -> Config:
    """Two stages, one replica, two shards, four lanes, four steps; the last version is validated and checkpointed."""
    config = configs.build(
        {
            "model": {"preset": "tiny", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 64},
            "train": {"seq_len": 8, "micro_batch_size": 1, "global_batch_size": 4, "lanes": 4, "max_steps": 4},
            "validation": {"num_micro_batches": 2},
            "cluster": {"stages": 2, "replicas": 1, "shards": 2, "lease_seconds": 1.0},
        }
    )
    return config.with_changes({key.replace("__", "."): value for key, value in changes.items()})


def incarnation(name: str) -> Incarnation:
    """`shard 1` is shard-01."""
    role, number = name.split()
    return Incarnation(f"{role}-{int(number):02d}")


def registration(name: str, *, address: str = "", **changes: Any) -> Registration:
    role: Role = "shard" if name.startswith("shard") else "worker"
    values: dict[str, Any] = {
        "incarnation": incarnation(name),
        "role": role,
        "address": address or f"{name.replace(' ', '')}.local:50051",
        "numerics_class": CPU,
        "metrics_address": "",
        "protocol_version": PROTOCOL_VERSION,
        "run_id": "",
        **changes,
    }
    return Registration(**values)


def tally(config: Config | None = None) -> Tally:
    """Of a step in which all is as it should be."""
    expects = Expected.of(config or small_config())
    return Tally(expects.tables, (LaneRun(0, expects.lanes, 1, 1),))


def summary(step: int, *, requests: int = 0, tokens: int = 32) -> StepSummary:
    return StepSummary(Step(step), 5.0 - step, 1.0, 1e-3, tokens, tally(), False, requests)


def beat(run: Run, name: str, *steps: StepSummary, plan: PlanNumber | None = None, is_leaving: bool = False) -> Heartbeat:
    known = plan or (run.plan.number if run.plan else PlanNumber(0, 0))
    return Heartbeat(incarnation(name), known, run.version, steps, is_leaving=is_leaving)


def validation(name: str, version: int, index: int, loss_sum: float = 8.0, tokens: int = 8) -> ValidationReport:
    return ValidationReport(incarnation(name), Version(version), index, loss_sum, tokens)


def part(
    config: Config, name: str, version: int, chunks: Sequence[int], error: str = "", *, timeline: int = 0
) -> CheckpointReport:
    checksums = dict.fromkeys(tensor_names(config.optimizer.name), "0" * 16)
    return CheckpointReport(
        incarnation(name), Version(version), version, f"part-{incarnation(name)}.safetensors", 64,
        {ChunkId(chunk): checksums for chunk in chunks}, error, timeline,
    )  # fmt: skip


def num_chunks(config: Config) -> int:
    return len(Layout.of(config).chunks)


def fresh_run(config: Config, **beginning: Any) -> Run:
    values: dict[str, Any] = {"run_id": RUN, "term": 1, "timeline": Timeline(0, Version(0)), **beginning}
    return Run(config, Beginning(**values), now=0.0)


def join(run: Run, *names: str, now: float = 0.0) -> list[Effect]:
    effects: list[Effect] = []
    for name in names:
        refusal, more = run.on_register(registration(name), now)
        assert refusal is None
        effects += more
    return effects


def deeds(effects: Sequence[Effect]) -> list[Effect]:
    """Without lines for the log."""
    return [effect for effect in effects if not isinstance(effect, Note)]


def write_token_folder(folder: Path, *, vocab_size: int = 64, num_tokens: int = 512) -> None:
    """A folder as `shardlane prepare` makes it, as far as the coordinator looks."""
    folder.mkdir(parents=True)
    split = {"num_tokens": num_tokens, "num_documents": 1, "sha256": "0" * 64, "offsets_sha256": "0" * 64}
    index = {"format_version": 1, "dtype": "uint16", "vocab_size": vocab_size, "end_of_text_id": 0, "tokenizer_sha256": "1" * 64}
    index |= {"train": split, "held_out": split, "source": "here", "unigram_entropy_nats": 1.5}
    (folder / "index.json").write_text(json.dumps(index))
    for name in ("train.bin", "held_out.bin"):
        (folder / name).write_bytes(bytes(2 * num_tokens))


def write_part(root: Path, report: CheckpointReport) -> None:
    """The part file that a report tells of, as far as the coordinator looks."""
    folder = checkpoint_folder(root, report.version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / report.file).write_bytes(bytes(report.num_bytes))
