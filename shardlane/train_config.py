"""The settings of `[train]`: what a step is, and from which version it is computed."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shardlane.sections import Section


class TrainConfig(Section):
    seq_len: int = Field(256, ge=2, description="tokens a sequence")
    micro_batch_size: int = Field(4, ge=1, description="sequences a micro-batch")
    global_batch_size: int = Field(32, ge=1, description="sequences a step")
    lanes: int = Field(4, ge=1, description="logical data-parallel ranks; a power of two; fixed for the run's life")
    max_steps: int = Field(200, ge=1, description="steps of the whole run; the learning-rate schedule is laid over them")
    stop_at_step: int = Field(0, ge=0, description="stop and checkpoint here, to go on later; 0: at max_steps")
    local_steps: int = Field(
        1, ge=1, description="steps of a lane by itself, by [inner], between two pushes; they share its micro-batches (DiLoCo)"
    )
    consistency: Literal["bsp", "ssp", "asp"] = Field(
        "bsp", description="a step is computed from the version before it (bsp), an older one (ssp); asp: lanes do not wait"
    )
    staleness: int = Field(
        0, ge=0, le=16, description="ssp: step t is computed from version t - staleness; 1 is the one-step delay of PipeDream-2BW"
    )
    staleness_warmup_steps: int = Field(
        0,
        ge=0,
        description="ssp: the first steps, computed as under bsp; old gradients cost the most loss while a model is young",
    )
    look_ahead: bool = Field(False, description="ssp: compute from where the version read is headed, by its last update")
    staleness_max: int = Field(
        0,
        ge=0,
        description="asp: what was computed from a version older than so many is refused, and computed anew; 0: nothing is",
    )
    staleness_aware: bool = Field(
        True, description="asp: divide the learning rate by how old the version was (Zhang et al. 2016)"
    )
    seed: int = Field(1234, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.consistency != "ssp" and self.staleness:
            raise ValueError(f"staleness is {self.staleness} under {self.consistency}; set consistency to ssp, or staleness to 0")
        if self.staleness_warmup_steps and not self.staleness:
            raise ValueError(
                f"staleness_warmup_steps is {self.staleness_warmup_steps} with staleness 0; set staleness, or the warm-up to 0"
            )
        if self.goes_by_turns and self.local_steps > 1:
            raise ValueError(f"local_steps is {self.local_steps} under asp; set consistency to bsp or ssp, or local_steps to 1")
        if self.goes_by_turns and 0 < self.staleness_max < self.lanes:
            raise ValueError(
                f"staleness_max {self.staleness_max} is below lanes {self.lanes}: where all are equally fast, that is how old"
                " versions are; raise it, or 0 for no bound"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.lanes & (self.lanes - 1):
            raise ValueError(f"lanes is {self.lanes}; it must be a power of two, so that lanes add up along a binary tree")
        if self.global_batch_size % (self.micro_batch_size * self.lanes):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size x lanes"
                f" ({self.micro_batch_size} x {self.lanes})"
            )
        if self.global_batch_size % (self.micro_batch_size * self.lanes * self.local_steps):
            raise ValueError(
                f"a lane's {self.num_micro_batches // self.lanes} micro-batches a step cannot be shared among"
                f" {self.local_steps} local steps; make global_batch_size a multiple of micro_batch_size x lanes x local_steps"
            )
        if self.stop_at_step > self.max_steps:
            raise ValueError(f"stop_at_step {self.stop_at_step} is beyond max_steps {self.max_steps}")
        return self

    @property
    def num_micro_batches(self) -> int:
        """M: micro-batches a step, over all lanes."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def lane_tokens(self) -> int:
        """Of a lane's batch."""
        return self.global_batch_size // self.lanes * self.seq_len

    @property
    def goes_by_turns(self) -> bool:
        """ASP: every contribution of a lane is applied by itself (`shardlane/turns.py`)."""
        return self.consistency == "asp"

    @property
    def num_places(self) -> int:
        """By which the numbers of a lane's turns differ; steps have one place."""
        return self.lanes + 1 if self.goes_by_turns else 1

    def reads(self, step: int) -> int:
        """The version from which `step` is computed, by every lane and in every stage."""
        return max(step - self.staleness, min(step, self.staleness_warmup_steps))

    @property
    def looks_ahead(self) -> bool:
        return self.look_ahead and self.staleness > 0

    def steps_ahead(self, step: int) -> int:
        """How many updates the version that `step` reads is moved on by; before the first there is none to go by."""
        version = self.reads(step)
        return step - version if self.looks_ahead and version else 0

    @property
    def num_past(self) -> int:
        """Versions before the present one that are kept."""
        return self.staleness + self.looks_ahead

    @property
    def last_step(self) -> int:
        """The step at which this run ends."""
        return self.stop_at_step or self.max_steps

    @property
    def last_version(self) -> int:
        """The version at which this run ends, if ASP refuses nothing."""
        return self.last_step * (self.lanes if self.goes_by_turns else 1)
