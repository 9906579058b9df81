"""Dtypes: what sums are made in, products on the right units, and rounding.

Triton's interpreter computes bfloat16 wrongly and truncates to it, hence ``INTERPRETED``.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

# How a product of two tiles is made. TF32 holds float16 exactly, with float32's exponents; of a
# float32 the tensor cores cut off what it does not hold, twice the error of rounding and always
# towards 0, so numbers are rounded before; TF32X3 sums three products of it, and is nearly as good
# as float32. So are BFLOAT16X3 and TF32X2, whose a is of half a float32's bytes and taken as it is,
# times the parts of a float32 b.
IEEE, TF32, TF32X3, BFLOAT16, FLOAT16, BFLOAT16X3, TF32X2 = (tl.constexpr(i) for i in range(7))

TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def careful_product(dtype: torch.dtype) -> tl.constexpr:
    """Of what nearly equal numbers are subtracted from: nothing much coarser than float32."""
    return TF32X3 if dtype.itemsize == 2 else IEEE


@triton.jit
def dot(a, b, sums, PRODUCT: tl.constexpr):
    """sums + a @ b, accumulated in the dtype of sums."""
    if _INTERPRETED:
        if PRODUCT == TF32:  # as the tensor cores take them
            a, _ = tf32_parts(nearest_tf32(a))
            b, _ = tf32_parts(nearest_tf32(b))
        elif PRODUCT == BFLOAT16:
            a, b = rounded(a, tl.bfloat16), rounded(b, tl.bfloat16)
        return sums + tl.dot(a.to(sums.dtype), b.to(sums.dtype), out_dtype=sums.dtype)
    elif PRODUCT == BFLOAT16:
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    elif PRODUCT == FLOAT16:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    elif PRODUCT == TF32:
        return tl.dot(nearest_tf32(a), nearest_tf32(b), sums, input_precision="tf32")
    elif PRODUCT == TF32X3:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32x3")
    elif PRODUCT == BFLOAT16X3:
        first, second, third = bfloat16_parts(b)
        return tl.dot(a, third, tl.dot(a, second, tl.dot(a, first, sums)))
    elif PRODUCT == TF32X2:
        a = a.to(tl.float32)
        first, second = tf32_parts(b)
        sums = tl.dot(a, first, sums, input_precision="tf32")
        return tl.dot(a, second, sums, input_precision="tf32")
    else:
        return tl.dot(a.to(sums.dtype), b.to(sums.dtype), sums, input_precision="ieee")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def nearest_tf32(x):
    """x as a float32 of which the tensor cores take what TF32 holds that is nearest: half of that
    one's last place is added to the bits, and what is left below it they cut off."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN's could overflow
    else:  # it holds these
        return x.to(tl.float32)


@triton.jit
def bfloat16_parts(x):
    """Three bfloat16 that add up to a float32 x, but for its last bit."""
    first = rounded(x, tl.bfloat16)
    x -= first.to(tl.float32)
    second = rounded(x, tl.bfloat16)
    return first, second, rounded(x - second.to(tl.float32), tl.bfloat16)


@triton.jit
def tf32_parts(x):
    """What TF32 holds of a float32 x, and what is left, of which it holds all but two bits."""
    first = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return first, x - first


@triton.jit
def settled(sums, SETTLE: tl.constexpr):
    """sums; SETTLE: which the tensor cores have finished.

    On Hopper they read what was loaded where it lies in shared memory, and go on while the next
    load is begun. Triton gives loads one buffer more for that, but not those that other code
    takes too (triton-lang/triton#6691): there the next one would go where they still read. Code
    that uses the sums, though it does nothing, makes a program wait.
    """
    if SETTLE and not _INTERPRETED:
        sums = tl.inline_asm_elementwise(
            "", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1
        )
    return sums
