from collections.abc import Iterable as _Iterable
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper

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
    def __init__(self, protocol: int | None = ..., run: str | None = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: Head
    def __init__(self, head: Head | _Mapping | None = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("max_message_bytes", "protocol", "run", "shard", "slots", "version")
    class Slot(_message.Message):
        __slots__ = ("name", "part", "parts", "width")
        NAME_FIELD_NUMBER: _ClassVar[int]
        WIDTH_FIELD_NUMBER: _ClassVar[int]
        PART_FIELD_NUMBER: _ClassVar[int]
        PARTS_FIELD_NUMBER: _ClassVar[int]
        name: str
        width: int
        part: int
        parts: int
        def __init__(
            self, name: str | None = ..., width: int | None = ..., part: int | None = ..., parts: int | None = ...
        ) -> None: ...

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
    def __init__(
        self,
        protocol: int | None = ...,
        version: str | None = ...,
        run: str | None = ...,
        shard: int | None = ...,
        slots: _Iterable[DescribeReply.Slot | _Mapping] | None = ...,
        max_message_bytes: int | None = ...,
    ) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("batch", "floats", "head", "length_bytes", "lengths", "padding", "shares", "signs", "size", "training")
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
    def __init__(
        self,
        head: Head | _Mapping | None = ...,
        batch: int | None = ...,
        size: int | None = ...,
        training: bool | None = ...,
        floats: Floats | str | None = ...,
        length_bytes: int | None = ...,
        lengths: bytes | None = ...,
        padding: bytes | None = ...,
        signs: bytes | None = ...,
        shares: bytes | None = ...,
    ) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("embeddings", "padding", "scale")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    scale: float
    padding: bytes
    embeddings: bytes
    def __init__(self, scale: float | None = ..., padding: bytes | None = ..., embeddings: bytes | None = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("batch", "floats", "gradient", "head", "padding", "rate_scale", "scale", "size")
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
    def __init__(
        self,
        head: Head | _Mapping | None = ...,
        batch: int | None = ...,
        size: int | None = ...,
        floats: Floats | str | None = ...,
        scale: float | None = ...,
        rate_scale: float | None = ...,
        padding: bytes | None = ...,
        gradient: bytes | None = ...,
    ) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: int | None = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("batch", "head")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    head: Head
    batch: int
    def __init__(self, head: Head | _Mapping | None = ..., batch: int | None = ...) -> None: ...

class ForgetReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
