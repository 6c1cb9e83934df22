"""At which versions something happens besides training. Pure; neither can change what is trained."""

from __future__ import annotations

from shardlane.config import Config


def validates_after(num_steps: int, config: Config) -> bool:
    """Whether the held-out loss is taken after `num_steps` of the schedule: every so many, and when the whole run is done.

    Not at a mere `train.stop_at_step`: a run that pauses has the same rows as one that does not.
    """
    validation = config.validation
    if not validation.num_micro_batches or not num_steps:
        return False
    return num_steps == config.train.max_steps or (validation.every_steps > 0 and num_steps % validation.every_steps == 0)


def validates_at(version: int, config: Config) -> bool:
    """Whether the held-out loss of `version` may be taken. Under ASP any may be: lanes take it by their own clocks, and all of
    them at the version that turns out to be the last.
    """
    if config.train.goes_by_turns:
        return config.validation.num_micro_batches > 0 and version > 0
    return validates_after(version, config)


def checkpoints_at(version: int, config: Config) -> bool:
    """Whether `version` is checkpointed unasked: every so many steps, and wherever this run ends."""
    every = config.checkpoint.every_steps
    return version == config.train.last_step or (every > 0 and version > 0 and version % every == 0)
