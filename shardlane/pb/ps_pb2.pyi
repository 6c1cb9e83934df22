from shardlane.pb import coordinator_pb2 as _coordinator_pb2
from shardlane.pb import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]
    CODEC_INT8_STOCHASTIC: _ClassVar[Codec]
    CODEC_TOP_K: _ClassVar[Codec]
    CODEC_TOP_K_INT8: _ClassVar[Codec]
    CODEC_TOUCHED: _ClassVar[Codec]

class PushOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUSH_OUTCOME_UNSPECIFIED: _ClassVar[PushOutcome]
    PUSH_OUTCOME_COUNTED: _ClassVar[PushOutcome]
    PUSH_OUTCOME_DUPLICATE: _ClassVar[PushOutcome]
    PUSH_OUTCOME_OVERLAPS: _ClassVar[PushOutcome]
    PUSH_OUTCOME_NOT_YET: _ClassVar[PushOutcome]
    PUSH_OUTCOME_NOT_OWNER: _ClassVar[PushOutcome]
    PUSH_OUTCOME_STALE: _ClassVar[PushOutcome]

class PullOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PULL_OUTCOME_UNSPECIFIED: _ClassVar[PullOutcome]
    PULL_OUTCOME_DATA: _ClassVar[PullOutcome]
    PULL_OUTCOME_SUPERSEDED: _ClassVar[PullOutcome]
    PULL_OUTCOME_NOT_OWNER: _ClassVar[PullOutcome]
    PULL_OUTCOME_STALE: _ClassVar[PullOutcome]
CODEC_UNSPECIFIED: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
CODEC_INT8_STOCHASTIC: Codec
CODEC_TOP_K: Codec
CODEC_TOP_K_INT8: Codec
CODEC_TOUCHED: Codec
PUSH_OUTCOME_UNSPECIFIED: PushOutcome
PUSH_OUTCOME_COUNTED: PushOutcome
PUSH_OUTCOME_DUPLICATE: PushOutcome
PUSH_OUTCOME_OVERLAPS: PushOutcome
PUSH_OUTCOME_NOT_YET: PushOutcome
PUSH_OUTCOME_NOT_OWNER: PushOutcome
PUSH_OUTCOME_STALE: PushOutcome
PULL_OUTCOME_UNSPECIFIED: PullOutcome
PULL_OUTCOME_DATA: PullOutcome
PULL_OUTCOME_SUPERSEDED: PullOutcome
PULL_OUTCOME_NOT_OWNER: PullOutcome
PULL_OUTCOME_STALE: PullOutcome

