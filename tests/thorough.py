"""Which profile runs: the quick one of `make test`, or that of `make test-thorough`, which takes hours."""

from hypothesis import settings

THOROUGH = settings.default.max_examples >= 500
