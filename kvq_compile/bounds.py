r"""Bound the error that a quantized cache adds to the output of attention.

Let a query ``q`` attend to tokens with keys ``k_i`` and values ``v_i``, scores ``s_i = scale * q . k_i`` and
weights ``w = softmax(s)``; let ``k'_i``, ``v'_i`` be what the cache stands for.

1.  *Scores.* A stored element is off by at most ``e_k``, so by Cauchy's inequality
    ``|s'_i - s_i| <= scale * |q|_2 * |k'_i - k_i|_2 <= scale * |q|_2 * sqrt(D) * e_k =: d``.
2.  *Weights.* ``w'_i = w_i exp(t_i) / sum_j w_j exp(t_j)`` with ``|t_i| <= d``. The total variation
    ``max_A w'(A) - w(A)`` is largest when ``t`` is ``d`` on ``A`` and ``-d`` off it; with ``p = w(A)`` it is
    ``p e^d / (p e^d + (1 - p) e^-d) - p``, largest at ``p = 1 / (1 + e^d)``, where it is ``tanh(d / 2)``.
    Hence ``sum_i |w'_i - w_i| <= 2 tanh(d / 2)``.
3.  *Output.* Per channel, ``o' - o = sum_i w'_i (v'_i - v_i) + sum_i (w'_i - w_i) v_i``. The first sum is at
    most ``e_v``. The second does not change when a constant is subtracted from all ``v_i``; with the middle
    of the channel's range subtracted it is at most ``2 tanh(d / 2) * R / 2``, ``R`` the range of the values.

Together ``|o' - o| <= e_v + R * tanh(d / 2)``.

**The element errors.** A group whose finite elements span ``r`` is clipped to ``c r`` and coded in steps of
``c r / (2^b - 1)``. Inside the clipped range the error is half a step, outside at most ``(1 - c) r / 2`` plus
half a step, so ``e = r (c / (2^b - 1) + (1 - c)) / 2``; a clip of 1 leaves half a step. Rounding the
parameters to fp16 widens the range by at most one unit in the last place of ``zero`` and the step by one of
``scale``: a factor ``1 + 2^-9`` and an offset of ``2^-10`` times the largest magnitude cover both.

A rotated group is coded in the rotated basis. The rotation keeps the norm, so step 1 needs ``sqrt(D) e_k``
as before; one channel of the values collects the errors of all, hence a factor ``sqrt(block)`` on ``e_v``.
"""

from __future__ import annotations

import sympy

from kvq_compile.kernels.spec import CacheSpec, TensorSpec

QUERY_NORM = sympy.Symbol("query_norm", nonnegative=True)
KEY_RANGE = sympy.Symbol("key_range", nonnegative=True)
VALUE_RANGE = sympy.Symbol("value_range", nonnegative=True)
KEY_MAX = sympy.Symbol("key_max", nonnegative=True)
VALUE_MAX = sympy.Symbol("value_max", nonnegative=True)
VALUE_SPREAD = sympy.Symbol("value_spread", nonnegative=True)
HEAD_DIM = sympy.Symbol("head_dim", positive=True, integer=True)
SCALE = sympy.Symbol("scale", positive=True)


def element_error(spec: TensorSpec, spread: sympy.Expr, largest: sympy.Expr) -> sympy.Expr:
    """Bound the error of one stored element in the basis in which it is coded.

    Args:
        spec: How the tensor is coded.
        spread: Largest range of a group.
        largest: Largest magnitude of an element.
    """
    levels = 2**spec.bits - 1
    clip = sympy.Rational(str(spec.clip))
    widened = spread * (1 + sympy.Rational(1, 2**9)) + largest * sympy.Rational(1, 2**10) + sympy.Rational(1, 2**23)
    return widened * (clip / levels + (1 - clip)) / 2


def error_bound(spec: CacheSpec) -> sympy.Expr:
    """Return a bound on the error of each element of an attention's output.

    The bound compares attention over the quantized cache with attention over the exact one, both in exact
    arithmetic. Its symbols, all over the packed tokens that a query may attend to: ``query_norm`` (Euclidean),
    ``scale``, ``head_dim``; ``key_range`` and ``value_range``, the largest range of a quantization group, and
    ``key_max`` and ``value_max``, the largest magnitude, in the basis in which they are coded; and
    ``value_spread``, the largest range of one channel of the values over all tokens attended to.
    """
    key_error = element_error(spec.key, KEY_RANGE, KEY_MAX)
    value_error = element_error(spec.value, VALUE_RANGE, VALUE_MAX)
    if spec.value.transform == "hadamard":
        value_error = value_error * sympy.sqrt(HEAD_DIM)
    score_error = SCALE * QUERY_NORM * sympy.sqrt(HEAD_DIM) * key_error
    return value_error + VALUE_SPREAD * sympy.tanh(score_error / 2)
