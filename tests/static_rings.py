"""Rings: static caches that keep the last tokens, written as a static layer of transformers does."""

import torch

from kvq_compile import QuantizedKV
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.spec import CacheSpec
from refused_steps import tokens

EIGHT = Uniform(bits=8, group_size=16)
SPEC = CacheSpec(key=EIGHT, value=EIGHT, sinks=2, window=4, page_size=32)
LAYOUT = SPEC.layout("key", 16)
OPTIONS = {"method": "int8", "group_size": 16, "sinks": 2, "window": 4, "page_size": 32}
SLOTS = 70


def rolled(cache: torch.Tensor, held: int, new: torch.Tensor) -> torch.Tensor:
    """Return what a static layer of transformers copies into its buffer, which shows ``held`` tokens."""
    slots = cache.shape[2]
    return torch.cat([cache[:, :, :held], new], 2)[:, :, -slots:]


def write(cache: torch.Tensor, held: int, new: torch.Tensor) -> None:
    """Write new tokens as a static layer of transformers does."""
    if held + new.shape[2] <= cache.shape[2]:
        cache[:, :, held : held + new.shape[2]] = new
    else:
        cache.copy_(rolled(cache, held, new))


def fill(length: int, layout=LAYOUT, chunk: int = 1, seed: int = 0) -> QuantizedKV:
    """Return a ring that was decoded in chunks."""
    x = tokens(length, seed=seed)
    cache = QuantizedKV.from_dense(torch.zeros(2, 2, SLOTS, 16), layout, kind="static", length=0)
    held = 0
    for new in x.split(chunk, 2):
        write(cache, min(held, SLOTS), new)
        held += new.shape[2]
    return cache
