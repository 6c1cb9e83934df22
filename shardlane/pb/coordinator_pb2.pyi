from shardlane.pb import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SHARD: _ClassVar[Role]
    ROLE_WORKER: _ClassVar[Role]

class RunState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_STATE_UNSPECIFIED: _ClassVar[RunState]
    RUN_STATE_GATHERING: _ClassVar[RunState]
    RUN_STATE_TRAINING: _ClassVar[RunState]
    RUN_STATE_PAUSED: _ClassVar[RunState]
    RUN_STATE_FINISHING: _ClassVar[RunState]
    RUN_STATE_FINISHED: _ClassVar[RunState]
    RUN_STATE_FAILED: _ClassVar[RunState]

class ControlAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTROL_ACTION_UNSPECIFIED: _ClassVar[ControlAction]
    CONTROL_ACTION_PAUSE: _ClassVar[ControlAction]
    CONTROL_ACTION_RESUME: _ClassVar[ControlAction]
    CONTROL_ACTION_CHECKPOINT: _ClassVar[ControlAction]
    CONTROL_ACTION_STOP: _ClassVar[ControlAction]
ROLE_UNSPECIFIED: Role
ROLE_SHARD: Role
ROLE_WORKER: Role
RUN_STATE_UNSPECIFIED: RunState
RUN_STATE_GATHERING: RunState
RUN_STATE_TRAINING: RunState
RUN_STATE_PAUSED: RunState
RUN_STATE_FINISHING: RunState
RUN_STATE_FINISHED: RunState
RUN_STATE_FAILED: RunState
CONTROL_ACTION_UNSPECIFIED: ControlAction
CONTROL_ACTION_PAUSE: ControlAction
CONTROL_ACTION_RESUME: ControlAction
CONTROL_ACTION_CHECKPOINT: ControlAction
CONTROL_ACTION_STOP: ControlAction

class Member(_message.Message):
    __slots__ = ("incarnation", "role", "address")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    role: Role
    address: str
    def __init__(self, incarnation: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ...) -> None: ...

class StageLayers(_message.Message):
    __slots__ = ("first", "end")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    first: int
    end: int
    def __init__(self, first: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("workers", "blocks", "formed", "begins_at", "shadow")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FORMED_FIELD_NUMBER: _ClassVar[int]
    BEGINS_AT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedScalarFieldContainer[int]
    blocks: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Block]
    formed: _tensor_pb2.PlanNumber
    begins_at: int
    shadow: bool
    def __init__(self, workers: _Optional[_Iterable[int]] = ..., blocks: _Optional[_Iterable[_Union[_tensor_pb2.Block, _Mapping]]] = ..., formed: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., begins_at: _Optional[int] = ..., shadow: bool = ...) -> None: ...

class ChunkPlacement(_message.Message):
    __slots__ = ("in_sync", "learner")
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    in_sync: _containers.RepeatedScalarFieldContainer[int]
    learner: int
    def __init__(self, in_sync: _Optional[_Iterable[int]] = ..., learner: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("number", "run_id", "timeline", "members", "stages", "replicas", "chunks", "digest", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: _tensor_pb2.PlanNumber
    run_id: str
    timeline: _tensor_pb2.Timeline
    members: _containers.RepeatedCompositeFieldContainer[Member]
    stages: _containers.RepeatedCompositeFieldContainer[StageLayers]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    chunks: _containers.RepeatedCompositeFieldContainer[ChunkPlacement]
    digest: str
    reason: str
    def __init__(self, number: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., run_id: _Optional[str] = ..., timeline: _Optional[_Union[_tensor_pb2.Timeline, _Mapping]] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[StageLayers, _Mapping]]] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., chunks: _Optional[_Iterable[_Union[ChunkPlacement, _Mapping]]] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("protocol_version", "run_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run_id", "config", "data_digest", "checkpoint_path")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    DATA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_PATH_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    config: str
    data_digest: str
    checkpoint_path: str
    def __init__(self, run_id: _Optional[str] = ..., config: _Optional[str] = ..., data_digest: _Optional[str] = ..., checkpoint_path: _Optional[str] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("protocol_version", "role", "incarnation", "address", "numerics_class", "run_id", "metrics_address", "memory_bytes", "join_token")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_CLASS_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    role: Role
    incarnation: str
    address: str
    numerics_class: str
    run_id: str
    metrics_address: str
    memory_bytes: int
    join_token: str
    def __init__(self, protocol_version: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., numerics_class: _Optional[str] = ..., run_id: _Optional[str] = ..., metrics_address: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., join_token: _Optional[str] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("lease_seconds", "readmission")
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    READMISSION_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    readmission: str
    def __init__(self, lease_seconds: _Optional[float] = ..., readmission: _Optional[str] = ...) -> None: ...

class StepSummary(_message.Message):
    __slots__ = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "requests", "tally", "refused")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    skipped: bool
    requests: int
    tally: _tensor_pb2.Tally
    refused: bool
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., tokens: _Optional[int] = ..., skipped: bool = ..., requests: _Optional[int] = ..., tally: _Optional[_Union[_tensor_pb2.Tally, _Mapping]] = ..., refused: bool = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("incarnation", "plan", "version", "steps", "activity", "caught_up", "diverged", "lane_seconds", "leaving")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    CAUGHT_UP_FIELD_NUMBER: _ClassVar[int]
    DIVERGED_FIELD_NUMBER: _ClassVar[int]
    LANE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    plan: _tensor_pb2.PlanNumber
    version: int
    steps: _containers.RepeatedCompositeFieldContainer[StepSummary]
    activity: str
    caught_up: _containers.RepeatedCompositeFieldContainer[CaughtUp]
    diverged: _containers.RepeatedScalarFieldContainer[int]
    lane_seconds: float
    leaving: bool
    def __init__(self, incarnation: _Optional[str] = ..., plan: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., version: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepSummary, _Mapping]]] = ..., activity: _Optional[str] = ..., caught_up: _Optional[_Iterable[_Union[CaughtUp, _Mapping]]] = ..., diverged: _Optional[_Iterable[int]] = ..., lane_seconds: _Optional[float] = ..., leaving: bool = ...) -> None: ...

