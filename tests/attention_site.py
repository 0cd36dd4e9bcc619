"""One attention over a quantized cache: run by the kernels, and computed plainly from what the cache stands for."""

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import backend, launch
from native import DEVICE, NATIVE, frame_on_device

BATCH = 2
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHARED = [1, 2, 3, 4, 7]  # query heads to a KV head
Parts = tuple[Tensor, Tensor, Tensor, Tensor]
Side = tuple[Layout, Calibrated]


def plain_sides(cache: CacheSpec, dims: tuple[int, int], shared_by: int = 0) -> tuple[Side, Side]:
    """Return keys and values without tables."""
    key = cache.layout("key", dims[0], shared_by, max(dims))
    value = cache.layout("value", dims[1], 0, max(dims))
    return (key, UNCALIBRATED), (value, UNCALIBRATED)


class Site:
    """A filled cache of keys and values, queries and new tokens.

    Args:
        sides: Keys and values: layout, and frame where there are tables.
        heads: KV heads, and query heads to each of them.
        lengths: Tokens before the new ones, new ones, and those that the cache holds beyond the first.
        dtype: Of all tokens.
        importance: Whether tokens differ in the bits that they get when they are packed.
    """

    def __init__(
        self, sides: tuple[Side, Side], heads: tuple[int, int], lengths: tuple[int, int, int],
        dtype: torch.dtype, importance: bool = False,
    ) -> None:  # fmt: skip
        (kv_heads, shared), (self.start, new, extra) = heads, lengths
        self.sides = sides
        generator = torch.Generator().manual_seed(0)

        def random(heads: int, tokens: int, dim: int) -> Tensor:
            x = torch.randn(BATCH, tokens, heads, dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        held = self.start + extra
        weights = torch.rand(BATCH, kv_heads, held, generator=generator) ** 6
        dims = [layout.head_dim for layout, _ in sides]
        self.score = Score(dims[0] ** -0.5)
        self.sink_logits: Tensor | None = None
        self.parts = [
            self.fill(random(kv_heads, held, dim), side, weights if importance else None)
            for dim, side in zip(dims, sides, strict=True)
        ]
        self.query = random(kv_heads * shared, new, dims[0])
        self.new = random(kv_heads, new, dims[0]), random(kv_heads, new, dims[1])

    def score_values(self) -> None:
        """Let values take part in scores, as latents do: queries get channels for them, too."""
        generator = torch.Generator().manual_seed(3)
        channels = sum(layout.head_dim for layout, _ in self.sides)
        query = torch.randn(*self.query.shape[:3], channels, generator=generator)
        self.query = query.to(self.query.dtype)
        self.score = replace(self.score, scale=channels**-0.5, of_values=True)

    @staticmethod
    def fill(x: Tensor, side: Side, importance: Tensor | None = None) -> Parts:
        layout, frame = side
        parts = Packed.empty(x, layout.pages_at(x.shape[2]) + 1, layout)
        if x.shape[2]:
            reference.append_(*parts, x, 0, layout, frame, importance)
        return parts

    def attend(
        self, mask: Tensor | None, by_position: bool = True, start: int | None = None,
        **changed: Calibrated,
    ) -> Tensor:  # fmt: skip
        """Run the kernels, where they run; with another start or other frames if asked to."""
        (key_layout, key_frame), (value_layout, value_frame) = self.sides
        frames = {"key_frame": key_frame, "value_frame": value_frame} | changed
        tensors = [t.to(DEVICE) for t in (self.query, *self.new)]
        parts = [tuple(p.to(DEVICE) for p in parts) for parts in self.parts]
        start = self.start if start is None else start
        position = None
        if by_position:
            position = torch.arange(start, start + self.query.shape[2], device=DEVICE)
        calibrated = [frame_on_device(frames[name]) for name in ("key_frame", "value_frame")]
        return backend.attend(
            *tensors, *parts, *calibrated, None if mask is None else mask.to(DEVICE), position,
            None if by_position else start, self.score, key_layout, value_layout,
            None if self.sink_logits is None else self.sink_logits.to(DEVICE),
        ).cpu()  # fmt: skip

    def expected(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Attend plainly in ``dtype`` to the tokens that the cache stands for."""
        end, tokens = self.start + self.query.shape[2], []
        for new, parts, (layout, frame) in zip(self.new, self.parts, self.sides, strict=True):
            codes, params, exact, cursor = parts
            held = reference.read(codes, params, exact.float(), cursor, self.start, layout, frame)
            tokens.append(torch.cat([held, new.float()], 2).to(dtype))
        if mask is not None:
            end = min(end, mask.shape[-1])
            mask = mask[..., :end] if mask.dtype == torch.bool else mask[..., :end].to(dtype)
        key, value = (t[:, :, :end] for t in tokens)
        if self.score.of_values:
            key = torch.cat([key, value], 3)
        logits = None if self.sink_logits is None else self.sink_logits.to(dtype)
        query = self.query.to(dtype)
        return reference.softmax_attention(query, key, value, mask, self.score, logits)

    @property
    def folds_all(self) -> bool:
        """Whether parameters of groups are all that is folded into scores and weights."""
        return all(
            frame.tables is None and layout.scheme.name == "uniform" for layout, frame in self.sides
        )

    @property
    def plain_dtype(self) -> torch.dtype:
        """The dtype in which packed tokens are multiplied, as far as an error can tell."""
        layouts = [layout for layout, _ in self.sides]
        widest = max(layout.head_dim for layout in layouts)
        small = self.folds_all and layouts[0].page_size * widest <= 96 * 128
        if NATIVE and self.query.dtype == torch.float32 and not small:
            return torch.float16
        return self.query.dtype

    def assert_low_precision_error(self, actual: Tensor, mask: Tensor | None) -> None:
        """Assert that the error is a small multiple of that of the same computation in low precision.

        The second term is the rounding of the result, for the cases in which the plain computation happens to
        be exact; the third is what fp32 loses where terms cancel: codes are summed apart from their zero
        points, coded values apart from their mean.
        """
        exact, dtype = self.expected(mask, torch.float64), self.plain_dtype
        assert actual.dtype == self.query.dtype
        assert actual.shape == exact.shape
        assert bool(actual.isfinite().all())
        plain = (self.expected(mask, dtype).double() - exact).abs().max()
        cancelled = 2e-5 if self.folds_all else 5e-5
        bound = 3 * plain + 2 * torch.finfo(dtype).eps * exact.abs().max() + cancelled
        error = (actual.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e} beyond {bound:.2e}; plainly {plain:.2e}"


def starts(layout: Layout) -> list[int]:
    """Return numbers of tokens that leave no page, and a page or more, just or not just full."""
    page = layout.page_size
    boundary = layout.sinks + layout.window + page
    return [1, 2, boundary - 1, boundary, boundary + 1, boundary + page, boundary + page + 43]


def random_mask(site: Site, kind: str, width: int) -> Tensor | None:
    """Return a mask of ``width`` columns that hides slots without a token and some others."""
    if kind == "none":
        return None
    batch, heads, new, _ = site.query.shape
    shape = {
        "one row": (width,), "tokens": (new, width), "batch": (batch, 1, new, width),
        "heads": (heads, new, width), "all": (batch, heads, new, width),
        "additive": (batch, 1, new, width), "lowest": (1, 1, new, width),
    }[kind]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(shape, generator=generator) < 0.6
    seen[..., site.start + new :] = False
    if kind == "additive":
        bias = torch.randn(shape, generator=generator).to(site.query.dtype)
        return bias.masked_fill(~seen, -math.inf).expand(batch, heads, new, width)
    if kind == "lowest":
        lowest = torch.finfo(
            torch.bfloat16 if site.query.dtype == torch.float16 else site.query.dtype
        ).min
        return torch.zeros(shape).masked_fill(~seen, lowest)
    return seen


def bend(site: Site, data: st.DataObject) -> None:
    """Give a site's scores a soft cap, a clamp and logits of sinks, or some of these, or none."""
    some = data.draw(st.sets(st.sampled_from(("cap", "clamp", "sinks"))))
    given: dict[str, Any] = {}
    if "cap" in some:
        given["cap"] = data.draw(st.sampled_from((0.3, 2.0, 50.0)))
    if "clamp" in some:
        given["lowest"], given["highest"] = sorted(data.draw(st.tuples(*[st.floats(-2, 2)] * 2)))
    site.score = replace(site.score, has_sinks="sinks" in some, **given)
    if "sinks" in some:
        batch, heads, new, _ = site.query.shape
        shape = data.draw(
            st.sampled_from(((1,), (heads, 1, 1), (batch, 1, new, 1), (batch, heads, new, 1)))
        )
        generator = torch.Generator().manual_seed(2)
        size = data.draw(st.sampled_from((0.0, 1.0, 30.0)))
        dtype = data.draw(st.sampled_from((site.query.dtype, torch.float32)))
        site.sink_logits = (torch.randn(shape, generator=generator) * size).to(dtype)


def assert_right_under_any_mask(site: Site, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        bend(site, data)
    kinds = ["none", "one row", "tokens", "batch", "heads", "all", "additive", "lowest"]
    kind = data.draw(st.sampled_from(kinds))
    end = site.start + site.query.shape[2]
    width = end + data.draw(st.sampled_from([0, 0, 13, -1, 1 - site.start]))
    mask = random_mask(site, kind, max(1, width))
    site.assert_low_precision_error(site.attend(mask, data.draw(st.booleans())), mask)


def causal(site: Site) -> Tensor:
    end = site.start + site.query.shape[2]
    return torch.arange(end) <= torch.arange(site.start, end)[:, None]


def assert_shares_do_not_matter(site: Site, programs: int, patch: Any) -> None:
    expected = site.attend(None)
    patch.setattr(launch, "PROGRAMS_PER_SM", programs)
    torch.testing.assert_close(site.attend(None), expected, rtol=1e-5, atol=1e-5)
