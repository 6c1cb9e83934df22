"""The coordinator's own metrics: gauges that read the run when they are scraped, and counts of what happened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from coordinator.core.events import FAREWELLS, Farewell
from coordinator.core.overview import clock_spread, under_replicated
from coordinator.core.run import Run
from shardlane.ids import Incarnation
from shardlane.metrics import Metrics
from shardlane.plan import Plan, Role

ROLES: tuple[Role, Role] = ("shard", "worker")


class Instruments:
    def __init__(self, metrics: Metrics, run: Run, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lost_seconds: float | None = None  # when the first of the members was lost whose loss no step has followed yet
        self._is_replanned = False
        name = "shardlane_coordinator_{}".format
        readings: dict[str, tuple[str, Callable[[], float]]] = {
            "steps_done": ("Steps that the coordinator knows to be done.", lambda: run.version),
            "steps_end": ("The version at which the run ends.", lambda: run.end_version),
            "loss_nats": ("Training loss of the newest step.", lambda: run.steps.newest.loss if run.steps.newest else 0.0),
            "grad_norm": ("Of the newest step.", lambda: run.steps.newest.grad_norm if run.steps.newest else 0.0),
            "learning_rate": ("Of the newest step.", lambda: run.steps.newest.learning_rate if run.steps.newest else 0.0),
            "tokens_per_second": ("Over the newest steps.", lambda: run.steps.tokens_per_second),
            "skipped_steps": ("Steps whose gradients were not finite.", lambda: run.steps.num_skipped),
            "validation_loss_nats": ("The newest.", lambda: run.validations.newest[1] if run.validations.newest else 0.0),
            "checkpoint_version": ("Of the newest complete checkpoint.", lambda: run.checkpoint.version),
            "checkpoint_interval_steps": (
                "Between two checkpoints; 0: only at the end and on request.",
                lambda: run.config.checkpoint.every_steps,
            ),
            "stages": ("Of a pipeline in the plan.", lambda: len(run.plan.stages) if run.plan else 0),
            "replicas": ("Pipelines in the plan.", lambda: len(run.plan.replicas) if run.plan else 0),
            "plan_epoch": ("Membership epoch of the plan.", lambda: run.plan.number.epoch if run.plan else 0),
            "timeline_id": ("Roll-backs so far.", lambda: run.timeline.id),
            "under_replicated_chunks": (
                "Chunks with fewer copies in sync than they are to have.",
                lambda: under_replicated(run),
            ),
            "clock_spread_steps": (
                "Between the worker that is furthest on and the one that is least, of those with a seat.",
                lambda: clock_spread(run),
            ),
            "run_state": ("1 gathering, 2 training, 3 paused, 4 finishing, 5 finished, 6 failed.", lambda: run.state),
        }
        for each, (help, read) in readings.items():
            metrics.gauge(name(each), help).set_function(read)
        members = metrics.gauge(name("members"), "Members whose lease runs.", ("role",))
        ages = metrics.gauge(
            name("lease_age_seconds"), "Since the last heartbeat of the member that is silent longest.", ("role",)
        )
        expected = metrics.gauge(name("members_expected"), "Members that the config places.", ("role",))
        leaving = metrics.gauge(name("leaving_members"), "Members that want to go as soon as they are not needed.", ("role",))
        self.joins = metrics.counter(name("joins_total"), "Members that joined.", ("role",))
        self._departures = metrics.counter(name("departures_total"), "Members that are gone, by why.", ("role", "reason"))
        cluster = run.config.cluster
        expected.labels("shard").set(cluster.shards)
        expected.labels("worker").set(cluster.stages * cluster.replicas)
        for role in ROLES:
            members.labels(role).set_function(partial(_count, run, role))
            leaving.labels(role).set_function(partial(_leaving, run, role))
            ages.labels(role).set_function(partial(_oldest, run, role, clock))
            self.joins.labels(role)  # a rate needs the zero before the first
            for farewell in FAREWELLS:
                self._departures.labels(role, farewell)
        self._recovery_seconds = metrics.histogram(
            name("recovery_seconds"),
            "From the loss of a member with a part in the plan to the first step told under the next plan.",
        )
        self._tokens = metrics.counter(name("tokens_total"), "Tokens trained on.")
        self._plans = metrics.counter(name("plans_total"), "Plans made.")
        self.checkpoint_failures = metrics.counter(name("checkpoint_failures_total"), "Checkpoints that were not taken.")
        self.write_failures = metrics.counter(name("write_failures_total"), "Writes of rows or state that are to be repeated.")

    def lost(self, incarnation: Incarnation, farewell: Farewell, plan: Plan | None) -> None:
        """A member is gone; `plan` is the one before the plan that its loss may bring."""
        self._departures.labels("shard" if incarnation.startswith("shard-") else "worker", farewell).inc()
        has_part = plan is not None and (incarnation in plan.shards or plan.seat(incarnation) is not None)
        if farewell != "left" and has_part and self._lost_seconds is None:
            self._lost_seconds, self._is_replanned = self._clock(), False

    def planned(self) -> None:
        self._plans.inc()
        self._is_replanned = True

    def stepped(self, tokens: int) -> None:
        """Only shards that have taken up the newest plan are heard, so this is a step under it."""
        self._tokens.inc(tokens)
        if self._lost_seconds is not None and self._is_replanned:
            self._recovery_seconds.observe(self._clock() - self._lost_seconds)
            self._lost_seconds = None


def _count(run: Run, role: Role) -> float:
    return len(run.members.alive(role))


def _leaving(run: Run, role: Role) -> float:
    return sum(state.is_leaving for state in run.members.states if state.registration.role == role)


def _oldest(run: Run, role: Role, clock: Callable[[], float]) -> float:
    now = clock()
    return max((now - state.heard_seconds for state in run.members.states if state.registration.role == role), default=0.0)
