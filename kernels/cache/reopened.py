"""Codes of a truncated page, restored when the page fills again.

Truncation inside a page dequantizes the tokens that stay into the ring, and the page is quantized again when it is
full. If codes do not span the whole range of a group (``clip``, or calibrated margins), each such round would clip
those tokens further. A dynamic cache therefore keeps the codes of the page and restores those of the tokens that
stayed, so that repeated rollbacks into a page add no error.

Codes are restored by token if parameters are per token. If the tokens of a group share parameters per channel, only
groups that stayed whole are restored. Mixed-precision pages share a budget; they are quantized again, without clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import writable


@dataclass(frozen=True)
class Reopened:
    """The page that truncation cut, as it was before.

    Attributes:
        page: Its index.
        kept: Its tokens that the cache still holds.
        codes, params: Its codes ``[B, H, rows, row_words]`` and parameters ``[B, H, groups, members, 2]``.
    """

    page: int
    kept: int
    codes: Tensor
    params: Tensor

    @staticmethod
    def of(codes: Tensor, params: Tensor, page: int, kept: int, layout: Layout) -> Reopened | None:
        """Keep a page of a cache of which ``kept`` tokens stay; ``None`` if its codes cannot be restored."""
        if not layout.scheme.keeps_codes:
            return None
        with writable():
            return Reopened(page, kept, codes[:, :, page].clone(), params[:, :, page].clone())

    def map(self, change: Callable[[Tensor], Tensor]) -> Reopened:
        """Return this page for a copy of the cache, whose tensors ``change`` makes."""
        return Reopened(self.page, self.kept, change(self.codes), change(self.params))

    def restore_(self, codes: Tensor, params: Tensor, layout: Layout) -> None:
        """Restore the codes of the tokens that stayed, in the parts of a cache whose page is full again."""
        from kvq_compile.kernels import reference

        by_channel = layout.grouping == "channel"
        kept = self.kept - self.kept % layout.group_size if by_channel else self.kept
        with writable():
            page = codes[:, :, self.page]
            if layout.role == "key":
                page[:, :, :kept] = self.codes[:, :, :kept]
            else:  # a row holds a channel of all tokens
                token = torch.arange(layout.page_size, dtype=torch.int64, device=codes.device)
                old, new = (reference.unpack(words, layout) for words in (self.codes, page))
                page.copy_(reference.pack(torch.where((token < kept)[:, None], old, new), layout))
            page = params[:, :, self.page]
            if by_channel:
                groups = kept // layout.group_size
                page[:, :, :groups] = self.params[:, :, :groups]
            else:
                page[:, :, :, :kept] = self.params[:, :, :, :kept]
