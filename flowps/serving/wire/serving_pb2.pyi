from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("version", "flowps", "created", "run", "steps", "hash", "slots")
    class Slot(_message.Message):
        __slots__ = ("name", "dim", "rows", "seed", "hash_size", "dtype", "pooling")
        NAME_FIELD_NUMBER: _ClassVar[int]
        DIM_FIELD_NUMBER: _ClassVar[int]
        ROWS_FIELD_NUMBER: _ClassVar[int]
        SEED_FIELD_NUMBER: _ClassVar[int]
        HASH_SIZE_FIELD_NUMBER: _ClassVar[int]
        DTYPE_FIELD_NUMBER: _ClassVar[int]
        POOLING_FIELD_NUMBER: _ClassVar[int]
        name: str
        dim: int
        rows: int
        seed: int
        hash_size: int
        dtype: str
        pooling: str
        def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., rows: _Optional[int] = ..., seed: _Optional[int] = ..., hash_size: _Optional[int] = ..., dtype: _Optional[str] = ..., pooling: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FLOWPS_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    flowps: str
    created: float
    run: str
    steps: int
    hash: str
    slots: _containers.RepeatedCompositeFieldContainer[DescribeReply.Slot]
    def __init__(self, version: _Optional[int] = ..., flowps: _Optional[str] = ..., created: _Optional[float] = ..., run: _Optional[str] = ..., steps: _Optional[int] = ..., hash: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[DescribeReply.Slot, _Mapping]]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("slots",)
    class Slot(_message.Message):
        __slots__ = ("name", "signs")
        NAME_FIELD_NUMBER: _ClassVar[int]
        SIGNS_FIELD_NUMBER: _ClassVar[int]
        name: str
        signs: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, name: _Optional[str] = ..., signs: _Optional[_Iterable[int]] = ...) -> None: ...
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedCompositeFieldContainer[LookupRequest.Slot]
    def __init__(self, slots: _Optional[_Iterable[_Union[LookupRequest.Slot, _Mapping]]] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("version", "slots")
    class Slot(_message.Message):
        __slots__ = ("name", "dim", "unknown", "rows")
        NAME_FIELD_NUMBER: _ClassVar[int]
        DIM_FIELD_NUMBER: _ClassVar[int]
        UNKNOWN_FIELD_NUMBER: _ClassVar[int]
        ROWS_FIELD_NUMBER: _ClassVar[int]
        name: str
        dim: int
        unknown: int
        rows: bytes
        def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., unknown: _Optional[int] = ..., rows: _Optional[bytes] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    slots: _containers.RepeatedCompositeFieldContainer[LookupReply.Slot]
    def __init__(self, version: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[LookupReply.Slot, _Mapping]]] = ...) -> None: ...
