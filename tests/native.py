"""Where kernels run in tests: natively where there is a GPU, in Triton's interpreter elsewhere."""

from fractions import Fraction

import pytest
import torch
from hypothesis import Phase, settings

from kvq_compile.kernels.packed import Calibrated
from thorough import THOROUGH

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"

# What numpy says of Triton's interpreter.
CONVERSIONS = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
OVERFLOWS = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def examples(share: Fraction | int = 1) -> settings:
    """Return settings with this share of the examples of the profile; of the quick one with three fifths of that."""
    share = share if THOROUGH else share * Fraction(3, 5)
    # Shrinking a failure natively would compile a kernel for every attempt.
    phases = (Phase.explicit, Phase.reuse, Phase.generate) + (Phase.shrink,) * (not NATIVE)
    return settings(max_examples=max(1, int(settings().max_examples * share)), phases=phases)


def frame_on_device(frame: Calibrated) -> Calibrated:
    if frame.tables is None:
        return frame
    shift = frame.shift
    return Calibrated(frame.tables.to(DEVICE), None if shift is None else shift.to(DEVICE))
