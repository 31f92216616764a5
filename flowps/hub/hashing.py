"""The published hash: a feature value → its 64-bit sign, and the kernels that place signs and their shares into batches.

    seed(slot)  = xxh64(UTF-8 of the slot's name, seed 0)
    sign(value) = xxh64(bytes of the value, seed(slot))
    bytes       = UTF-8 for strings; 8 bytes little-endian two's complement for integers of any width and booleans
    hash_size N = the sign is folded: xxh64(8 bytes of (sign mod N), seed(slot)), so at most N signs and still well spread

The string "5" and the integer 5 are different values. `docs/hashing.md` has test vectors.

XXH64 follows the specification, github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, without deviation. The kernels read
Arrow buffers (values, offsets) and write uint64 signs in the order of a batch: arrays in, caller allocates the output, no
Python objects, no GIL. Called by `decode`, from any number of threads at once.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# numba turns `uint64 op int64` into float64 in silence, so every constant that meets a sign is uint64.
_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
_U0, _U1, _U7, _U8, _U11, _U12, _U18 = (np.uint64(n) for n in (0, 1, 7, 8, 11, 12, 18))
_U23, _U27, _U29, _U31, _U32, _U33, _U64 = (np.uint64(n) for n in (23, 27, 29, 31, 32, 33, 64))

_kernel = numba.njit(nogil=True, cache=True, error_model="numpy")


@_kernel
def _rotate(x, bits):
    return (x << bits) | (x >> (_U64 - bits))


@_kernel
def _round(lane, word):
    return _rotate(lane + word * _P2, _U31) * _P1


@_kernel
def _avalanche(h):
    h = (h ^ (h >> _U33)) * _P2
    h = (h ^ (h >> _U29)) * _P3
    return h ^ (h >> _U32)


def _little_endian(bits: int) -> Any:
    """Read `bits` bits at any byte of a uint8 array as one uint64. numba reads byte by byte otherwise."""

    @intrinsic
    def load(typing: Any, data: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            array = context.make_array(sig.args[0])(context, builder, args[0])
            pointer = builder.bitcast(builder.gep(array.data, [args[1]]), ir.IntType(bits).as_pointer())
            value = builder.load(pointer)
            value.align = 1
            return builder.zext(value, ir.IntType(64)) if bits < 64 else value

        return types.uint64(data, types.intp), codegen

    return load


_word, _half_word = _little_endian(64), _little_endian(32)


@_kernel
def _mix_word(h, word):
    return _rotate(h ^ _round(_U0, word), _U27) * _P1 + _P4


@_kernel
def xxh64_word(word, seed):
    """xxh64 of the 8 little-endian bytes of `word` (both uint64)."""
    return _avalanche(_mix_word(seed + _P5 + _U8, word))


@_kernel
def xxh64_bytes(data, start, stop, seed):
    """xxh64 of `data[start:stop]` (uint8 array), seed uint64."""
    at = start
    length = np.uint64(stop - start)
    if stop - start >= 32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + 32 <= stop:
            a = _round(a, _word(data, at))
            b = _round(b, _word(data, at + 8))
            c = _round(c, _word(data, at + 16))
            d = _round(d, _word(data, at + 24))
            at += 32
        h = _rotate(a, _U1) + _rotate(b, _U7) + _rotate(c, _U12) + _rotate(d, _U18)
        for lane in (a, b, c, d):
            h = (h ^ _round(_U0, lane)) * _P1 + _P4
    else:
        h = seed + _P5
    h += length
    while at + 8 <= stop:
        h = _mix_word(h, _word(data, at))
        at += 8
    if at + 4 <= stop:
        h = _rotate(h ^ (_half_word(data, at) * _P1), _U23) * _P2 + _P3
        at += 4
    while at < stop:
        h = _rotate(h ^ (np.uint64(data[at]) * _P5), _U11) * _P1
        at += 1
    return _avalanche(h)


@_kernel
def _fold(sign, hash_size, seed):
    return sign if hash_size == _U0 else xxh64_word(sign % hash_size, seed)


@_kernel
def hash_words(words, seed, hash_size, signs):
    """uint64 `words` [n] → uint64 `signs` [n]; `seed`, `hash_size` uint64 (hash_size 0: no folding)."""
    for i in range(len(words)):
        signs[i] = _fold(xxh64_word(words[i], seed), hash_size, seed)


@_kernel
def hash_strings(data, starts, seed, hash_size, signs):
    """Strings `data[starts[i]:starts[i + 1]]` (uint8, int64 [n + 1]) → uint64 `signs` [n]."""
    for i in range(len(signs)):
        signs[i] = _fold(xxh64_bytes(data, starts[i], starts[i + 1], seed), hash_size, seed)


@_kernel
def bag_lengths(starts, rows, lengths):
    """`lengths[i]` = signs in the bag of row `rows[i]`."""
    for i in range(len(rows)):
        lengths[i] = starts[rows[i] + 1] - starts[rows[i]]


@intrinsic
def _copy_eight(typing: Any, values: Any, at: Any, out: Any, to: Any) -> Any:
    """`out[to:to + 8] = values[at:at + 8]`, of arrays of one type: a load and a store."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, target = (context.make_array(sig.args[k])(context, builder, args[k]).data for k in (0, 2))
        element = context.get_data_type(sig.args[0].dtype)
        eight = ir.VectorType(element, 8).as_pointer()
        found = builder.load(builder.bitcast(builder.gep(source, [args[1]]), eight))
        stored = builder.store(found, builder.bitcast(builder.gep(target, [args[3]]), eight))
        found.align = stored.align = context.get_abi_alignment(element)
        return context.get_dummy_value()

    return types.void(values, types.intp, out, types.intp), codegen


@_kernel
def place_singles(values, rows, bounds, bases, out):
    """One value (sign or share) per row: those of rows `rows[bounds[k]:bounds[k + 1]]` go to `out[bases[k]:]`, for each batch k.

    `values` and `out` are of one type: numba compiles the kernel for each that comes.
    """
    for k in range(len(bases)):
        for i in range(bounds[k], bounds[k + 1]):
            out[bases[k] + i - bounds[k]] = values[rows[i]]


@_kernel
def place_bags(values, starts, rows, bounds, bases, ends, out):
    """As `place_singles`, for the bags `values[starts[r]:starts[r + 1]]` of rows r, one after the other, up to `ends[k]`.

    Eight values are copied at once, however many are left, and the next bag overwrites what is too much: no branch depends on how
    long a short bag is, which the processor could not predict.
    """
    for k in range(len(bases)):
        to = bases[k]
        for j in range(bounds[k], bounds[k + 1]):
            start, stop = starts[rows[j]], starts[rows[j] + 1]
            for at in range(start, stop, 8):
                here = to + at - start
                if at + 8 <= len(values) and here + 8 <= ends[k]:
                    _copy_eight(values, at, out, here)
                else:
                    for i in range(min(stop - at, 8)):
                        out[here + i] = values[at + i]
            to += stop - start


def slot_seed(name: str) -> np.uint64:
    """The seed of a slot's signs: xxh64 of its name's UTF-8, seed 0."""
    data = np.frombuffer(name.encode(), np.uint8)
    return np.uint64(xxh64_bytes(data, 0, len(data), _U0))
