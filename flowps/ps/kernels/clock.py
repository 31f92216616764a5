"""The system's monotonic clock, for kernels that do two things and are to say how long each took. About 20 ns a call."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_CLOCK_MONOTONIC = 1
_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def clock_ns(typing: Any) -> Any:
    """Nanoseconds, as time.monotonic_ns on Linux."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        time = cgutils.alloca_once(builder, _I64, size=2)
        kind = ir.FunctionType(_I32, [_I32, _I64.as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [_I32(_CLOCK_MONOTONIC), time])
        seconds, rest = builder.load(time), builder.load(builder.gep(time, [_I32(1)]))
        return builder.add(builder.mul(seconds, _I64(1_000_000_000)), rest)

    return types.int64(), codegen
