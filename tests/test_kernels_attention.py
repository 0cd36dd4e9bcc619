"""Fused attention is as exact as the same computation in the model's dtype, whatever the cache
looks like.

Kernels run natively where there is a GPU and in Triton's interpreter, in fp32, elsewhere.
"""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import attention, blocked, reference
from kvq_compile.kernels.ops import new_parts
from kvq_compile.kernels.spec import CacheSpec, PageLayout, TensorSpec

pytestmark = pytest.mark.filterwarnings(  # of numpy, from Triton's interpreter
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Shrinking a failure natively would compile a kernel for every attempt.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate) + (Phase.shrink,) * (not NATIVE)
EXAMPLES = settings(max_examples=settings().max_examples, phases=PHASES)
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def tensor_specs(draw: st.DrawFn, head_dim: int, page: int) -> TensorSpec:
    grouping = draw(st.sampled_from(["token", "channel"]))
    divided = head_dim if grouping == "token" else page
    size = draw(st.sampled_from([g for g in (8, 16, 32, 48, 64, 128) if divided % g == 0] + [None]))
    transform = draw(st.sampled_from(["none", "none", "hadamard"]))
    return TensorSpec(draw(st.sampled_from([1, 2, 3, 4, 8])), grouping, size, 1.0, transform)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend in the dtype of the arguments; a row that sees nothing gives zeros."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    floor = max(-1e38, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(floor)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) / torch.where(total == 0, 1, total)


