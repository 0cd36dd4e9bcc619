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

**The element errors.** A group whose finite elements span ``r`` and reach ``M`` in magnitude is clipped to
``c r`` and quantized in ``L = 2^b - 1`` steps. Rounding ``zero`` down to fp16 widens the range by less than a unit
in its last place, ``2^-10 M`` or, among subnormal numbers, ``2^-24``; rounding the scale up adds as much to it:

    step <= (c r + 2^-10 M + 2^-24) / L * (1 + 2^-9) + 2^-24

where half of the factor's ``2^-9`` is left for codes that fp32 rounds to the wrong neighbour, at most ``2^-13``
of a step beyond the middle. Inside the clipped range an element is off by at most half a step, beyond an end of
it by that or by its distance from the end; fp32 adds ``2^-20 M`` on the way in and out:

    e = max(step, (1 - c) r) / 2 + 2^-20 M

A rotated group is quantized in the rotated basis. The rotation keeps the norm, so step 1 of the argument needs
``sqrt(D) e_k`` as before; one channel of the values collects the errors of all, hence a factor ``sqrt(D)`` on
``e_v``. An fp32 product with ``D`` terms, each way, adds at most ``2^-23 D^(3/2) M``.

**fp8 parameters** are rounded to the nearest e4m3 number, off by at most ``z = max(2^-4 M, 2^-10)`` for the zero
point and by ``max(2^-4 s, 2^-10)`` for the scale ``s``, so that the steps may end before the group does:

    step <= (c r + z) / L * (1 + 2^-4) + 2^-10
    e = max(step / 2, (1 - c) r / 2 + z + (c r + z) / 16 + L 2^-10) + 2^-20 M

**e5m3 parameters** are of a range about zero, ``R = max(c r, M)`` at most. The scale is off by ``(2^-4 + 2^-11) s``, or
``2^-18``, which is less than ``s / 15 + 2^-17``; the middle by half of ``1 / 127`` of half the range that the codes
span, and by half of what that range lacks, for it lies between the ends:

    step <= 16/15 R / L + 2^-17
    e = max(step / 2, (1 - c) r / 2 + (1/15 + 1/400) R + L 2^-17) + 2^-20 M

**A searched clip** is one of eight, so that the largest of their eight bounds holds.

**Calibration tables** code ``y = (R^-1 x - mean) / scale``. Rotation keeps the norm, and an error of ``y`` grows by
the largest scale ``t`` of a channel: ``e`` becomes ``t (e + 2^-18 M)``, the term for the angles and the arithmetic on
the way, ``M`` being the largest magnitude of ``y`` and of ``mean / scale``.

**Mixed pages** store a token's midpoint and half-range ``h``. The midpoint is off by ``z`` as above, so
``h <= r / 2 + z``; rounding cuts ``h / 16`` off at most. A token has ``m`` bits or more: ``e = h (2^-m 17/16 + 1/16)``.
Fitted codes lie on the element's side of the midpoint and no farther from it than ``2 (17/16) h``: ``e = 17/8 h``.

**Channels that differ in bits**, as those of ``tc``, have the bits that a cache found, and no bound that could be told
beforehand: the error of their keys is measured, as that of a codebook is.

**A codebook** has no bound that could be told from its size. The error of its keys is the largest distance of a
quantized token from what is stored for it, that of its values the largest difference of a channel, both measured.

