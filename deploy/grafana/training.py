"""How the run gets on: what it learns, how fast, and where the time goes."""

from __future__ import annotations

from deploy.grafana.panels import Json, dashboard, heatmap, median_and_worst, rate, series, stat, timeline

STATES = {1: "gathering", 2: "training", 3: "paused", 4: "finishing", 5: "finished", 6: "failed"}
COORDINATOR, WORKER = "shardlane_coordinator", "shardlane_worker"
PUSHED = f"sum({rate(f'{WORKER}_pushed_bytes_total')})"
BEFORE_CODING = f"sum({rate(f'{WORKER}_gradient_bytes_total')})"
PHASES = "compute, bubble: waiting for a neighbour; pull_wait: for a version; push_wait: for room in the push queue."


def training() -> Json:
    return dashboard(
        "shardlane-training",
        "Shardlane: training",
        {
            "Run": _run(),
            "Learning": _learning(),
            "Pace": _pace(),
            "Where a step's time goes": _time(),
            "Consistency and codes": _consistency(),
            "Checkpoints and alerts": _safety(),
        },
    )


def _run() -> list[Json]:
    done, end = f"{COORDINATOR}_steps_done", f"{COORDINATOR}_steps_end"
    return [
        stat("State", "As the coordinator sees the run.", f"{COORDINATOR}_run_state", mappings=STATES),
        stat("Step", "Steps done.", done, decimals=0),
        stat("Done", "Steps done of all steps of the run.", f"{done} / {end}", unit="percentunit"),
        stat("Time left", "At the pace of the last ten minutes.", f"({end} - {done}) / (deriv({done}[10m]) > 0)", unit="s"),
        stat(
            "Goodput now",
            "The part of the last five minutes that steps at their usual pace account for.",
            "run:shardlane_goodput:ratio_rate5m",
            unit="percentunit",
        ),
        stat(
            "Skipped steps",
            "Steps whose gradients were not finite: the weights stayed as they were.",
            f"{COORDINATOR}_skipped_steps",
            decimals=0,
        ),
        stat("Newest checkpoint", "Its version; 0: none yet.", f"{COORDINATOR}_checkpoint_version", decimals=0),
        stat("Members", "Whose lease runs.", f"{COORDINATOR}_members", decimals=0, legend="{{role}}"),
    ]


def _learning() -> list[Json]:
    return [
        series(
            "Loss",
            "Of the newest step and of the newest validation, in nats a token; nothing before the first.",
            {"training": f"{COORDINATOR}_loss_nats > 0", "validation": f"{COORDINATOR}_validation_loss_nats > 0"},
            width=12,
        ),
        series(
            "Loss by replica",
            "Mean over a replica's own lanes, which only its last stage knows.",
            {"{{instance}}": f"{WORKER}_loss > 0"},
            width=12,
        ),
        series("Gradient norm", "Before clipping.", {"gradient norm": f"{COORDINATOR}_grad_norm"}, width=12),
        series("Learning rate", "Of the newest step.", {"learning rate": f"{COORDINATOR}_learning_rate"}, width=12),
    ]


def _pace() -> list[Json]:
    counted = f"sum({rate(f'{COORDINATOR}_tokens_total')})"
    return [
        series(
            "Tokens per second",
            "Over the newest steps; as counted; and the usual pace, the median of the last hour.",
            {
                "newest steps": f"{COORDINATOR}_tokens_per_second",
                "counted": counted,
                "usual": "run:shardlane_coordinator_tokens_per_second:p50_1h",
            },
            width=6,
        ),
        series(
            "Goodput",
            "The part of the time that steps at their usual pace account for; deaths, waits and what is slow took the rest.",
            {"goodput": "run:shardlane_goodput:ratio_rate5m"},
            unit="percentunit",
            width=6,
            soft_max=1.0,
        ),
        series(
            "Tokens computed and counted",
            "A second, by each stage on average. What is computed and not counted was done twice, or for a step that is void.",
            {"computed": f"sum({rate(f'{WORKER}_tokens_total')}) / max({COORDINATOR}_stages)", "counted": counted},
            width=6,
        ),
        series(
            "Steps",
            "Done by the run; published by the slowest shard; worked from by the slowest worker.",
            {
                "coordinator": f"{COORDINATOR}_steps_done",
                "slowest shard": "min(shardlane_shard_version)",
                "slowest worker": f"min({WORKER}_version)",
            },
            width=6,
        ),
    ]