class Site:
    """One attention: a filled cache, queries and new tokens."""

    def __init__(
        self, spec: CacheSpec, dims: tuple[int, int], heads: tuple[int, int],
        lengths: tuple[int, int, int], dtype: torch.dtype, batch: int = 2,
    ) -> None:  # fmt: skip
        (kv_heads, shared), (self.start, new, extra) = heads, lengths
        generator = torch.Generator().manual_seed(0)

        def random(heads: int, tokens: int, dim: int) -> Tensor:
            x = torch.randn(batch, tokens, heads, dim, generator=generator)
            return x.to(dtype).transpose(1, 2)

        self.spec, self.scale = spec, dims[0] ** -0.5
        self.key_layout, self.value_layout = (
            spec.layout("key", dims[0]),
            spec.layout("value", dims[1]),
        )
        held = self.start + extra
        capacity = self.key_layout.pages_at(held) + 1
        self.key_parts = self.fill(random(kv_heads, held, dims[0]), capacity, self.key_layout)
        self.value_parts = self.fill(random(kv_heads, held, dims[1]), capacity, self.value_layout)
        self.query = random(kv_heads * shared, new, dims[0])
        self.key, self.value = random(kv_heads, new, dims[0]), random(kv_heads, new, dims[1])

    @staticmethod
    def fill(x: Tensor, capacity: int, layout: PageLayout) -> Parts:
        parts = new_parts(x, capacity, layout)
        if x.shape[2]:
            reference.append_(*parts, x, 0, layout)
        return parts

    def attend(
        self, mask: Tensor | None, by_position: bool = True, start: int | None = None
    ) -> Tensor:
        """Run the kernels, where they run."""
        tensors = [t.to(DEVICE) for t in (self.query, self.key, self.value)]
        parts = [tuple(p.to(DEVICE) for p in parts) for parts in (self.key_parts, self.value_parts)]
        start = self.start if start is None else start
        position = (
            torch.arange(start, start + self.key.shape[2], device=DEVICE) if by_position else None
        )
        if mask is not None:  # keep the strides of an expanded mask
            mask = mask.to(DEVICE) if NATIVE else mask
        return attention.attend(
            *tensors, *parts, mask, position, None if by_position else start, self.scale,
            self.key_layout, self.value_layout,
        ).cpu()  # fmt: skip

    def expected(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Attend plainly in ``dtype`` to the tokens that the cache stands for."""
        end = self.start + self.key.shape[2]
        tokens = []
        for new, parts, layout in (
            (self.key, self.key_parts, self.key_layout),
            (self.value, self.value_parts, self.value_layout),
        ):
            codes, params, exact, cursor = parts
            held = reference.read(codes, params, exact.float(), cursor, self.start, layout)
            tokens.append(torch.cat([held, new.float()], 2).to(dtype))
        if mask is not None:
            end = min(end, mask.shape[-1])
            mask = mask[..., :end] if mask.dtype == torch.bool else mask[..., :end].to(dtype)
        key, value = (t[:, :, :end] for t in tokens)
        return softmax_attention(self.query.to(dtype), key, value, mask, self.scale)

    def assert_low_precision_error(self, actual: Tensor, mask: Tensor | None) -> None:
        """Assert that the error is a small multiple of that of the same computation in the query's
        dtype.

        The second term is the rounding of the result, for the cases in which the plain computation
        happens to be exact; the third is what folding a scale and a zero point costs in fp32, where
        two products cancel.
        """
        dtype = self.query.dtype
        widest = max(self.key_layout.head_dim, self.value_layout.head_dim)
        if NATIVE and self.spec.page_size * widest > 96 * 128 and dtype == torch.float32:
            dtype = torch.float16  # what large packed tiles are multiplied in
        exact = self.expected(mask, torch.float64)
        assert actual.dtype == self.query.dtype
        assert actual.shape == exact.shape
        assert bool(actual.isfinite().all())
        plain = (self.expected(mask, dtype).double() - exact).abs().max()
        bound = 3 * plain + 2 * torch.finfo(dtype).eps * exact.abs().max() + 2e-5
        error = (actual.double() - exact).abs().max()
        assert error <= bound, f"error {error:.2e} beyond {bound:.2e}; plainly {plain:.2e}"


@st.composite
def sites(draw: st.DrawFn) -> Site:
    page = draw(st.sampled_from([32, 64, 128, 256] if NATIVE else [32]))
    dims = draw(st.sampled_from([64, 80, 96, 128, 256])), draw(st.sampled_from([64, 80, 96, 128]))
    if draw(st.booleans()):
        dims = dims[0], dims[0]
    specs = draw(tensor_specs(dims[0], page)), draw(tensor_specs(dims[1], page))
    spec = CacheSpec(*specs, draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    boundary = spec.sinks + spec.window + page
    start = draw(
        st.sampled_from(
            [1, 2, boundary - 1, boundary, boundary + 1, boundary + page, boundary + 50]
        )
    )
    lengths = start, draw(st.sampled_from([1, 1, 2, 5])), draw(st.sampled_from([0, 0, 1, 30]))
    heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3, 4, 7]))
    return Site(spec, dims, heads, lengths, draw(st.sampled_from(DTYPES)))


def random_mask(site: Site, kind: str, width: int) -> Tensor:
    """Return a mask of ``width`` columns that hides slots without a token and some others."""
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


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    kinds = ["none", "one row", "tokens", "batch", "heads", "all", "additive", "lowest"]
    kind = data.draw(st.sampled_from(kinds))
    end = site.start + site.key.shape[2]
    width = end + data.draw(st.sampled_from([0, 0, 13, -1, 1 - site.start]))
    mask = None if kind == "none" else random_mask(site, kind, max(1, width))
    actual = site.attend(mask, data.draw(st.booleans()))
    site.assert_low_precision_error(actual, mask)


def plain_site(**changes: object) -> Site:
    defaults = {"bits": 4, "lengths": (140, 2, 0), "dtype": torch.float16}
    values = defaults | changes
    tensor = TensorSpec(values["bits"])
    spec = CacheSpec(tensor, tensor, 3, 20, 32)
    return Site(spec, (64, 64), (2, 4), values["lengths"], values["dtype"])


def test_the_kernel_agrees_with_the_cpu_path() -> None:
    site = plain_site(dtype=torch.float32)
    mask = random_mask(site, "heads", 142)
    expected = blocked.attend(
        site.query, site.key, site.value, site.key_parts, site.value_parts, mask, site.start,
        site.scale, site.key_layout, site.value_layout,
    )  # fmt: skip
    torch.testing.assert_close(site.attend(mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_a_row_that_sees_nothing_gives_zeros(kind: str) -> None:
    site = plain_site(dtype=torch.float32)
    seen = torch.ones(2, 1, 2, 142, dtype=torch.bool)
    seen[1, 0, 1] = False
    hidden = -math.inf if kind == "-inf" else torch.finfo(torch.float32).min
    out = site.attend(
        seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    )
    assert bool((out[1, :, 1] == 0).all())
    assert bool((out[0] != 0).all())
    assert bool((out[1, :, 0] != 0).all())


def test_hidden_tokens_do_not_matter() -> None:
    site = plain_site()
    mask = torch.rand(142, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[-1] = True
    before = site.attend(mask)
    recent = reference.exact_row_index(131, 140, site.key_layout, mask.device)
    for parts in (site.key_parts, site.value_parts):
        parts[2][:, :, recent[~mask[131:140]]] = 100.0
    assert torch.equal(site.attend(mask), before)


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_the_number_of_shares_does_not_change_the_output(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = plain_site(dtype=torch.float32)
    expected = site.attend(None)
    monkeypatch.setattr(attention, "PROGRAMS_PER_PROCESSOR", programs)
    torch.testing.assert_close(site.attend(None), expected, rtol=1e-5, atol=1e-6)


def test_many_queries_are_attended_in_tiles() -> None:
    site = plain_site(lengths=(70, 20, 0), dtype=torch.float32)
    causal = torch.arange(90) <= torch.arange(70, 90)[:, None]
    site.assert_low_precision_error(site.attend(causal), causal)


@pytest.mark.parametrize("by_position", [True, False])
def test_a_prompt_attends_to_itself(by_position: bool) -> None:
    site = plain_site(lengths=(0, 9, 0))
    causal = torch.arange(12) <= torch.arange(9)[:, None]
    site.assert_low_precision_error(site.attend(causal, by_position), causal)
    site.assert_low_precision_error(site.attend(None, by_position), None)


def test_tokens_that_the_cache_does_not_hold_give_nan() -> None:
    assert bool(plain_site().attend(None, start=141).isnan().all())


def test_large_and_constant_values_survive() -> None:
    """Regression: scales folded into fp16 weights overflow, and a scale of 0 has no logarithm."""
    for fill in (60000.0, 0.0, 1e-6):
        site = plain_site(dtype=torch.float32)
        value = torch.randn(2, 2, 140, 64, generator=torch.Generator().manual_seed(0)).sign() * fill
        value[:, :, :70] = 3.0
        site.value_parts = Site.fill(value, 4, site.value_layout)
        exact = site.expected(None, torch.float64)
        error = (site.attend(None).double() - exact).abs().max()
        assert error <= 1e-4 * (1 + fill)


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_every_later_length() -> None:
    from kvq_compile.kernels import quantize_kv

    site = plain_site(lengths=(0, 1, 0), dtype=torch.bfloat16)
    parts = [
        tuple(p.to(DEVICE) for p in new_parts(site.key, 6, layout))
        for layout in (site.key_layout, site.value_layout)
    ]
    tensors = [t.to(DEVICE) for t in (site.query, site.key, site.value)]
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step() -> Tensor:
        out = attention.attend(
            *tensors, *parts, None, position, None, site.scale, site.key_layout, site.value_layout
        )
        quantize_kv.append_(*parts[0], tensors[1], position, None, site.key_layout)
        quantize_kv.append_(*parts[1], tensors[2], position, None, site.value_layout)
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for index in range(120):
        position.fill_(index)
        graph.replay()
        if index % 17 == 0:
            site.start = index
            site.key_parts, site.value_parts = (
                Site.fill(t[:, :, :1].expand(-1, -1, index, -1), 6, layout)
                for t, layout in ((site.key, site.key_layout), (site.value, site.value_layout))
            )
            site.assert_low_precision_error(out.cpu(), None)
