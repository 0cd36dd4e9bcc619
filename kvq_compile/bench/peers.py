"""Attention to a 16-bit cache, by what PyTorch has for it: what quantized caches are measured against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BASELINE = "sdpa"  # the one that PyTorch chooses
BACKENDS: Mapping[str, SDPBackend] = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PEERS = (BASELINE, *BACKENDS, "flex")


def peer(name: str) -> Attention:
    """Return the attention of a peer: queries ``[B, Hq, T, D]``, keys and values ``[B, H, S, D]``.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {name!r}")
    if name == BASELINE:
        return lambda query, key, value: sdpa(query, key, value, enable_gqa=True)
    if name == "flex":
        return _flex()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with warnings.catch_warnings(), sdpa_kernel(BACKENDS[name]):
            warnings.simplefilter("ignore")  # why a backend does not run is in its error, too
            return sdpa(query, key, value, enable_gqa=True)

    return attend


def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # one function has a limited number of compilations
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = compiled(query, key, value, enable_gqa=True)
        return output

    return attend
