"""Lanes: 16, 8 or one float32 as one value, their arithmetic, and the prefetch instruction, for numba kernels.

numba has no vector values: a loop over a row's 16 floats is compiled with a check whether the arrays overlap, each time, and
the sums of a bag go through memory. With vectors as values a bag's sum stays in registers (`bench.kernel` compares). LLVM splits
the vectors where the processor's are narrower. Called only by kernels.

A function that takes `like` is written once for all three widths: it gives lanes of the type of `like`, one of `lanes16()`,
`lanes8()` and `lane()`. Rows are kept in one of three storages, told apart by the type of the array: float32, bfloat16 (uint16
array) and float16 (int16 array); `load_as` widens, `store_as` rounds to nearest, `store_rounded` stochastically.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_BIT, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MAX_FLOAT16 = 65504.0
_STORED = (types.float32, types.uint16, types.int16)


class Vector(types.Type):
    """numba type of a vector of `width` float32."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vector{width}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_FLOAT, vector.width))


def _is_lanes(kind: Any) -> bool:
    return isinstance(kind, Vector) or kind == types.float32


def _width(kind: Any) -> int:
    return kind.width if isinstance(kind, Vector) else 1


def _of(element: Any, width: int) -> Any:
    """LLVM type of `width` elements."""
    return ir.VectorType(element, width) if width > 1 else element


def _all(element: Any, width: int, value: Any) -> Any:
    """LLVM constant: `width` times `value`."""
    return ir.Constant(_of(element, width), [value] * width if width > 1 else value)


def _spread(builder: Any, scalar: Any, width: int) -> Any:
    if width == 1:
        return scalar
    kind = ir.VectorType(scalar.type, width)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _call(builder: Any, name: str, width: int, *args: Any) -> Any:
    """LLVM's elementwise function `name`."""
    kind = _of(_FLOAT, width)
    full = f"llvm.{name}.v{width}f32" if width > 1 else f"llvm.{name}.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(args)), full)
    return builder.call(function, args)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any, width: int) -> Any:
    """Pointer to `width` elements from element `at` of an array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _of(element, width).as_pointer())


# --- memory -----------------------------------------------------------------------------------------------------------


@intrinsic
def load_as(typing: Any, like: Any, array: Any, at: Any) -> Any:
    """The lanes of `array` from element `at` on."""
    if not _is_lanes(like) or array.dtype not in _STORED:
        return None
    width, dtype = _width(like), array.dtype

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        element = _FLOAT if dtype == types.float32 else _I16
        pointer = _pointer(context, builder, sig.args[1], args[1], args[2], element, width)
        value = builder.load(pointer)
        value.align = 4 if dtype == types.float32 else 2
        if dtype == types.uint16:
            wide = builder.shl(builder.zext(value, _of(_I32, width)), _all(_I32, width, 16))
            return builder.bitcast(wide, _of(_FLOAT, width))
        if dtype == types.int16:
            return builder.fpext(builder.bitcast(value, _of(_HALF, width)), _of(_FLOAT, width))
        return value

    return like(like, array, types.intp), codegen


def _store(context: Any, builder: Any, kind: Any, array: Any, at: Any, lanes: Any, width: int, noise: Any) -> None:
    """Store `lanes`; to 16 bits with `noise`, an i32 below 2**16 per lane, to nearest where it is None."""
    if kind.dtype == types.float32:
        element, value, align = _FLOAT, lanes, 4
    elif kind.dtype == types.uint16:
        bits = builder.bitcast(lanes, _of(_I32, width))
        if noise is None:  # half to even
            odd = builder.and_(builder.lshr(bits, _all(_I32, width, 16)), _all(_I32, width, 1))
            noise = builder.add(odd, _all(_I32, width, 0x7FFF))
        value = builder.trunc(builder.lshr(builder.add(bits, noise), _all(_I32, width, 16)), _of(_I16, width))
        element, align = _I16, 2
    else:
        lanes = _call(builder, "minnum", width, lanes, _all(_FLOAT, width, _MAX_FLOAT16))
        lanes = _call(builder, "maxnum", width, lanes, _all(_FLOAT, width, -_MAX_FLOAT16))
        if noise is not None:
            # The 13 bits that float16 has not, carried up or cut off; those of subnormal numbers too, once 2**-14 is added.
            as_int, as_float = _of(_I32, width), _of(_FLOAT, width)
            bits = builder.bitcast(lanes, as_int)
            sign = builder.and_(bits, _all(_I32, width, 0x80000000))
            size = builder.bitcast(builder.and_(bits, _all(_I32, width, 0x7FFFFFFF)), as_float)
            least = _all(_FLOAT, width, 2.0**-14)
            lift = builder.select(builder.fcmp_ordered("<", size, least), least, _all(_FLOAT, width, 0.0))
            bits = builder.bitcast(builder.fadd(size, lift), as_int)
            bits = builder.add(bits, builder.lshr(noise, _all(_I32, width, 3)))
            bits = builder.and_(bits, _all(_I32, width, 0xFFFFE000))
            size = builder.fsub(builder.bitcast(bits, as_float), lift)
            lanes = builder.bitcast(builder.or_(builder.bitcast(size, as_int), sign), as_float)
        value = builder.bitcast(builder.fptrunc(lanes, _of(_HALF, width)), _of(_I16, width))
        element, align = _I16, 2
    written = builder.store(value, _pointer(context, builder, kind, array, at, element, width))
    written.align = align


@intrinsic
def store_as(typing: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Write `lanes` to `array` from element `at` on, rounded to nearest where the array is narrower."""
    if not _is_lanes(lanes) or array.dtype not in _STORED:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, at, value = args
        _store(context, builder, sig.args[0], array, at, value, _width(lanes), None)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), codegen


