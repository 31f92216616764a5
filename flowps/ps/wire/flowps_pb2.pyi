from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Floats(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT32: _ClassVar[Floats]
    FLOAT16: _ClassVar[Floats]
FLOAT32: Floats
FLOAT16: Floats

class Head(_message.Message):
    __slots__ = ("protocol", "run")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: Head
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol", "version", "run", "shard", "slots", "max_message_bytes")
    class Slot(_message.Message):
        __slots__ = ("name", "width", "part", "parts")
        NAME_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        PART_FIELD_NUMBER: _ClassVar[int]
        PARTS_FIELD_NUMBER: _ClassVar[int]
        name: str
        width: int
        part: int
        parts: int
        def __init__(self, name: _Optional[str] = ..., width: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    run: str
    shard: int
    slots: _containers.RepeatedCompositeFieldContainer[DescribeReply.Slot]
    max_message_bytes: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., run: _Optional[str] = ..., shard: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[DescribeReply.Slot, _Mapping]]] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("head", "batch", "size", "training", "floats", "length_bytes", "lengths", "padding", "signs", "shares")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    SIGNS_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    head: Head
    batch: int
    size: int
    training: bool
    floats: Floats
    length_bytes: int
    lengths: bytes
    padding: bytes
    signs: bytes
    shares: bytes
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ..., batch: _Optional[int] = ..., size: _Optional[int] = ..., training: _Optional[bool] = ..., floats: _Optional[_Union[Floats, str]] = ..., length_bytes: _Optional[int] = ..., lengths: _Optional[bytes] = ..., padding: _Optional[bytes] = ..., signs: _Optional[bytes] = ..., shares: _Optional[bytes] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("scale", "padding", "embeddings")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    scale: float
    padding: bytes
    embeddings: bytes
    def __init__(self, scale: _Optional[float] = ..., padding: _Optional[bytes] = ..., embeddings: _Optional[bytes] = ...) -> None: ...

class FindReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PoolRequest(_message.Message):
    __slots__ = ("head", "batch", "size", "floats")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    head: Head
    batch: int
    size: int
    floats: Floats
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ..., batch: _Optional[int] = ..., size: _Optional[int] = ..., floats: _Optional[_Union[Floats, str]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("head", "batch", "size", "floats", "scale", "rate_scale", "padding", "gradient")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FLOATS_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    RATE_SCALE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    head: Head
    batch: int
    size: int
    floats: Floats
    scale: float
    rate_scale: float
    padding: bytes
    gradient: bytes
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ..., batch: _Optional[int] = ..., size: _Optional[int] = ..., floats: _Optional[_Union[Floats, str]] = ..., scale: _Optional[float] = ..., rate_scale: _Optional[float] = ..., padding: _Optional[bytes] = ..., gradient: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("head", "batch")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    head: Head
    batch: int
    def __init__(self, head: _Optional[_Union[Head, _Mapping]] = ..., batch: _Optional[int] = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