class PushRequest(_message.Message):
    __slots__ = ("run_id", "timeline", "step", "block", "site", "chunk", "tokens", "loss", "slice", "codec", "payload")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    timeline: int
    step: int
    block: _tensor_pb2.Block
    site: int
    chunk: int
    tokens: int
    loss: float
    slice: _tensor_pb2.Slice
    codec: Codec
    payload: bytes
    def __init__(self, run_id: _Optional[str] = ..., timeline: _Optional[int] = ..., step: _Optional[int] = ..., block: _Optional[_Union[_tensor_pb2.Block, _Mapping]] = ..., site: _Optional[int] = ..., chunk: _Optional[int] = ..., tokens: _Optional[int] = ..., loss: _Optional[float] = ..., slice: _Optional[_Union[_tensor_pb2.Slice, _Mapping]] = ..., codec: _Optional[_Union[Codec, str]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PushAnswer(_message.Message):
    __slots__ = ("chunk", "site", "block", "outcome", "missing", "step")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    site: int
    block: _tensor_pb2.Block
    outcome: PushOutcome
    missing: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Block]
    step: int
    def __init__(self, chunk: _Optional[int] = ..., site: _Optional[int] = ..., block: _Optional[_Union[_tensor_pb2.Block, _Mapping]] = ..., outcome: _Optional[_Union[PushOutcome, str]] = ..., missing: _Optional[_Iterable[_Union[_tensor_pb2.Block, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("num_counted", "num_duplicate", "refused", "plan")
    NUM_COUNTED_FIELD_NUMBER: _ClassVar[int]
    NUM_DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    num_counted: int
    num_duplicate: int
    refused: _containers.RepeatedCompositeFieldContainer[PushAnswer]
    plan: _coordinator_pb2.Plan
    def __init__(self, num_counted: _Optional[int] = ..., num_duplicate: _Optional[int] = ..., refused: _Optional[_Iterable[_Union[PushAnswer, _Mapping]]] = ..., plan: _Optional[_Union[_coordinator_pb2.Plan, _Mapping]] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("run_id", "timeline", "version", "chunks")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    timeline: int
    version: int
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_id: _Optional[str] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("chunk", "version", "outcome", "slice", "plan", "refused", "payload")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    version: int
    outcome: PullOutcome
    slice: _tensor_pb2.Slice
    plan: _coordinator_pb2.Plan
    refused: int
    payload: bytes
    def __init__(self, chunk: _Optional[int] = ..., version: _Optional[int] = ..., outcome: _Optional[_Union[PullOutcome, str]] = ..., slice: _Optional[_Union[_tensor_pb2.Slice, _Mapping]] = ..., plan: _Optional[_Union[_coordinator_pb2.Plan, _Mapping]] = ..., refused: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("step", "chunk", "square_norm", "tokens", "loss", "digest", "requests", "tally", "turn")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SQUARE_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    step: int
    chunk: int
    square_norm: float
    tokens: int
    loss: float
    digest: int
    requests: int
    tally: _tensor_pb2.Tally
    turn: Turn
    def __init__(self, step: _Optional[int] = ..., chunk: _Optional[int] = ..., square_norm: _Optional[float] = ..., tokens: _Optional[int] = ..., loss: _Optional[float] = ..., digest: _Optional[int] = ..., requests: _Optional[int] = ..., tally: _Optional[_Union[_tensor_pb2.Tally, _Mapping]] = ..., turn: _Optional[_Union[Turn, _Mapping]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("number", "staleness", "clock_sum")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_SUM_FIELD_NUMBER: _ClassVar[int]
    number: int
    staleness: int
    clock_sum: int
    def __init__(self, number: _Optional[int] = ..., staleness: _Optional[int] = ..., clock_sum: _Optional[int] = ...) -> None: ...

class LaneClock(_message.Message):
    __slots__ = ("taken", "refused", "read")
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    taken: int
    refused: int
    read: int
    def __init__(self, taken: _Optional[int] = ..., refused: _Optional[int] = ..., read: _Optional[int] = ...) -> None: ...

class Replicate(_message.Message):
    __slots__ = ("record", "previous", "parameters_digest")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    record: Record
    previous: _containers.RepeatedCompositeFieldContainer[Record]
    parameters_digest: int
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ..., previous: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., parameters_digest: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("step", "chunks")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    step: int
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class Records(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ...) -> None: ...

class Refill(_message.Message):
    __slots__ = ("chunk", "version", "optimizer_step", "closed", "previous", "clocks")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    version: int
    optimizer_step: int
    closed: Record
    previous: _containers.RepeatedCompositeFieldContainer[Record]
    clocks: _containers.RepeatedCompositeFieldContainer[LaneClock]
    def __init__(self, chunk: _Optional[int] = ..., version: _Optional[int] = ..., optimizer_step: _Optional[int] = ..., closed: _Optional[_Union[Record, _Mapping]] = ..., previous: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., clocks: _Optional[_Iterable[_Union[LaneClock, _Mapping]]] = ...) -> None: ...

class Position(_message.Message):
    __slots__ = ("chunk", "version", "closed")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    version: int
    closed: bool
    def __init__(self, chunk: _Optional[int] = ..., version: _Optional[int] = ..., closed: bool = ...) -> None: ...

class DeliverRequest(_message.Message):
    __slots__ = ("run_id", "sender", "receiver", "plan", "timeline", "replicate", "ack", "records", "refill", "position", "slice", "payload")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    REPLICATE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    REFILL_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sender: str
    receiver: str
    plan: _tensor_pb2.PlanNumber
    timeline: int
    replicate: Replicate
    ack: Ack
    records: Records
    refill: Refill
    position: Position
    slice: _tensor_pb2.Slice
    payload: bytes
    def __init__(self, run_id: _Optional[str] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., plan: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., timeline: _Optional[int] = ..., replicate: _Optional[_Union[Replicate, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., records: _Optional[_Union[Records, _Mapping]] = ..., refill: _Optional[_Union[Refill, _Mapping]] = ..., position: _Optional[_Union[Position, _Mapping]] = ..., slice: _Optional[_Union[_tensor_pb2.Slice, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class DeliverResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: _coordinator_pb2.Plan
    def __init__(self, plan: _Optional[_Union[_coordinator_pb2.Plan, _Mapping]] = ...) -> None: ...