**What it leaves out.** Elements beyond the range of fp16 (of fp8 parameters: 448 in quantized form; of e5m3: ranges of
more than 61440 a level), or not finite, are stored as something else and have no bound. The computation's own rounding
comes on top (`testing.rounding_bound`).
"""

from __future__ import annotations

from collections.abc import Callable

import sympy

from kvq_compile.kernels.channelwise_scheme import CLIPS
from kvq_compile.kernels.schemes import Mixed, Scheme, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables, read_section
from kvq_compile.options import make_spec

QUERY_NORM = sympy.Symbol("query_norm", nonnegative=True)
KEY_RANGE = sympy.Symbol("key_range", nonnegative=True)
VALUE_RANGE = sympy.Symbol("value_range", nonnegative=True)
KEY_MAX = sympy.Symbol("key_max", nonnegative=True)
VALUE_MAX = sympy.Symbol("value_max", nonnegative=True)
KEY_DISTANCE = sympy.Symbol("key_distance", nonnegative=True)
VALUE_DISTANCE = sympy.Symbol("value_distance", nonnegative=True)
VALUE_SPREAD = sympy.Symbol("value_spread", nonnegative=True)
HEAD_DIM = sympy.Symbol("head_dim", positive=True, integer=True)
SCALE = sympy.Symbol("scale", positive=True)


def _of_mixed(
    spec: Mixed, tables: Tables | None, spread: sympy.Expr, largest: sympy.Expr
) -> sympy.Expr:
    del tables
    reach = spread / 2 + sympy.Max(largest / 16, sympy.Rational(1, 2**10))
    segment = sympy.Rational(17, 16 * 2**spec.min_bits) + sympy.Rational(1, 16)
    widest = reach * (sympy.Rational(17, 8) if spec.fit else segment)
    return widest + largest * sympy.Rational(1, 2**10)


def _of_uniform(
    spec: Uniform, tables: Tables | None, spread: sympy.Expr, largest: sympy.Expr
) -> sympy.Expr:
    clips = CLIPS if spec.search else (spec.clip,)
    return sympy.Max(*(_of_clip(spec, clip, tables, spread, largest) for clip in clips))


def _of_clip(
    spec: Uniform, span: float, tables: Tables | None, spread: sympy.Expr, largest: sympy.Expr
) -> sympy.Expr:
    levels = spec.levels
    clip = sympy.Rational(str(span))
    if tables is not None:
        margin = read_section(tables.words, "margin", tables.head_dim)
        clip = sympy.Rational(1 - 2 * float(margin.max()))
    ulp = sympy.Rational(1, 2**10)
    if spec.params == "fp8":
        zero = sympy.Max(largest / 16, ulp)
        step = (clip * spread + zero) / levels * sympy.Rational(17, 16) + ulp
        short = (1 - clip) * spread / 2 + zero + (clip * spread + zero) / 16 + levels * ulp
        return sympy.Max(step / 2, short) + largest * ulp**2
    if spec.params == "e5m3":
        coarse, most = sympy.Rational(1, 2**17), sympy.Max(clip * spread, largest)
        step = most / levels * sympy.Rational(16, 15) + coarse
        short = (1 - clip) * spread / 2 + most * sympy.Rational(7, 100) + levels * coarse
        return _coded(spec, sympy.Max(step / 2, short) + largest * ulp**2, largest)
    least = sympy.Rational(1, 2**24)
    step = (clip * spread + ulp * largest + least) / levels * (1 + 2 * ulp) + least
    widest = step if 1 - clip <= clip / levels else sympy.Max(step, (1 - clip) * spread)
    return _coded(spec, widest / 2 + largest * ulp**2, largest)


def _coded(spec: Uniform, error: sympy.Expr, largest: sympy.Expr) -> sympy.Expr:
    """Return the error of an element together with that of the rotations on the way."""
    if spec.transform == "hadamard":
        error += largest * HEAD_DIM ** sympy.Rational(3, 2) / 2**23
    return error


# By the scheme's name; the error of schemes that are not among them is measured.
_ELEMENT_ERRORS: dict[str, Callable[..., sympy.Expr]] = {"uniform": _of_uniform, "mixed": _of_mixed}


def is_derived(spec: Scheme) -> bool:
    """Return whether the error of an element has a bound that follows from the scheme."""
    return spec.name in _ELEMENT_ERRORS


def element_error(
    spec: Scheme, tables: Tables | None, spread: sympy.Expr, largest: sympy.Expr
) -> sympy.Expr:
    """Bound the error of one stored element in the basis in which it is quantized.

    Args:
        spec: How the tensor is quantized, by a scheme that `is_derived`.
        tables: Its calibration tables, if it has any.
        spread: Largest range of a group.
        largest: Largest magnitude of an element.
    """
    return _ELEMENT_ERRORS[spec.name](spec, tables, spread, largest)


def error_bound(spec: CacheSpec | str) -> sympy.Expr:
    """Return a bound on the error of each element of an attention's output.

    The bound compares attention over the quantized cache with attention over the exact one, both in exact
    arithmetic. Its symbols, all over the packed tokens that a query may attend to: ``query_norm``
    (Euclidean), ``scale``, ``head_dim``; ``key_range`` and ``value_range``, the largest range of a
    quantization group, and ``key_max`` and ``value_max``, the largest magnitude, in the basis in which they
    are quantized; for codebooks ``key_distance``, the largest Euclidean distance of a token in quantized form from
    what is stored, and ``value_distance``, the largest difference of an element; and ``value_spread``, the
    largest range of one channel of the values over all tokens attended
    to. `testing.bound_for` evaluates it on tensors.

    Args:
        spec: What `make_spec` returns, or a method's name.

    Raises:
        TypeError: It is neither.
        ValueError: There is no such method, or it must be calibrated.
    """
    if isinstance(spec, str):
        spec = make_spec(spec)
    if not isinstance(spec, CacheSpec):
        raise TypeError(f"spec must be a CacheSpec or a method's name, got {type(spec).__name__}")
    key_error = _token_error(spec.key, spec.key_tables, KEY_RANGE, KEY_MAX, KEY_DISTANCE)
    if not is_derived(spec.value):
        value_error = _in_model_units(spec.value_tables, VALUE_DISTANCE, VALUE_MAX)
    else:
        coded = element_error(spec.value, spec.value_tables, VALUE_RANGE, VALUE_MAX)
        if spec.value.transform == "hadamard":
            coded = coded * sympy.sqrt(HEAD_DIM)
        value_error = _in_model_units(spec.value_tables, coded, VALUE_MAX)
    score_error = SCALE * QUERY_NORM * key_error
    return value_error + VALUE_SPREAD * sympy.tanh(score_error / 2)


def _token_error(
    spec: Scheme,
    tables: Tables | None,
    spread: sympy.Expr,
    largest: sympy.Expr,
    distance: sympy.Expr,
) -> sympy.Expr:
    """Bound the Euclidean error of a stored key."""
    root = sympy.sqrt(HEAD_DIM)
    if not is_derived(spec):
        coded = distance
    else:
        coded = root * element_error(spec, tables, spread, largest)
    arithmetic = root * largest if tables is not None else sympy.Integer(0)
    return _in_model_units(tables, coded, arithmetic)


def _in_model_units(tables: Tables | None, error: sympy.Expr, largest: sympy.Expr) -> sympy.Expr:
    """Return what an error in quantized form is to the model."""
    if tables is None:
        return error
    scale = read_section(tables.words, "scale", tables.head_dim).max()
    return sympy.Float(float(scale)) * (error + largest * sympy.Rational(1, 2**18))