@intrinsic
def store_rounded(typing: Any, array: Any, at: Any, lanes: Any, key: Any, counter: Any) -> Any:
    """`store_as` with stochastic rounding: up or down with the probabilities that keep the mean.

    The random bits are those of `random_words` at the counters from `counter` on. A float32 array is written as it is.
    """
    if not _is_lanes(lanes):
        return None
    width = _width(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        noise = None
        if sig.args[0].dtype != types.float32:
            word = _random(builder, args[3], args[4], width)
            noise = builder.trunc(builder.lshr(word, _all(_I64, width, 48)), _of(_I32, width))
        array, at, value = args[:3]
        _store(context, builder, sig.args[0], array, at, value, width, noise)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes, types.uint64, types.uint64), codegen


@intrinsic
def stream_as(typing: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Write 16 `lanes` to a float32 array past the caches; the place must start on a cache line. `fence` must come after."""
    if lanes != Vector(16) or array.dtype != types.float32:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        written = builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1], _FLOAT, 16))
        written.align = 64
        written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), codegen


@intrinsic
def fence(typing: Any) -> Any:
    """Make what was written past the caches visible to all threads."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of element `at`, which need not be inside the array: a prefetch never faults."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        pointer = builder.bitcast(builder.gep(context.make_array(sig.args[0])(context, builder, args[0]).data, [args[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


# --- arithmetic -------------------------------------------------------------------------------------------------------


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
def fill(typing: Any, like: Any, scalar: Any) -> Any:
    """Lanes that are all `scalar`, a float32."""
    if not _is_lanes(like):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _spread(builder, args[1], _width(like))

    return like(like, types.float32), codegen


def _elementwise(name: str, num_args: int, doc: str) -> Any:
    def codegen_of(lanes: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return _call(builder, name, _width(lanes), *args)

        return codegen

    if num_args == 1:

        @intrinsic
        def one(typing: Any, a: Any) -> Any:
            return (a(a), codegen_of(a)) if _is_lanes(a) else None

        one.__doc__ = doc
        return one

    @intrinsic
    def two(typing: Any, a: Any, b: Any) -> Any:
        return (a(a, a), codegen_of(a)) if _is_lanes(a) and a == b else None

    two.__doc__ = doc
    return two


root = _elementwise("sqrt", 1, "Square roots.")
larger = _elementwise("maxnum", 2, "The larger of each pair.")
smaller = _elementwise("minnum", 2, "The smaller of each pair.")


@intrinsic
def total(typing: Any, lanes: Any) -> Any:
    """The sum of the lanes, pairwise: a tree of the same shape for every width."""
    if not _is_lanes(lanes):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value, width = args[0], _width(lanes)
        while width > 1:
            width //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(at, at + width))))
                for at in (0, width)
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, _I32(0)) if _width(lanes) > 1 else value

    return types.float32(lanes), codegen


@intrinsic
def all_finite(typing: Any, lanes: Any) -> Any:
    """Whether no lane is NaN or infinite."""
    if not _is_lanes(lanes):
        return None
    width = _width(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # Infinity minus itself is NaN, which is not equal to itself.
        zero = builder.fsub(args[0], args[0])
        bad = builder.fcmp_unordered("uno", zero, zero)
        if width > 1:
            bad = builder.icmp_unsigned("!=", builder.bitcast(bad, ir.IntType(width)), ir.IntType(width)(0))
        return builder.not_(bad)

    return types.boolean(lanes), codegen


# --- random numbers ---------------------------------------------------------------------------------------------------


def _random(builder: Any, key: Any, counter: Any, width: int) -> Any:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) of `key` at the counters from `counter` on: an i64 per lane."""

    def times(value: Any, factor: int) -> Any:
        return builder.mul(value, _all(_I64, width, factor))

    def folded(value: Any, by: int) -> Any:
        return builder.xor(value, builder.lshr(value, _all(_I64, width, by)))

    steps = _spread(builder, counter, width)
    if width > 1:
        steps = builder.add(steps, ir.Constant(ir.VectorType(_I64, width), list(range(width))))
    z = builder.add(_spread(builder, key, width), times(steps, _GOLDEN))
    return folded(times(folded(times(folded(z, 30), _MIX1), 27), _MIX2), 31)


@intrinsic
def uniform_as(typing: Any, like: Any, key: Any, first: Any) -> Any:
    """Lanes in [-1, 1), numbers `first` and following of the sequence of `key`; `first` must be even for more than one lane.

    Number d is made of the upper 24 bits of the lower (d even) or upper half of SplitMix64 at counter d // 2 + 1.
    """
    if not _is_lanes(like):
        return None
    width = _width(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        counter = builder.add(builder.lshr(args[2], _I64(1)), _I64(1))
        word = _random(builder, args[1], counter, max(1, width // 2))
        if width > 1:
            halves = builder.bitcast(word, _of(_I32, width))
        else:
            shift = builder.shl(builder.and_(args[2], _I64(1)), _I64(5))
            halves = builder.trunc(builder.lshr(word, shift), _I32)
        upper = builder.lshr(halves, _all(_I32, width, 8))
        unit = builder.fmul(builder.sitofp(upper, _of(_FLOAT, width)), _all(_FLOAT, width, 2.0**-23))
        return builder.fsub(unit, _all(_FLOAT, width, 1.0))

    return like(like, types.uint64, types.uint64), codegen


@intrinsic
def random_word(typing: Any, key: Any, counter: Any) -> Any:
    """SplitMix64 of `key` at `counter`, uint64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _random(builder, args[0], args[1], 1)

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def lanes16(typing: Any) -> Any:
    """16 zeros: the `like` of the widest lanes."""
    return Vector(16)(), lambda context, builder, sig, args: _all(_FLOAT, 16, 0.0)


@intrinsic
def lanes8(typing: Any) -> Any:
    """8 zeros."""
    return Vector(8)(), lambda context, builder, sig, args: _all(_FLOAT, 8, 0.0)


@intrinsic
def lane(typing: Any) -> Any:
    """One zero."""
    return types.float32(), lambda context, builder, sig, args: _all(_FLOAT, 1, 0.0)


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """The bits of a float32 as uint64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.uint64(types.float32), codegen