class CaughtUp(_message.Message):
    __slots__ = ("chunk", "learner")
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    learner: str
    def __init__(self, chunk: _Optional[int] = ..., learner: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("lease_seconds", "state", "acknowledged_steps", "requests", "reason", "may_leave", "timeline")
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_STEPS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAY_LEAVE_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    lease_seconds: float
    state: RunState
    acknowledged_steps: int
    requests: int
    reason: str
    may_leave: bool
    timeline: int
    def __init__(self, lease_seconds: _Optional[float] = ..., state: _Optional[_Union[RunState, str]] = ..., acknowledged_steps: _Optional[int] = ..., requests: _Optional[int] = ..., reason: _Optional[str] = ..., may_leave: bool = ..., timeline: _Optional[int] = ...) -> None: ...

class WatchPlansRequest(_message.Message):
    __slots__ = ("incarnation", "have")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    have: _tensor_pb2.PlanNumber
    def __init__(self, incarnation: _Optional[str] = ..., have: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ...) -> None: ...

class WatchPlansResponse(_message.Message):
    __slots__ = ("plan",)
    PLAN_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class ReportValidationRequest(_message.Message):
    __slots__ = ("incarnation", "version", "index", "loss_sum", "tokens")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    version: int
    index: int
    loss_sum: float
    tokens: int
    def __init__(self, incarnation: _Optional[str] = ..., version: _Optional[int] = ..., index: _Optional[int] = ..., loss_sum: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class ReportValidationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChunkChecksums(_message.Message):
    __slots__ = ("chunk", "checksums")
    class ChecksumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    chunk: int
    checksums: _containers.ScalarMap[str, str]
    def __init__(self, chunk: _Optional[int] = ..., checksums: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ReportCheckpointRequest(_message.Message):
    __slots__ = ("incarnation", "version", "optimizer_step", "file", "num_bytes", "chunks", "error", "timeline", "clocks")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_STEP_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    CLOCKS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    version: int
    optimizer_step: int
    file: str
    num_bytes: int
    chunks: _containers.RepeatedCompositeFieldContainer[ChunkChecksums]
    error: str
    timeline: int
    clocks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, incarnation: _Optional[str] = ..., version: _Optional[int] = ..., optimizer_step: _Optional[int] = ..., file: _Optional[str] = ..., num_bytes: _Optional[int] = ..., chunks: _Optional[_Iterable[_Union[ChunkChecksums, _Mapping]]] = ..., error: _Optional[str] = ..., timeline: _Optional[int] = ..., clocks: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportCheckpointResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ("points",)
    POINTS_FIELD_NUMBER: _ClassVar[int]
    points: int
    def __init__(self, points: _Optional[int] = ...) -> None: ...

class MemberStatus(_message.Message):
    __slots__ = ("member", "metrics_address", "lease_age_seconds", "version", "activity", "plan", "leaving")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LEASE_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    member: Member
    metrics_address: str
    lease_age_seconds: float
    version: int
    activity: str
    plan: _tensor_pb2.PlanNumber
    leaving: bool
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., metrics_address: _Optional[str] = ..., lease_age_seconds: _Optional[float] = ..., version: _Optional[int] = ..., activity: _Optional[str] = ..., plan: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., leaving: bool = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("primary", "backup", "learner")
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    LEARNER_FIELD_NUMBER: _ClassVar[int]
    primary: int
    backup: int
    learner: int
    def __init__(self, primary: _Optional[int] = ..., backup: _Optional[int] = ..., learner: _Optional[int] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("unix_seconds", "text", "is_warning")
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_WARNING_FIELD_NUMBER: _ClassVar[int]
    unix_seconds: float
    text: str
    is_warning: bool
    def __init__(self, unix_seconds: _Optional[float] = ..., text: _Optional[str] = ..., is_warning: bool = ...) -> None: ...

class CurvePoint(_message.Message):
    __slots__ = ("step", "loss")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ...) -> None: ...

class CheckpointSeen(_message.Message):
    __slots__ = ("version", "unix_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    unix_seconds: float
    def __init__(self, version: _Optional[int] = ..., unix_seconds: _Optional[float] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("run_id", "run_name", "state", "reason", "version", "last_step", "newest", "tokens_per_second", "plan", "members", "waiting_for", "newest_checkpoint", "validation_loss", "chunks_by_shard", "holdings", "under_replicated_chunks", "goodput", "goodput_tokens_per_second", "consistency", "staleness", "clock_spread_steps", "skipped_steps", "unix_seconds", "events", "losses", "validations", "checkpoints")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FOR_FIELD_NUMBER: _ClassVar[int]
    NEWEST_CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_BY_SHARD_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    UNDER_REPLICATED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_SPREAD_STEPS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_STEPS_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    VALIDATIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    run_name: str
    state: RunState
    reason: str
    version: int
    last_step: int
    newest: StepSummary
    tokens_per_second: float
    plan: Plan
    members: _containers.RepeatedCompositeFieldContainer[MemberStatus]
    waiting_for: str
    newest_checkpoint: int
    validation_loss: float
    chunks_by_shard: _containers.RepeatedScalarFieldContainer[int]
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    under_replicated_chunks: int
    goodput: float
    goodput_tokens_per_second: float
    consistency: str
    staleness: int
    clock_spread_steps: int
    skipped_steps: int
    unix_seconds: float
    events: _containers.RepeatedCompositeFieldContainer[Event]
    losses: _containers.RepeatedCompositeFieldContainer[CurvePoint]
    validations: _containers.RepeatedCompositeFieldContainer[CurvePoint]
    checkpoints: _containers.RepeatedCompositeFieldContainer[CheckpointSeen]
    def __init__(self, run_id: _Optional[str] = ..., run_name: _Optional[str] = ..., state: _Optional[_Union[RunState, str]] = ..., reason: _Optional[str] = ..., version: _Optional[int] = ..., last_step: _Optional[int] = ..., newest: _Optional[_Union[StepSummary, _Mapping]] = ..., tokens_per_second: _Optional[float] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., members: _Optional[_Iterable[_Union[MemberStatus, _Mapping]]] = ..., waiting_for: _Optional[str] = ..., newest_checkpoint: _Optional[int] = ..., validation_loss: _Optional[float] = ..., chunks_by_shard: _Optional[_Iterable[int]] = ..., holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ..., under_replicated_chunks: _Optional[int] = ..., goodput: _Optional[float] = ..., goodput_tokens_per_second: _Optional[float] = ..., consistency: _Optional[str] = ..., staleness: _Optional[int] = ..., clock_spread_steps: _Optional[int] = ..., skipped_steps: _Optional[int] = ..., unix_seconds: _Optional[float] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., losses: _Optional[_Iterable[_Union[CurvePoint, _Mapping]]] = ..., validations: _Optional[_Iterable[_Union[CurvePoint, _Mapping]]] = ..., checkpoints: _Optional[_Iterable[_Union[CheckpointSeen, _Mapping]]] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("action",)
    ACTION_FIELD_NUMBER: _ClassVar[int]
    action: ControlAction
    def __init__(self, action: _Optional[_Union[ControlAction, str]] = ...) -> None: ...

class ControlResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: RunState
    def __init__(self, state: _Optional[_Union[RunState, str]] = ...) -> None: ...
