"""Training one model: our cluster, every process counted, beside torch.distributed.pipelining's 1F1B over gloo.

Two stages of one thread each, the same model code, micro-batches, AdamW and clipping; ours with the zero-bubble schedule, its
shard and its coordinator on the same cores. Pairs alternate. With --device cuda a larger model in bf16, two stages on one
device, beside plain PyTorch.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import harness
from benchmarks.children import Child, free_port
from benchmarks.harness import Report, Spread, Target, alternate, arguments
from benchmarks.pipeline_cluster import Measured, run_cluster
from shardlane.config import Config, load, to_toml
from shardlane.prepare import ensure_prepared

CONFIG = Path(__file__).parents[1] / "configs" / "20m.toml"
NUM_STAGES = 2
OURS = "ours, 2 stages and 1 shard"
PEERS = {"cpu": "torch.distributed.pipelining 1F1B, gloo", "cuda": "plain PyTorch, one process"}
TARGETS = {"cpu": Target(1.0, 0.97), "cuda": None}  # on one device there is no second one to pipeline over
COMMON = {
    "cluster.stages": NUM_STAGES,
    "cluster.replicas": 1,
    "cluster.shards": 1,
    "validation.num_micro_batches": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.resume": "never",
    "train.max_steps": 100_000,  # a round is stopped when it has been measured
}
LARGE = {  # 325 M parameters
    "model.preset": "",
    "model.vocab_size": 8192,
    "model.hidden_size": 1024,
    "model.intermediate_size": 2816,
    "model.num_hidden_layers": 24,
    "model.num_attention_heads": 16,
    "model.num_key_value_heads": 16,
    "train.seq_len": 512,
    "train.micro_batch_size": 8,
    "train.global_batch_size": 128,
    "numerics.precision": "bf16",
}


def config_for(device: str, file: Path) -> Config:
    config = load(file)
    return config.with_changes({**(LARGE if device == "cuda" else {}), **COMMON})


def ideal_bubble(num_micro_batches: int) -> float:
    """(P - 1) / (M + P - 1), stages of equal length."""
    return (NUM_STAGES - 1) / (num_micro_batches + NUM_STAGES - 1)


def subjects(
    config: Config, file: Path, folder: Path, peer: Child, *, warm_up: int, steps: int, device: str, seen: list[Measured]
) -> dict[str, Callable[[], float]]:
    tokens_a_step = config.train.global_batch_size * config.train.seq_len

    def ours() -> float:
        run_dir = folder / f"run-{len(seen)}"
        measured = run_cluster(file, run_dir, (), warm_up=warm_up, steps=steps, tokens_a_step=tokens_a_step, device=device)
        seen.append(measured)
        return measured.tokens_per_second

    def peers() -> float:
        return tokens_a_step * steps / float(peer.ask(steps=steps))

    return {OURS: ours, PEERS[device]: peers}


def start_peers(config: Config, file: Path, data: Path, device: str) -> list[Child]:
    """The one to ask comes last."""
    roles = ["plain"] if device == "cuda" else ["stage1", "stage0"]
    port = str(free_port())
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    threads = config.numerics.threads
    made = [
        Child("benchmarks.pipeline_peer", role, str(file), str(data), device, port, threads=threads, environment=hidden)
        for role in roles
    ]
    made[-1].read()
    return made


def main(argv: list[str]) -> int:
    parser = arguments("pipeline", __doc__, rounds=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of ours before them (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="another model (default: configs/20m.toml)")
    options = parser.parse_args(argv)
    config = config_for(options.device, options.config)
    report = Report("pipeline", "tokens/s")
    seen: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="shardlane-pipeline-") as temporary:
        folder = Path(temporary)
        data = ensure_prepared(config, folder, lambda line: print(line, file=sys.stderr)).path
        file = folder / "config.toml"
        config = config.with_changes({"data.path": str(data)})
        file.write_text(to_toml(config), encoding="utf-8")
        *others, asked = start_peers(config, file, data, options.device)
        try:
            asked.ask(steps=1)
            chosen = {"warm_up": options.warm_up, "steps": options.steps, "device": options.device}
            runs = subjects(config, file, folder, asked, seen=seen, **chosen)
            report.samples = alternate(runs, rounds=options.rounds, warm_up=0)
        finally:
            for child in (asked, *others):
                child.__exit__(None, None, None)
    report.compare(OURS, PEERS[options.device], TARGETS[options.device], name="tokens/s: ours / peer")
    add_bubble(report, config, seen)
    return harness.finish(report, options)


def add_bubble(report: Report, config: Config, seen: list[Measured]) -> None:
    bubble, ideal = Spread.of([each.bubble for each in seen]), ideal_bubble(config.train.num_micro_batches)
    report.extra["bubble"] = {**bubble.as_json(), "ideal": ideal}
    report.extra["phases"] = [each.phases for each in seen]
    report.notes.append(
        f"bubble {bubble.median:.3f} ({bubble.low:.3f} to {bubble.high:.3f});"
        f" 1F1B's is (P - 1) / (M + P - 1) = {ideal:.3f} at best with P = {NUM_STAGES}, M = {config.train.num_micro_batches}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
