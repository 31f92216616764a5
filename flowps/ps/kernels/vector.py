"""Vectors of 16 and 8 float32 and the prefetch instruction, for numba kernels.

numba has no vector values: a loop over a row's 16 floats is compiled with a check whether the arrays overlap, each time, and
the sums of a bag go through memory. With vectors as values a bag's sum stays in registers (`bench.kernel` compares). LLVM splits
the vectors where the processor's are narrower. Called only by kernels.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

_FLOAT = ir.FloatType()
_FLOAT_BYTES = 4


class Vector(types.Type):
    """numba type of a vector of `width` float32."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vector{width}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_FLOAT, vector.width))


def _load(width: int) -> Any:
    @intrinsic
    def load(typing: Any, array: Any, at: Any) -> Any:
        vector = Vector(width)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = _element(context, builder, sig.args[0], args, width)
            value = builder.load(pointer)
            value.align = _FLOAT_BYTES
            return value

        return vector(array, types.intp), codegen

    return load


def _store(width: int) -> Any:
    @intrinsic
    def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            written = builder.store(args[2], _element(context, builder, sig.args[0], args, width))
            written.align = _FLOAT_BYTES
            return context.get_dummy_value()

        return types.void(array, types.intp, Vector(width)), codegen

    return store


def _splat(width: int) -> Any:
    @intrinsic
    def splat(typing: Any, scalar: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.VectorType(_FLOAT, width)
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), args[0], ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

        return Vector(width)(types.float32), codegen

    return splat


def _sqrt(width: int) -> Any:
    @intrinsic
    def sqrt(typing: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = ir.VectorType(_FLOAT, width)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.sqrt.v{width}f32")
            return builder.call(function, [args[0]])

        return Vector(width)(Vector(width)), codegen

    return sqrt


def _element(context: Any, builder: Any, kind: Any, args: Any, width: int) -> Any:
    """Pointer to `width` floats from element args[1] of the array args[0]."""
    array = context.make_array(kind)(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), ir.VectorType(_FLOAT, width).as_pointer())


@intrinsic
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of element `at`, which need not be inside the array: a prefetch never faults."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        array = context.make_array(sig.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, word(0), word(3), word(1)])  # read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _arithmetic(op: Any, instruction: str) -> None:
    """Teach numba `op` on two vectors of one width."""

    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(op, Vector, Vector)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _op, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _arithmetic(_op, _instruction)


@intrinsic
def uniform16(typing: Any, key: Any, counter: Any) -> Any:
    """16 numbers in [-1, 1): SplitMix64 of `key` at the counters from `counter` on, the upper 24 bits as a float."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = ir.VectorType(ir.IntType(64), 16)

        def all_of(number: int) -> Any:
            return ir.Constant(words, [number] * 16)

        def spread(word: Any) -> Any:
            one = builder.insert_element(ir.Constant(words, ir.Undefined), word, ir.IntType(32)(0))
            return builder.shuffle_vector(
                one, ir.Constant(words, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16)
            )

        counters = builder.add(spread(args[1]), ir.Constant(words, list(range(16))))
        z = builder.add(spread(args[0]), builder.mul(counters, all_of(0x9E3779B97F4A7C15)))
        z = builder.mul(builder.xor(z, builder.lshr(z, all_of(30))), all_of(0xBF58476D1CE4E5B9))
        z = builder.mul(builder.xor(z, builder.lshr(z, all_of(27))), all_of(0x94D049BB133111EB))
        z = builder.xor(z, builder.lshr(z, all_of(31)))
        floats = ir.VectorType(_FLOAT, 16)
        upper = builder.trunc(builder.lshr(z, all_of(40)), ir.VectorType(ir.IntType(32), 16))
        unit = builder.fmul(builder.sitofp(upper, floats), ir.Constant(floats, [2.0**-23] * 16))
        return builder.fsub(unit, ir.Constant(floats, [1.0] * 16))

    return Vector(16)(types.uint64, types.uint64), codegen


load16, store16, splat16, sqrt16 = _load(16), _store(16), _splat(16), _sqrt(16)
load8, store8, splat8, sqrt8 = _load(8), _store(8), _splat(8), _sqrt(8)
