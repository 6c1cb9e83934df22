"""The pipeline of workers and the cluster's membership: who sits where, who comes and goes, and how soon that is made good."""

from __future__ import annotations

from deploy.grafana.panels import Json, by_seat, dashboard, rate, series, stat
from deploy.grafana.shards import calls
from deploy.grafana.training import COORDINATOR, WORKER

SERVICES = 'grpc_service=~".*(Coordinator|PipelineWorker)"'


def pipeline() -> Json:
    return dashboard(
        "shardlane-pipeline",
        "Shardlane: pipeline and membership",
        {
            "Shape": _shape(),
            "Membership": _membership(),
            "Pipeline": _pipeline(),
            "Memory and processes": _processes(),
            "Calls": calls(
                SERVICES,
                "of coordinator and workers",
                latency="99th percentile. WatchPlans and Transfer last as long as they are wanted.",
            ),
        },
    )


def _shape() -> list[Json]:
    state = f"{COORDINATOR}_{{}}".format
    gone = f'{state("departures_total")}{{reason!="left"}}'
    return [
        stat("Replicas", "Pipelines in the plan.", state("replicas"), decimals=0),
        stat("Stages", "Of each of them.", state("stages"), decimals=0),
        stat(
            "Spare workers",
            "Members without a seat.",
            f'{state("members")}{{role="worker"}} - on (run, instance) {state("stages")} * {state("replicas")}',
            decimals=0,
        ),
        stat("Missing", "Fewer than the config places.", f"sum({state('members_expected')} - {state('members')})", decimals=0),
        stat("Leaving", "They go as soon as they are not needed.", f"sum({state('leaving_members')})", decimals=0),
        stat("Epoch", "Of the plan.", state("plan_epoch"), decimals=0),
        stat("Deaths", "Members lost without a word, since the coordinator started.", f"sum({gone})", decimals=0),
        stat("Roll-backs so far", "To a checkpoint.", state("timeline_id"), decimals=0),
    ]  # fmt: skip


def _membership() -> list[Json]:
    state = f"{COORDINATOR}_{{}}".format
    recoveries = (
        f"sum(increase({state('recovery_seconds')}_sum[1h])) / (sum(increase({state('recovery_seconds')}_count[1h])) > 0)"
    )
    slowest = f"histogram_quantile(0.95, sum by (le) (increase({state('recovery_seconds')}_bucket[1h])))"
    return [
        series(
            "Members by role",
            "Whose lease runs; those that are leaving; as many as the config places.",
            {
                "{{role}}s": state("members"),
                "{{role}}s leaving": state("leaving_members"),
                "{{role}}s wanted": state("members_expected"),
            },
        ),
        series(
            "Joins and departures",
            "In the last five minutes. left: said so before; silent: its lease ran out; connection_refused: nobody listens "
            "at its address; replaced: a newcomer has its address.",
            {
                "{{role}} joined": f"increase({state('joins_total')}[5m])",
                "{{role}} {{reason}}": f"increase({state('departures_total')}[5m])",
            },
        ),
        series(
            "At the door",
            "Registrations in the last five minutes, by what became of their join tokens.",
            {"{{outcome}}": f"increase({state('admissions_total')}[5m])"},
        ),
        series("Lease age", "Since the last heartbeat of the member that is silent longest.",
               {"{{role}}": state("lease_age_seconds")}, unit="s"),
        series(
            "Recovery time",
            "From the loss of a member with a part in the plan to the first step under the next plan, over the last hour.",
            {"mean": recoveries, "95th percentile": slowest},
            unit="s",
        ),
        series(
            "Plans",
            "Made by this coordinator, the epoch of the newest, and roll-backs.",
            {"plans": state("plans_total"), "epoch": state("plan_epoch"), "roll-backs": state("timeline_id")},
        ),
        series(
            "Certificates",
            "Until the certificate of each process runs out. Nothing in plain text.",
            {"{{instance}}": "shardlane_certificate_expiry_timestamp_seconds - time()"},
            unit="s",
        ),
    ]  # fmt: skip


def _pipeline() -> list[Json]:
    phase = f"{WORKER}_phase_seconds_total"
    step = f"{WORKER}_step_seconds"
    bubble, compute = (rate(f'{phase}{{phase="{each}"}}') for each in ("bubble", "compute"))
    steps = rate(f"{step}_count")
    return [
        series(
            "Bubble by stage",
            "Share of its workers' time that a stage waits for its neighbours.",
            {"stage {{stage}}": f"{by_seat(bubble)} / {by_seat(f'sum by (run, instance) ({rate(phase)})')}"},
            unit="percentunit",
        ),
        series(
            "Computing by stage",
            "Seconds that a stage computes for a step, on average; layers are dealt so that these are alike.",
            {"stage {{stage}}": f"{by_seat(compute)} / {by_seat(steps)}"},
            unit="s",
        ),
        series(
            "Step time by replica",
            "Seconds from one version to the next, on average.",
            {"replica {{replica}}": f"{by_seat(rate(f'{step}_sum'), 'replica')} / {by_seat(steps, 'replica')}"},
            unit="s",
        ),
        series("Steps by worker", "The step that each worker computes.", {"{{instance}}": f"{WORKER}_version"}),
        series(
            "Queues of workers",
            "Bytes that wait: activations and gradients of neighbours not used yet, gradients not pushed yet.",
            {"inbox {{instance}}": f"{WORKER}_inbox_bytes", "push queue {{instance}}": f"{WORKER}_push_queue_bytes"},
            unit="bytes",
        ),
        series(
            "Broken streams",
            "Streams to neighbours that broke, since the worker started.",
            {"{{instance}}": f"{WORKER}_broken_streams_total"},
        ),
    ]


def _processes() -> list[Json]:
    return [
        series(
            "Memory by stage",
            "Resident, of each worker.",
            {
                "replica {{replica}}, stage {{stage}}": "process_resident_memory_bytes * on (run, instance) "
                f"group_left (replica, stage) {WORKER}_seat_info"
            },
            unit="bytes",
            width=6,
        ),
        series(
            "Device memory",
            "Of a CUDA device, that torch holds; 0 on a CPU.",
            {"{{instance}}": f"{WORKER}_device_memory_bytes"},
            unit="bytes",
            width=6,
        ),
        series(
            "Resident memory", "By process.", {"{{job}} {{instance}}": "process_resident_memory_bytes"}, unit="bytes", width=6
        ),
        series("CPU", "Cores in use, by process.", {"{{job}} {{instance}}": rate("process_cpu_seconds_total")}, width=6),
        series(
            "Build",
            "Processes by role and version.",
            {"{{role}} {{version}}": "count by (role, version) (shardlane_build_info)"},
            width=6,
        ),
    ]
