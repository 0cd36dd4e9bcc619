"""Derivatives and batches of a compiled step: they are those of the model, or an error by name; never others."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

from kvq_compile import KVQWarning, QuantizedKV

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

B, H, D, SLOTS = 2, 2, 32, 128
# All tokens stay exact: what differs at all from the plain model is a fault.
OPTIONS = {"method": "int8", "sinks": 1, "window": 4096, "page_size": 32, "inner": "eager"}
PROMPT = 80


def tokens(first, last):
    """Return query, key and value of some tokens, ``[B, H, T, D]`` each."""
    generator = torch.Generator().manual_seed(first)
    return tuple(torch.randn(B, H, last - first, D, generator=generator) for _ in range(3))


def attend(q, keys, values, hidden=None):
    """Attend by operators that have derivatives of every kind."""
    scores = q @ keys.mT * 0.2
    return (scores if hidden is None else scores.masked_fill(hidden, -1e9)).softmax(-1) @ values


def grown(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return attend(q, keys, values), keys, values


def static(q, k, v, keys, values, position):
    keys[:, :, position] = k
    values[:, :, position] = v
    return attend(q, keys, values, torch.arange(SLOTS) > position[:, None]), keys, values


def started(step):
    """Return a compiled step and the arguments of its next call: quantized caches, for the static step a position."""
    dynamic = step is grown
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    caches = [torch.zeros(B, H, 0 if dynamic else SLOTS, D) for _ in range(2)]
    with torch.no_grad():
        for first, last in [(0, PROMPT), (PROMPT, PROMPT + 1)]:
            _, *caches = compiled(
                *tokens(first, last), *caches, *([] if dynamic else [torch.arange(first, last)])
            )
    assert isinstance(caches[0], QuantizedKV)
    return compiled, [*caches, *([] if dynamic else [torch.tensor([PROMPT + 1])])]


def plain(rest):
    """Return the same arguments with caches that are ordinary tensors."""
    return [x.dequantize().clone() if isinstance(x, QuantizedKV) else x for x in rest]


def functional(q, k, v, keys, values, position=None):
    """Return what both steps compute, without a write in place."""
    held = PROMPT + 1
    return attend(q, torch.cat([keys[:, :, :held], k], 2), torch.cat([values[:, :, :held], v], 2))


def jvp(step, x):
    return torch.func.jvp(step, (x,), (torch.ones_like(x),))


def grad(step, x):
    return torch.func.grad(lambda x: step(x).square().sum())(x)


def vjp(step, x):
    output, pull = torch.func.vjp(step, x)
    return output, *pull(torch.ones_like(output))


def vmap(step, x):
    return torch.func.vmap(step)(torch.stack([x, x + 1]))


TRANSFORMS = [jvp, grad, vjp, vmap]


def of(step, rest, changed):
    """Return a step as a function of its query or of its key, and where that is."""
    given = tokens(PROMPT + 1, PROMPT + 2)

    def function(x):
        arguments = [x if at == changed else each for at, each in enumerate(given)]
        result = step(*arguments, *rest)
        return result[0] if isinstance(result, tuple) else result

    return function, given[changed]


@pytest.mark.parametrize(("step", "changed"), [(grown, 0), (grown, 1), (static, 0)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_around_a_compiled_step_is_that_of_the_model(step, changed, transform):
    """Regression: Dynamo gave up on the step, and traced the code of the cache instead, which raised."""
    compiled, rest = started(step)
    expected = transform(*of(functional, plain(rest), changed))
    got = transform(*of(compiled, rest, changed))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("transform", [jvp, vmap])
def test_a_transform_within_a_compiled_step_is_that_of_the_model(transform, changed):
    _, rest = started(grown)
    expected = transform(*of(functional, plain(rest), changed))
    model = torch.compile(
        lambda *given: transform(*of(grown, given, changed)), backend="kvq", options=OPTIONS
    )
    torch.testing.assert_close(model(*rest), expected, rtol=1e-4, atol=1e-5)


def test_a_transform_within_a_compiled_step_makes_ordinary_tensors_of_what_it_writes():
    """Regression: it raised that operators on packed caches have no batching rule."""
    _, rest = started(static)
    expected = vmap(*of(functional, plain(rest), 0))
    model = torch.compile(
        lambda *given: vmap(*of(static, given, 0)), backend="kvq", options=OPTIONS
    )
    with pytest.warns(KVQWarning, match="it is attended to within a transform of torch.func"):
        got = model(*rest)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert type(rest[0]) is torch.Tensor


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tokens_of_a_transform_are_not_written_into_a_static_cache(transform):
    """Regression: their derivatives were lost, and the rest of the result was returned."""
    compiled, rest = started(static)
    before = plain(rest)[0]
    with pytest.raises(NotImplementedError, match="tokens written .* must be ordinary tensors"):
        transform(*of(compiled, rest, 1))
    torch.testing.assert_close(plain(rest)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("step", [grown, static])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_tangent_is_refused_by_name(step, changed):
    """Regression: it was dropped without a word, and what came out had none."""
    compiled, rest = started(step)
    name = "qkv"[changed]
    given = [*tokens(PROMPT + 1, PROMPT + 2)]
    with torch.no_grad(), forward_ad.dual_level():
        given[changed] = forward_ad.make_dual(given[changed], torch.ones_like(given[changed]))
        with pytest.raises(NotImplementedError, match=rf"L\['{name}'\] must carry no tangent"):
            compiled(*given, *rest)


@pytest.mark.filterwarnings("ignore:.*caches are not served")
@pytest.mark.parametrize("step", [grown, static])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_tangent_of_the_first_call_is_refused_or_the_models(step, changed):
    """PyTorch 2.14 gives our backend nothing that such a tensor takes part in."""
    _, rest = started(step)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    given = [*tokens(PROMPT + 1, PROMPT + 2)]
    with torch.no_grad(), forward_ad.dual_level():
        given[changed] = forward_ad.make_dual(given[changed], torch.ones_like(given[changed]))
        wanted = forward_ad.unpack_dual(step(*given, *plain(rest))[0])
        refused = None
        try:
            output, *_ = compiled(*given, *plain(rest))
        except NotImplementedError as error:
            refused = str(error)
        if refused is None:
            found = forward_ad.unpack_dual(output)
            torch.testing.assert_close(found.primal, wanted.primal, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.tangent, wanted.tangent, rtol=1e-4, atol=1e-5)
        else:
            assert f"L['{'qkv'[changed]}'] must carry no tangent" in refused


def test_a_tangent_of_a_cache_is_refused_by_name():
    compiled, (keys, values) = started(grown)
    with torch.no_grad(), forward_ad.dual_level():
        _, key, value = tokens(PROMPT + 1, PROMPT + 2)
        keys = torch.cat([keys, forward_ad.make_dual(key, torch.ones_like(key))], 2)
        values = torch.cat([values, value], 2)
        assert isinstance(keys, QuantizedKV)
        with pytest.raises(NotImplementedError, match="must carry no tangent"):
            compiled(*tokens(PROMPT + 2, PROMPT + 3), keys, values)


def test_a_tangent_is_not_assigned_to_a_quantized_cache():
    _, (keys, *_) = started(static)
    _, key, _ = tokens(PROMPT + 1, PROMPT + 2)
    with torch.no_grad(), forward_ad.dual_level():
        key = forward_ad.make_dual(key, torch.ones_like(key))
        with pytest.raises(NotImplementedError, match="got a tangent of forward-mode"):
            keys[:, :, PROMPT + 1 : PROMPT + 2] = key


@pytest.mark.parametrize("step", [grown, static])
def test_a_level_of_which_no_argument_carries_a_tangent_changes_nothing(step):
    compiled, rest = started(step)
    given = tokens(PROMPT + 1, PROMPT + 2)
    expected = functional(*given, *plain(rest))
    with torch.no_grad(), forward_ad.dual_level():
        output, *_ = compiled(*given, *rest)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_keeps_nothing_is_differentiated_without_a_word():
    def model(q, k, v):
        return torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))

    given = tokens(0, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQWarning)
        got = torch.compile(model, backend="kvq", options=OPTIONS)(*given)
    torch.testing.assert_close(got, model(*given))


def test_a_transform_of_what_is_no_attention_leaves_caches_quantized():
    def step(q, k, v, keys, values):
        return grown(torch.func.vmap(lambda x: x.softmax(-1))(q), k, v, keys, values)

    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", KVQWarning)
        _, keys, values = compiled(*tokens(0, PROMPT), *(torch.zeros(B, H, 0, D) for _ in range(2)))
    assert isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)
