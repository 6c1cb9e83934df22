"""Small worlds, by name: how big, how bad the network, and what is done to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from shardlane import config as configs
from shardlane.config import Config
from tests.sim.network import Weather

FAIR = Weather()
CALM = Weather(lose=0.0, double=0.0, linger=0.0, loiter=0.0)
BAD = Weather(lose=0.12, double=0.15, linger=0.10, loiter=0.01)


@dataclass(frozen=True)
class Shape:
    """`faults`: how often each is drawn, against the others. A schedule has 1 … `num_faults_max` of them."""

    num_shards: int = 3
    replication: int = 2
    num_chunks: int = 3
    num_lanes: int = 4
    num_steps: int = 4
    staleness: int = 0
    staleness_warmup_steps: int = 0
    look_ahead: bool = False
    asynchronous: bool = False
    staleness_max: int = 0
    num_stages: int = 1
    num_replicas: int = 2
    num_spare_shards: int = 0
    num_spare_workers: int = 0
    checkpoint_every: int = 0
    num_validations: int = 0
    schedule: str = "1f1b"
    seconds_a_lane: float = 0.02
    weather: Weather = FAIR
    wobbles: bool = False  # no two measurements of one sum have the same bits
    num_faults_max: int = 2
    faults: Mapping[str, int] = field(default_factory=lambda: {"kill shard": 1, "kill worker": 1})

    def __hash__(self) -> int:
        return id(self)


DEATHS = {"kill shard": 3, "kill worker": 2, "kill two shards": 1}
SILENCES = {"stop shard": 3, "stop worker": 2, "part shard": 3, "part worker": 1, "part all": 1, "kill shard": 1}
COMINGS = {"join shard": 2, "join worker": 2, "leave shard": 3, "leave worker": 2, "kill shard": 1, "kill worker": 1}
CONTROLS = {"checkpoint": 2, "pause run": 1, "stop run": 1}
EVERYTHING = {**DEATHS, **SILENCES, **COMINGS, **CONTROLS, "kill coordinator": 3, "stop coordinator": 1, "part coordinator": 1}

SHAPES: dict[str, Shape] = {
    "deaths": Shape(faults=DEATHS),
    "deaths, sums that differ in bits": Shape(faults={**DEATHS, "checkpoint": 1}, wobbles=True, num_faults_max=3),
    "deaths in a bad network": Shape(faults=DEATHS, weather=BAD),
    "deaths of pipelines": Shape(num_stages=2, faults={"kill worker": 3, "kill shard": 1}, num_spare_workers=1, num_steps=3),
    "silences": Shape(faults=SILENCES),
    "silences, sums that differ in bits": Shape(faults={**SILENCES, "checkpoint": 1}, wobbles=True, num_faults_max=3),
    "silences of pipelines": Shape(num_stages=2, faults=SILENCES, num_replicas=1, num_spare_workers=1, num_steps=3),
    "three copies, one lane": Shape(replication=3, num_lanes=1, num_replicas=1, faults={**DEATHS, **SILENCES}, num_faults_max=3),
    "one copy": Shape(
        replication=1, num_steps=5, checkpoint_every=2, faults={"kill shard": 4, "kill worker": 1, "stop shard": 1}
    ),
    "one copy of pipelines": Shape(
        replication=1, num_steps=5, num_stages=2, checkpoint_every=2, faults={"kill shard": 4, "kill worker": 1}
    ),
    "one-step delay, deaths": Shape(staleness=1, num_steps=6, faults=DEATHS),
    "one-step delay, comings, a bad network": Shape(staleness=1, num_steps=7, faults=COMINGS, weather=BAD),
    "one-step delay, pipelines": Shape(
        staleness=1, num_steps=6, num_stages=2, faults={**COMINGS, **SILENCES, "stop run": 1, "pause run": 1}, num_faults_max=3
    ),
    "SSP, everything": Shape(
        staleness=2,
        look_ahead=True,
        num_steps=6,
        faults=EVERYTHING,
        num_faults_max=4,
        checkpoint_every=2,
        num_validations=2,
        num_stages=2,
        num_replicas=2,
    ),
    "SSP after a warm-up": Shape(
        staleness=2,
        staleness_warmup_steps=3,
        look_ahead=True,
        num_steps=7,
        num_stages=2,
        faults={**DEATHS, **COMINGS, "pause run": 1, "kill coordinator": 1},
        num_faults_max=3,
    ),
    "ASP, deaths": Shape(asynchronous=True, faults=DEATHS),
    "ASP, sums that differ in bits, a bad network": Shape(
        asynchronous=True,
        num_steps=2,
        staleness_max=4,
        faults={**DEATHS, "checkpoint": 1},
        wobbles=True,
        weather=BAD,
        num_faults_max=3,
    ),
    "ASP, comings and silences of pipelines": Shape(
        asynchronous=True, num_steps=2, num_stages=2, faults={**COMINGS, **SILENCES, "stop run": 1}, num_faults_max=3
    ),
    "ASP, one copy": Shape(
        asynchronous=True,
        replication=1,
        num_steps=4,
        num_stages=2,
        checkpoint_every=1,
        faults={"kill shard": 4, "kill worker": 1},
    ),
    "ASP, everything": Shape(
        asynchronous=True,
        staleness_max=5,
        num_steps=2,
        faults=EVERYTHING,
        num_faults_max=4,
        checkpoint_every=1,
        num_validations=4,
        num_stages=2,
        num_replicas=2,
    ),
    "a coordinator that dies": Shape(
        faults={"kill coordinator": 4, "stop coordinator": 1, "part coordinator": 1, "kill shard": 2, "kill worker": 1},
        checkpoint_every=2,
        num_validations=2,
        num_faults_max=3,
    ),
    "comings and goings": Shape(faults=COMINGS, num_chunks=4, num_steps=5),
    "comings and goings of pipelines": Shape(faults=COMINGS, num_stages=2, num_steps=4, num_replicas=1),
    "everything": Shape(
        faults=EVERYTHING, num_faults_max=4, checkpoint_every=2, num_validations=2, num_chunks=4, num_stages=2, num_replicas=2
    ),
    "everything, zero bubble, a bad network": Shape(
        faults=EVERYTHING, num_faults_max=3, checkpoint_every=2, num_stages=2, num_replicas=1, weather=BAD, schedule="zero_bubble"
    ),
}


@lru_cache(maxsize=64)
def config_of(shape: Shape) -> Config:
    return configs.build(
        {
            "model": {"preset": "tiny", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 64},
            "train": {
                "seq_len": 8,
                "micro_batch_size": 1,
                "global_batch_size": shape.num_lanes,
                "lanes": shape.num_lanes,
                "max_steps": shape.num_steps,
                "consistency": "asp" if shape.asynchronous else "ssp",
                "staleness_max": shape.staleness_max,
                "staleness": shape.staleness,
                "staleness_warmup_steps": shape.staleness_warmup_steps,
                "look_ahead": shape.look_ahead,
            },
            "pipeline": {"schedule": shape.schedule},
            "validation": {"num_micro_batches": shape.num_validations, "every_steps": 2 if shape.num_validations else 0},
            "checkpoint": {"every_steps": shape.checkpoint_every},
            "cluster": {
                "stages": shape.num_stages,
                "replicas": shape.num_replicas,
                "shards": shape.num_shards,
                "replication": shape.replication,
                "lease_seconds": 4.0,
            },
        }
    )
