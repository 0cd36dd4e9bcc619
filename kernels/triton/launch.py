"""How attention is launched: operands, tiles and splits that layouts, shapes and a device ask for."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.score import UNBENT, Bend
from kvq_compile.kernels.triton.arguments import MaskKind
from kvq_compile.kernels.triton.constants import ReadConstants

Platform = Literal["cuda", "hip", "interpreter"]

LOG2_E = 1.4426950408889634
EXACT_BYTES = 1 << 16  # of exact keys at once, and as many of values
BLOCK_EXACT = 64  # exact tokens at once; a window of 128 keeps five programs of this size busy
MAX_QUERIES = 32  # more of them at once spill
FEW_QUERIES = 16  # at once; more take twice the warps
MAX_COPIED_QUERIES = 8  # the narrow side of the matrix instruction
MAX_SPLITS = 64  # of a head's pages, unless it takes more of them to keep a GPU busy
LEAST_PAGES = 3  # of a split, where there are more splits than that
OVERHEAD = 1  # pages that a program could read while it begins and ends
PROGRAMS_PER_SM: int | None = None  # in place of what `programs_per_sm` says
THREE_SHARE = {
    "maxnreg": 168
}  # registers of a thread: three programs share an SM, at most a few spill
THREE_SHARE_UNITS = 4  # of keys whose channels differ in bits; of more only two programs fit


@dataclass(frozen=True, eq=False)
class Operands:
    """How tokens are unpacked and multiplied.

    Attributes:
        fast: Whether instructions of NVIDIA hardware unpack them.
        dtype, exact_dtype: Of packed and of exact tokens in the matrix instruction.
        precision: Of fp32 products.
        cap, clamps, lowest, highest: What happens to scores before the mask, in units of log 2: a soft cap, or 0;
            whether they are clamped, and to what.
    """

    fast: bool
    dtype: Any
    exact_dtype: Any
    precision: str
    cap: float
    clamps: bool
    lowest: float
    highest: float


@dataclass(frozen=True, eq=False)
class AttendConstants(Operands):
    """What `attend_kernel` is compiled for besides layouts.

    Attributes:
        shared_by: Query heads to a KV head.
        copies: Copies of each query, one for each group of a value's channels; see `pages`.
        block_q, block_n: Queries, and exact tokens, at once.
        stages: Pages in flight.
        mask_kind, mask_shared: See `arguments.mask_over`.
        of_values: Whether values take part in scores.
    """

    shared_by: int
    copies: int
    block_q: int
    block_n: int
    stages: int
    mask_kind: MaskKind
    mask_shared: bool
    of_values: bool


@lru_cache
def sm_count(device: torch.device) -> int:
    """Return how many SMs a GPU has; 1 for what interprets kernels."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def platform_of(query: Tensor) -> Platform:
    """Return what kernels over these tensors are compiled for."""
    if not query.is_cuda:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def programs_per_sm(
    key: ReadConstants, value: ReadConstants, queries: int, options: dict[str, int]
) -> int:
    """Return how many programs at a time are best for an SM; of 32 queries, which take all registers, one.

    Measured on an H100 at one sequence of 128k tokens, at 2, 3, 4 and 6 programs; the second numbers are
    for blocks of 32 exact tokens in place of 64::

        2-bit codes              75 / 75    61 / 68    76 / 58    76 / 57  us
        2-bit rotary keys       110 / 111  132 / 138  125 / 125  125 / 125
        8 channels in 8 bits    227        309        258        255
    """
    if PROGRAMS_PER_SM is not None:
        return PROGRAMS_PER_SM
    if queries > FEW_QUERIES:
        return 1
    if key.scheme == "channelwise":
        return 3 if "maxnreg" in options else 2
    return 2 if key.rotary or "codebook" in (key.scheme, value.scheme) else 3


