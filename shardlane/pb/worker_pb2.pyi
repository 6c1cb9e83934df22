from shardlane.pb import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSFER_KIND_UNSPECIFIED: _ClassVar[TransferKind]
    TRANSFER_KIND_ACTIVATION: _ClassVar[TransferKind]
    TRANSFER_KIND_GRADIENT: _ClassVar[TransferKind]
    TRANSFER_KIND_VALIDATION: _ClassVar[TransferKind]
    TRANSFER_KIND_STANDING: _ClassVar[TransferKind]
TRANSFER_KIND_UNSPECIFIED: TransferKind
TRANSFER_KIND_ACTIVATION: TransferKind
TRANSFER_KIND_GRADIENT: TransferKind
TRANSFER_KIND_VALIDATION: TransferKind
TRANSFER_KIND_STANDING: TransferKind

class TransferRequest(_message.Message):
    __slots__ = ("run_id", "sender", "receiver", "plan", "step", "micro_batch", "kind", "slice", "published", "payload")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    sender: str
    receiver: str
    plan: _tensor_pb2.PlanNumber
    step: int
    micro_batch: int
    kind: TransferKind
    slice: _tensor_pb2.Slice
    published: int
    payload: bytes
    def __init__(self, run_id: _Optional[str] = ..., sender: _Optional[str] = ..., receiver: _Optional[str] = ..., plan: _Optional[_Union[_tensor_pb2.PlanNumber, _Mapping]] = ..., step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., kind: _Optional[_Union[TransferKind, str]] = ..., slice: _Optional[_Union[_tensor_pb2.Slice, _Mapping]] = ..., published: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class TransferResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
