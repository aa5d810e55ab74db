"""Addresses: tensors that come as 64-bit integers, 0 for one that was not given.

A pointer argument makes Triton compile one kernel for each dtype, for None and for each 16-byte alignment of it; an
integer makes none. What a kernel may rely on is told by compile-time constants instead, one for all tensors.
"""

import triton
import triton.language as tl

# What an element of a tensor is whose dtype is known at run time only. The host's names: backends/triton.py.
BYTE: tl.constexpr = tl.constexpr(1)
HALF: tl.constexpr = tl.constexpr(2)
BFLOAT: tl.constexpr = tl.constexpr(3)
FLOAT: tl.constexpr = tl.constexpr(4)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same stride, known to the compiler as a multiple of ALIGN: what the host has checked.

    tl.multiple_of on an argument is lost on the way through an inlined function (Triton 3.6 to 3.9); a product
    with a constant is not, and 16-byte copies depend on it.
    """
    return stride // ALIGN * ALIGN if ALIGN > 1 else stride


@triton.jit
def times(n, stride, ALIGN: tl.constexpr):
    """n * stride (int64), for 0 <= n < 2**31, and with ALIGN > 1 for a stride that the host has found aligned.

    Such strides are multiples of ALIGN below ALIGN * 2**32: a product of 32 bits by 32, half the instructions. A decode
    program has 32 of them before its first copy, when no instruction is in a cache yet.
    """
    if ALIGN > 1:
        units = (stride.to(tl.uint64) // ALIGN).to(tl.uint32)
        product = (n.to(tl.uint32).to(tl.uint64) * units.to(tl.uint64)).to(tl.int64) * ALIGN
    else:
        product = n.to(tl.int64) * stride
    return product


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The address as a pointer to TYPE; with ALIGN > 1 known to the compiler as a multiple of 16 bytes."""
    # The interpreter takes an argument as 32 bits where its value fits.
    where = address.to(tl.int64).to(tl.pointer_type(TYPE))
    return tl.multiple_of(where, 16) if ALIGN > 1 else where


@triton.jit
def load_index(address, i, absent):
    """Entry i of an int32 tensor, `absent` where there is no tensor. A load that is predicated off costs nothing."""
    return tl.load(pointer(address, tl.int32, 1) + i, mask=address != 0, other=absent)


@triton.jit
def load_kept(address, i, absent):
    """The same, for what the next layers read again: it stays in the L2 cache while keys and values stream through it."""
    where = pointer(address, tl.int32, 1) + i
    return tl.load(where, mask=address != 0, other=absent, eviction_policy="evict_last")


@triton.jit
def to_float(raw, kind):
    """float16 or bfloat16 numbers, given as their bits (int16), in float32."""
    bfloat = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.where(kind == BFLOAT, bfloat, raw.to(tl.float16, bitcast=True).to(tl.float32))


@triton.jit
def load_float(address, kind, offset, mask):
    """Numbers at `offset` of a floating-point tensor of that kind, in float32, 0 where not `mask`."""
    narrow = tl.load(pointer(address, tl.int16, 1) + offset, mask=mask & (kind != FLOAT), other=0)
    wide = tl.load(pointer(address, tl.float32, 1) + offset, mask=mask & (kind == FLOAT), other=0.0)
    return tl.where(kind == FLOAT, wide, to_float(narrow, kind))