@lru_cache(maxsize=1024)
def count_splits(programs: int, pages: int, exact_tokens: int, resident: int) -> tuple[int, int]:
    """Return into how many splits exact tokens and pages go, ``programs`` programs being needed for each.

    Pages are split so that a GPU that runs ``resident`` programs at a time is done with them soonest; of several such
    splits the fewest are made.
    """
    most = max(MAX_SPLITS, min(resident // programs, pages // LEAST_PAGES))

    def pages_in_turn(splits: int) -> int:
        waves = math.ceil(programs * splits / resident)
        return waves * (math.ceil(pages / splits) + OVERHEAD)

    page_splits = min(range(1, max(1, min(pages, most)) + 1), key=pages_in_turn)
    most = max(1, 2 * resident // programs)
    return min(triton.cdiv(exact_tokens, BLOCK_EXACT), most), page_splits


def exact_tokens_at_once(channels: int, full: bool) -> int:
    """Return how many exact tokens fit an SM beside one another, keys and values; ``full``: in fp32."""
    room = EXACT_BYTES // (triton.next_power_of_2(channels) * (4 if full else 2))
    return min(room, BLOCK_EXACT // 2 if full else BLOCK_EXACT)


def count_late(programs: int, exact: int, paged: int, resident: int) -> int:
    """Return how many of the ``paged`` splits of pages wait until programs of exact tokens are done; 0 unless most of
    them run at once.
    """
    late = exact + paged - resident // programs
    return late if 0 < late <= exact and 2 * late <= paged else 0


def copies_of_queries(value: ReadConstants, queries: int) -> int:
    """Return how many copies of ``queries`` queries there are, one for each group of a value."""
    groups = value.head_dim // value.group_size
    plain = value.scheme != "codebook" and value.grouping == "token"
    return groups if plain and groups * queries <= MAX_COPIED_QUERIES else 1


def _single(x: float) -> float:
    """Return a number that fp32 has, or one next to it: for others Triton would compute in fp64."""
    if abs(x) < 2.0**-126:
        return 0.0
    return x if abs(x) < 2.0**127 else math.copysign(math.inf, x)


def operands(dtype: torch.dtype, platform: Platform, large: bool, bend: Bend) -> dict[str, Any]:
    """Return `Operands` for queries of ``dtype``, by name; ``large``: tiles of packed tokens are."""
    cap, lowest, highest = (_single(x * LOG2_E) for x in bend)
    interpreted = platform == "interpreter"
    full = dtype == torch.float32 or interpreted
    exact = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    return {
        "fast": platform == "cuda",
        "dtype": tl.float32 if full and (interpreted or not large) else tl.float16,
        "exact_dtype": tl.float32 if full else exact,
        "precision": "tf32x3" if platform == "cuda" else "ieee",
        "cap": cap,
        "clamps": bend[1:] != UNBENT[1:],
        "lowest": lowest,
        "highest": highest,
    }


@lru_cache(maxsize=1024)
def attend_settings(
    key_layout: Layout, value_layout: Layout, shared_by: int, tokens: int,
    dtype: torch.dtype, platform: Platform, mask_kind: MaskKind, mask_shared: bool, bend: Bend,
    of_values: bool = False, by_row: tuple[bool, bool] = (False, False),
) -> tuple[ReadConstants, ReadConstants, AttendConstants, dict[str, int]]:  # fmt: skip
    """Return the constants of `attend_kernel` and its launch options.

    Raises:
        NotImplementedError: No kernel reads keys and values of these layouts.
    """
    key, value = map(ReadConstants.of, (key_layout, value_layout), by_row)
    mixed = key.scheme == "mixed"
    if "mixed" in (key.scheme, value.scheme) and (key.has_tables or value.has_tables):
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel reads both"
        )
    if mixed != (value.scheme == "mixed"):
        raise NotImplementedError("keys and values must both be mixed, or neither, on a GPU")
    if of_values and (mixed or value.has_tables):
        raise NotImplementedError(
            "values that take part in scores must be neither mixed nor calibrated: no GPU kernel reads them"
        )
    D, Dv, page = key.head_dim, value.head_dim, key.page_size
    copies = 1 if of_values else copies_of_queries(value, shared_by * tokens)
    queries = triton.next_power_of_2(shared_by * tokens * copies)
    block_q = min(MAX_QUERIES, max(16 if platform == "hip" else 8, queries))
    full = dtype == torch.float32 or platform == "interpreter"
    even = D & (D - 1) == 0 and Dv & (Dv - 1) == 0
    large = page * triton.next_power_of_2(max(D, Dv)) > 128 * 128
    # Loads of single codes are many, and what they return would be kept in shared memory.
    loads = not (mixed or (key.in_fields and (value.in_fields or value.packing == "trits")))
    one_stage = full or page * max(D, Dv) > 256 * 128 or (large and not even)  # shared memory
    stages = 1 if one_stage or loads else 2
    small = key.scheme == value.scheme == "uniform" and max(key.bits, value.bits) <= 4
    if stages == 2 and (key.scheme == "channelwise" or small):
        stages = 3
    constants = AttendConstants(
        **operands(dtype, platform, large, bend), shared_by=shared_by, copies=copies, block_q=block_q,
        block_n=exact_tokens_at_once(max(D, Dv), full), stages=stages, mask_kind=mask_kind,
        mask_shared=mask_shared, of_values=of_values,
    )  # fmt: skip
    options = {
        "num_warps": 8 if full or block_q > FEW_QUERIES or large else 4,
        "num_stages": stages,
    }
    plain = key.scheme == value.scheme == "uniform" and not key.rotary
    units = key.bit_blocks + key.twice_read
    few = mixed or 0 < units <= THREE_SHARE_UNITS
    few &= max(key.bits, value.bits) <= 4 and not (key.outliers or value.outliers)
    # A mask takes more registers than three programs have; with one row for all queries only a few spill.
    shares = mask_shared if mask_kind else not plain
    fits = even and page >= 64 and bend == UNBENT and block_q == 8 and not (full or large)
    fits &= not of_values
    if platform == "cuda" and shares and fits and (plain or few):
        options |= THREE_SHARE
    return key, value, constants, options
