"""A page that was cut open: the tokens that stay keep their codes when the page fills again.

Cutting a page puts its tokens back among the exact ones, as the values that they were read as, and the page is
quantized anew once other tokens have filled it up. Where codes do not span the whole range of a group (``clip``, or
calibrated margins) a token that is quantized from what it was read as is cut off again, a little more each time. So
a grown cache remembers the codes of the page, and puts those of the tokens that stayed back in their place: the
hundredth rollback into a page costs no more than the first.

Codes go by token where parameters do. Where a channel of some tokens shares them, only groups that stayed whole keep
theirs. Pages whose tokens differ in bits share a budget; they are quantized anew, which clips nothing.
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
    """The first page that is not full, as it was before it was cut.

    Attributes:
        page: Its number.
        kept: Tokens of it that the cache still holds.
        codes, params: Its codes ``[B, H, rows, units]`` and parameters ``[B, H, groups, members, 2]``.
    """

    page: int
    kept: int
    codes: Tensor
    params: Tensor

    @staticmethod
    def of(codes: Tensor, params: Tensor, page: int, kept: int, layout: Layout) -> Reopened | None:
        """Remember a page of a cache, of which ``kept`` tokens stay; ``None`` where codes cannot be kept."""
        if not layout.scheme.keeps_codes:
            return None
        with writable():
            return Reopened(page, kept, codes[:, :, page].clone(), params[:, :, page].clone())

    def map(self, change: Callable[[Tensor], Tensor]) -> Reopened:
        """Return the page of a copy of the cache, of whose parts ``change`` makes those of the copy."""
        return Reopened(self.page, self.kept, change(self.codes), change(self.params))

    def restore_(self, codes: Tensor, params: Tensor, layout: Layout) -> None:
        """Give the tokens that stayed their codes back, in the parts of a cache whose page is full again."""
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
