"""Which tensor travels how, by the config."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from shardlane.codecs import Bf16, Codec, Fp16, Int8, Touched
from shardlane.config import CommunicationConfig
from shardlane.partition import TensorSpec
from shardlane.top_k import TopK

TOUCHED = Touched()


@lru_cache(maxsize=16)
def codec_of(communication: CommunicationConfig) -> Codec | None:
    """The code that `communication.push` names; None: fp32."""
    match communication.push:
        case "fp32":
            return None
        case "bf16":
            return Bf16()
        case "fp16":
            return Fp16()
        case "int8" | "int8_stochastic":
            return Int8(stochastic=communication.push == "int8_stochastic")
        case "top_k" | "top_k_int8":
            return TopK(communication.top_k_fraction, int8=communication.push == "top_k_int8")


def codec_for(communication: CommunicationConfig, tensor: TensorSpec, site: int) -> Codec | None:
    """How a tensor's gradients at one site travel; None: as they are."""
    if tensor.num_elements < communication.coded_elements_min:
        return None
    if communication.push == "fp32":
        return TOUCHED if communication.touched_rows and tensor.is_look_up(site) else None
    return codec_of(communication)


def pull_dtype(communication: CommunicationConfig, tensor: TensorSpec) -> torch.dtype:
    """What a tensor's parameters travel in; the shards keep fp32."""
    is_coded = communication.pull == "bf16" and tensor.num_elements >= communication.coded_elements_min
    return torch.bfloat16 if is_coded else torch.float32


def nonce_of(*, seed: int, step: int, lane: int, site: int, chunk: int) -> int:
    """32 bits that name one contribution."""
    name = f"{seed}:{step}:{lane}:{site}:{chunk}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")