def _time() -> list[Json]:
    seconds = rate(f"{WORKER}_phase_seconds_total")
    waits = rate(f'{WORKER}_phase_seconds_total{{phase!="compute"}}')
    return [
        series(
            "Step time split",
            f"Share of the workers' time: {PHASES}",
            {"{{phase}}": f"sum by (phase) ({seconds}) / ignoring (phase) group_left () sum({seconds})"},
            unit="percentunit",
            width=6,
            is_stacked=True,
        ),
        series("Step time", "From one version to the next, over all workers.", median_and_worst(f"{WORKER}_step_seconds"),
               unit="s", width=6),
        heatmap("Step times", "The same, all of them.", f"{WORKER}_step_seconds", unit="s", width=6),
        series(
            "Waiting by worker",
            f"Seconds of each second: {PHASES}",
            {"{{instance}} {{phase}}": f"sum by (instance, phase) ({waits})"},
            unit="percentunit",
            width=6,
        ),
    ]  # fmt: skip


def _consistency() -> list[Json]:
    staleness = f"{WORKER}_staleness_versions"
    return [
        heatmap(
            "Staleness",
            "How many versions older than a step is what it is computed from: 0 under BSP, train.staleness under SSP.",
            staleness,
        ),
        series(
            "Staleness, mean",
            "Versions.",
            {"mean": f"sum({rate(f'{staleness}_sum')}) / sum({rate(f'{staleness}_count')})"},
        ),
        heatmap(
            "Staleness under ASP",
            "Versions made since the one that a contribution was computed from, one shard's worth for each shard.",
            "shardlane_shard_staleness_versions",
        ),
        series(
            "Refused under ASP",
            "Contributions a second that were too old to be applied (train.staleness_max), and are computed anew.",
            {"refused": f"max({rate('shardlane_shard_refused_turns_total')})"},
        ),
        series(
            "Clocks, furthest less last",
            "Steps between the worker that is furthest on and the one that is least.",
            {"steps": f"{COORDINATOR}_clock_spread_steps"},
        ),
        series(
            "Gradients before and after coding",
            "Bytes to push before coding, and sent; what must be sent again counts again.",
            {"before": BEFORE_CODING, "sent": PUSHED},
            unit="Bps",
            is_logarithmic=True,
        ),
        series("Coding saves", "Bytes before coding for each byte sent.", {"factor": f"{BEFORE_CODING} / {PUSHED}"}),
        series(
            "Left out by top-k",
            "L2 norm of what top-k has left out so far; lanes' chunks begun without it because their lane moved; fp16 chunks "
            "scaled to fit, a second.",
            {
                "norm {{instance}}": f"{WORKER}_residual_norm",
                "begun anew": f"sum({WORKER}_residuals_begun)",
                "rescaled": f"sum({rate(f'{WORKER}_rescaled_chunks_total')})",
            },
        ),
    ]


def _safety() -> list[Json]:
    interval = f"{COORDINATOR}_checkpoint_interval_steps > 0"
    return [
        series(
            "Steps since the newest checkpoint",
            "And how many are meant to lie between two, if any (checkpoint.every_steps).",
            {"since": f"{COORDINATOR}_steps_done - {COORDINATOR}_checkpoint_version", "interval": interval},
        ),
        series(
            "Failures of the coordinator's disk",
            "Checkpoints that were not taken, and writes that had to be repeated, since it started.",
            {
                "checkpoints": f"{COORDINATOR}_checkpoint_failures_total",
                "writes": f"{COORDINATOR}_write_failures_total",
            },
        ),
        timeline(
            "Alerts",
            "Pending and firing; docs/runbook.md has an entry for each.",
            {"{{alertname}} {{alertstate}}": 'ALERTS{alertname=~"Shardlane.*"}'},
            {1: "on"},
        ),
    ]
