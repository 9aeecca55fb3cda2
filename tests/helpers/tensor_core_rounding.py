"""Triton's interpreter with the rounding of tensor cores in `tl.dot`.

The interpreter multiplies in float32 and rounds to nearest. Tensor cores multiply exactly, then add
a few products at a time to the accumulator: all terms are cut off at one bit below the last place
of the largest, and the sum is cut off to float32, toward zero (Fasi et al. 2021, "Numerical
behavior of NVIDIA tensor cores", for the A100). float32 inputs are cut off to tf32, 10 bits;
"tf32x3" is three such products, as Triton's TritonGPUF32DotTC pass writes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime import interpreter

# Products that an A100 adds at a time.
HALF_STEP, TF32_STEP = 8, 4
MANTISSA, EXTRA_BITS = 24, 1
TF32_DROPPED = 13
_EXPONENT = np.int64(0x7FF << 52)  # The bits of a float64 that hold its exponent.


def _last_place(largest: np.ndarray, bits: int) -> np.ndarray:
    """Of numbers with that many bits: the power of two that their last bit is worth."""
    power = (largest.view(np.int64) & _EXPONENT).view(np.float64)
    power[(power == 0) | np.isinf(power)] = 1
    return power * 2.0 ** (1 - bits)


def _matrix_product(a: np.ndarray, b: np.ndarray, c: np.ndarray, step: int) -> np.ndarray:
    """a [M, K] @ b [K, N] + c [M, N], as tensor cores that add `step` products at a time."""
    a, b, total = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    for first in range(0, a.shape[1], step):
        columns = range(first, min(first + step, a.shape[1]))
        terms = [total, *(a[:, k, None] * b[k] for k in columns)]  # [M, N] each
        largest = np.zeros_like(total)
        for term in terms:
            np.maximum(largest, np.abs(term), out=largest)
        place = _last_place(largest, MANTISSA + EXTRA_BITS)
        exact = np.zeros_like(total)
        for term in terms:
            term /= place
            exact += np.trunc(term, out=term)
        exact *= place
        place = _last_place(np.abs(exact), MANTISSA)
        total = np.trunc(exact / place) * place
    return total.astype(np.float32)


def _to_tf32(x: np.ndarray, nearest: bool) -> np.ndarray:
    """Cut off to 10 bits of mantissa, or rounded to nearest with ties away from zero."""
    bits = x.astype(np.float32).view(np.uint32)
    half = np.uint32(1 << (TF32_DROPPED - 1) if nearest else 0)
    rounded = (bits + half) & np.uint32(0xFFFFFFFF << TF32_DROPPED & 0xFFFFFFFF)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def tensor_core_dot(a: np.ndarray, b: np.ndarray, c: np.ndarray, precision: str) -> np.ndarray:
    """a @ b + c. precision: of float32 inputs, "tf32" or "tf32x3"; float16 needs none."""
    if a.dtype == np.float16:
        return _matrix_product(a, b, c, HALF_STEP)
    if precision == "tf32":
        return _matrix_product(_to_tf32(a, False), _to_tf32(b, False), c, TF32_STEP)
    big_a, big_b = _to_tf32(a, True), _to_tf32(b, True)
    small_a, small_b = _to_tf32(a - big_a, False), _to_tf32(b - big_b, False)
    total = _matrix_product(small_a, big_b, np.zeros_like(c), TF32_STEP)
    total = _matrix_product(big_a, small_b, total, TF32_STEP)
    total = np.where(np.isnan(total), np.float32(0), total)
    return _matrix_product(big_a, big_b, total, TF32_STEP) + c


@contextmanager
def tensor_cores() -> Iterator[list[str]]:
    """`tl.dot` of interpreted kernels rounds as tensor cores do. Yields the precisions used."""
    used: list[str] = []
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        precision = str(input_precision).rsplit(".", 1)[-1].lower()
        if a.data.dtype == np.float32 and precision == "ieee":
            used.append("ieee float32")
            return plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        used.append(f"{precision} {a.data.dtype}")
        with np.errstate(invalid="ignore", over="ignore"):
            result = tensor_core_dot(a.data, b.data, d.data, precision)
        return interpreter.TensorHandle(result, d.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield used
