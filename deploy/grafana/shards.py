"""The parameter shards: what they hold, what goes in and out, and how long a version takes to appear."""

from __future__ import annotations

from deploy.grafana.panels import Json, dashboard, median_and_worst, quantile, rate, series, stat
from deploy.grafana.training import BEFORE_CODING, COORDINATOR, PUSHED

SHARD = "shardlane_shard"
SERVICE = 'grpc_service=~".*ParameterShard"'


def shards() -> Json:
    return dashboard(
        "shardlane-shards",
        "Shardlane: parameter shards",
        {
            "Copies": _copies(),
            "Pushes and pulls": _traffic(),
            "From the last lane to the next version": _commit(),
            "Queues and memory": _queues(),
            "Calls": calls(
                SERVICE,
                "of shards",
                latency="99th percentile. A pull waits for its version, and a delivery stays open while there is more to say.",
            ),
        },
    )


def _copies() -> list[Json]:
    return [
        stat("Shards", "Whose lease runs.", f'{COORDINATOR}_members{{role="shard"}}', decimals=0),
        stat("Chunks lacking a copy", "Fewer than they are to have.", f"{COORDINATOR}_under_replicated_chunks", decimals=0),
        stat("Digest mismatches", "Copies that were not their primary's.", f"sum({SHARD}_digest_mismatches_total)", decimals=0),
        stat("Alarms", "Things that must not happen and did.", f"sum({SHARD}_alarms_total)", decimals=0),
        stat("Oldest version", "Published by the slowest shard.", f"min({SHARD}_version)", decimals=0),
        stat("Roll-backs", "To a checkpoint, for the last copy of a chunk was lost.", f"{COORDINATOR}_timeline_id", decimals=0),
        stat("Steps skipped", "For gradients that were not finite.", f"max({SHARD}_skipped_steps_total)", decimals=0),
        stat("Pulls that wait", "For a version.", f"sum({SHARD}_waiting_pulls)", decimals=0),
        series(
            "Chunks by role",
            "primary: serves it; backup: holds the same bits; learner: is being filled.",
            {"{{role}}": f"sum by (role) ({SHARD}_chunks)"},
            is_stacked=True,
        ),
        series(
            "Chunks by shard",
            "Primaries, and all that it holds.",
            {
                "primary of, {{instance}}": f'{SHARD}_chunks{{role="primary"}}',
                "holds, {{instance}}": f"sum by (instance) ({SHARD}_chunks)",
            },
        ),
        series(
            "Copies that go wrong",
            "Chunks that lack a copy; copies that differed; all alarms.",
            {
                "lack a copy": f"{COORDINATOR}_under_replicated_chunks",
                "differed, {{instance}}": f"{SHARD}_digest_mismatches_total",
                "alarms, {{instance}}": f"{SHARD}_alarms_total",
            },
        ),
    ]  # fmt: skip


def _traffic() -> list[Json]:
    contributions = f"{SHARD}_contributions_total"
    refused = rate(contributions + '{outcome!~"counted|duplicate"}')
    return [
        series(
            "Pushed",
            "Gradient bytes: before coding, sent by workers, and received and counted by shards.",
            {
                "before coding": BEFORE_CODING,
                "sent by workers": PUSHED,
                "counted by {{instance}}": rate(f"{SHARD}_pushed_bytes_total"),
            },
            unit="Bps",
        ),
        series(
            "Pulled",
            "Parameter bytes received by workers, and sent by shards.",
            {
                "received by workers": f"sum({rate('shardlane_worker_pulled_bytes_total')})",
                "sent by {{instance}}": rate(f"{SHARD}_pulled_bytes_total"),
            },
            unit="Bps",
        ),
        series("Waiting pulls", "Pulls that wait for a version.", {"{{instance}}": f"{SHARD}_waiting_pulls"}),
        series(
            "Contributions by answer",
            "What shards said to contributions; anything but counted is a retry or a stale one.",
            {"{{outcome}}": f"sum by (outcome) ({rate(contributions)})"},
            unit="ops",
        ),
        series(
            "Contributions refused",
            "Neither counted nor a duplicate, by reason.",
            {"{{outcome}}": f"sum by (outcome) ({refused})"},
            unit="ops",
        ),
        series(
            "Filled",
            "Bytes received to become another copy of chunks, whether still wanted or not.",
            {"{{instance}}": rate(f"{SHARD}_refilled_bytes_total")},
            unit="Bps",
        ),
    ]


def _commit() -> list[Json]:
    return [
        series(
            "Publish latency",
            "From a chunk's whole sum to the version that it makes: copies, the other shards' records and the optimizer's step.",
            median_and_worst(f"{SHARD}_publish_seconds"),
            unit="s",
            width=6,
        ),
        series(
            "Replication lag",
            "From a whole sum to the word of another shard that it has it.",
            median_and_worst(f"{SHARD}_replication_seconds"),
            unit="s",
            width=6,
        ),
        series(
            "Apply time",
            "One chunk's optimizer step on a shard.",
            median_and_worst(f"{SHARD}_apply_seconds"),
            unit="s",
            width=6,
        ),
        series(
            "Applied and skipped",
            "Chunks' optimizer steps a second, and steps skipped for gradients that were not finite.",
            {
                "applied, {{instance}}": rate(f"{SHARD}_apply_seconds_count"),
                "skipped, {{instance}}": rate(f"{SHARD}_skipped_steps_total"),
            },
            unit="ops",
            width=6,
        ),
    ]  # fmt: skip


def _queues() -> list[Json]:
    return [
        series(
            "Queues to other shards",
            "Bytes of sums and chunks that wait to be sent: more than a moment's worth, and the network is the limit.",
            {"{{instance}}": f"{SHARD}_outbox_bytes"},
            unit="bytes",
            width=6,
        ),
        series("Sums", "Bytes of partial and whole sums held.", {"{{instance}}": f"{SHARD}_sum_bytes"}, unit="bytes", width=6),
        series(
            "Memory of shards",
            "Resident, by process.",
            {"{{instance}}": "process_resident_memory_bytes * on (run, instance) group_left () " + _of_shards()},
            unit="bytes",
            width=6,
        ),
        series(
            "CPU of shards",
            "Cores in use, by process.",
            {"{{instance}}": f"{rate('process_cpu_seconds_total')} * on (run, instance) group_left () {_of_shards()}"},
            width=6,
        ),
    ]


def _of_shards() -> str:
    return 'max by (run, instance) (shardlane_build_info{role="shard"})'


def calls(service: str, whose: str, *, latency: str) -> list[Json]:
    """Of the services whose label matches. `latency`: what that of their methods means."""
    handled = "grpc_server_handled_total"
    failed = rate(f'{handled}{{{service}, grpc_code!="OK"}}')
    seconds = quantile(0.99, "grpc_server_handling_seconds", "le, grpc_method", f"{{{service}}}")
    return [
        series(
            f"Call rate {whose}",
            "Calls ended, by method.",
            {"{{grpc_method}}": f"sum by (grpc_method) ({rate(f'{handled}{{{service}}}')})"},
            unit="reqps",
        ),
        series(
            f"Call latency {whose}",
            latency,
            {"{{grpc_method}}": seconds},
            unit="s",
        ),
        series(
            f"Failed calls {whose}",
            "Ended with another status than OK.",
            {"{{grpc_method}} {{grpc_code}}": f"sum by (grpc_method, grpc_code) ({failed})"},
            unit="reqps",
        ),
    ]
