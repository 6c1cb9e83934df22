"""`shardlane size`: what a run takes of memory, links and disk."""

from __future__ import annotations

import typer

from shardlane.cli.arguments import ConfigCommand, ConfigFile, Replicas, Shards, Stages, load_config

EPILOG = """[bold]Examples[/bold]

shardlane size configs/demo.toml --stages 2 --replicas 2 --shards 2

shardlane size configs/llama-3.2-1b.toml --stages 4 --shards 8 --communication.push int8

Any setting of the config is an option, --section.key value. A megabyte has 10^6 bytes."""


def register(app: typer.Typer) -> None:
    app.command("size", cls=ConfigCommand, epilog=EPILOG)(size)


def size(
    context: typer.Context, config_file: ConfigFile, stages: Stages = None, replicas: Replicas = None, shards: Shards = None
) -> None:
    """Say what a run will take, by its config: memory of a shard and of a worker, bytes a step, disk. Nothing is started.

    Memory is what is held for good. A process takes about 400 MB for Python and torch besides, a worker its activations, and
    both take queues, whose bounds are settings.
    """
    from shardlane import sizing
    from shardlane.partition import Layout, state_names

    config = load_config(context, config_file, {"cluster.stages": stages, "cluster.replicas": replicas, "cluster.shards": shards})
    memory, traffic, checkpoint = sizing.memory(config), sizing.traffic(config), sizing.checkpoint_bytes(config)
    cluster, train, transport = config.cluster, config.train, config.transport
    states = len(state_names(config.optimizer.name, train.num_past))
    copies = cluster.num_copies(cluster.shards)
    total = traffic.activations + traffic.pushes + traffic.pulls + traffic.copies
    print(f"model       {Layout.of(config).num_parameters:,} parameters, {_mb(memory.model)} in fp32")
    print(f"shape       {cluster.stages} stages x {cluster.replicas} replicas, {cluster.shards} shards, {copies} copies")
    print(f"shard       {_mb(memory.shard)}: weights, {states} states and a sum of its share, and of the copies it keeps")
    print(f"worker      {_mb(memory.stage)}: weights, a gradient and partial sums of the fullest stage")
    print(f"            queues at most {_mb(transport.inbox_bytes)} in and {_mb(transport.push_queue_bytes)} out")
    print(f"network     {_mb(total)} a step of {train.global_batch_size * train.seq_len:,} tokens, all links together:")
    print(f"            {_mb(traffic.activations)} activations and their gradients, between stages")
    print(f"            {_mb(traffic.pushes)} gradients to shards, {_mb(traffic.pulls)} parameters from them")
    print(f"            {_mb(traffic.copies)} between shards, for the copies")
    kept = config.checkpoint.keep_last
    print(f"checkpoint  {_mb(checkpoint)}; {kept} are kept, and one more while it is written: {_mb(checkpoint * (kept + 1))}")


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f} GB"
