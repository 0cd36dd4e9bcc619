"""A decoder in the style of gpt-fast: caches are buffers of the module, written by index, read as a whole.

Run it: ``python examples/gpt_fast_style.py``. It generates with the plain model and with the same model under
``backend="kvq"``, whose buffers turn into quantized caches in the first compiled call.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import kvq_compile


class Attention(nn.Module):
    """Grouped-query attention over a cache of fixed size, without positions in the keys for brevity."""

    def __init__(self, dim: int, heads: int, kv_heads: int, slots: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.register_buffer(
            "k_cache", torch.zeros(1, kv_heads, slots, self.head_dim), persistent=False
        )
        self.register_buffer(
            "v_cache", torch.zeros(1, kv_heads, slots, self.head_dim), persistent=False
        )

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        """Attend to the cache, the tokens ``x`` ``[B, T, dim]`` included."""
        B, T, dim = x.shape
        kv_size = self.kv_heads * self.head_dim
        q, k, v = self.wqkv(x).split([dim, kv_size, kv_size], dim=-1)
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)

        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v

        keys = self.k_cache.repeat_interleave(self.heads // self.kv_heads, dim=1)
        values = self.v_cache.repeat_interleave(self.heads // self.kv_heads, dim=1)
        y = scaled_dot_product_attention(q, keys, values, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).reshape(B, T, dim))


class Layer(nn.Module):
    """Attention and a small network, each added to the stream."""

    def __init__(self, dim: int, heads: int, kv_heads: int, slots: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, kv_heads, slots)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        """Return the stream after this layer."""
        x = x + self.attention(self.norms[0](x), mask, input_pos)
        return x + self.feed_forward(self.norms[1](x))


class Transformer(nn.Module):
    """Embedding, layers, output; learned positions."""

    def __init__(
        self,
        vocabulary: int = 64,
        dim: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        layers: int = 2,
        slots: int = 128,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Embedding(slots, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, slots) for _ in range(layers))
        self.output = nn.Linear(dim, vocabulary, bias=False)
        self.register_buffer(
            "causal_mask", torch.tril(torch.ones(slots, slots, dtype=torch.bool)), persistent=False
        )

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        """Return logits of the tokens ``ids`` ``[B, T]`` at the positions ``input_pos`` ``[T]``."""
        mask = self.causal_mask[None, None, input_pos]
        x = self.embedding(ids) + self.positions(input_pos)
        for layer in self.layers:
            x = layer(x, mask, input_pos)
        return self.output(x)


def make_model() -> Transformer:
    """Return a small model with fixed random weights."""
    torch.manual_seed(0)
    return Transformer().eval()


@torch.no_grad()
def generate(model: Transformer, prompt: Tensor, new_tokens: int) -> list[int]:
    """Continue a prompt ``[1, T]`` greedily."""
    ids, position = prompt, torch.arange(prompt.shape[1])
    out: list[int] = []
    for _ in range(new_tokens):
        ids = model(ids, position)[:, -1:].argmax(-1)
        out.append(int(ids))
        position = position[-1:] + 1
    return out


def main() -> None:
    """Generate with a plain and with a quantized cache."""
    prompt = torch.randint(0, 64, (1, 60))
    model = make_model()
    print("plain:    ", generate(model, prompt, 16), f"{kvq_compile.report(model).bytes:,d} bytes")
    model = make_model()
    model.compile(backend="kvq", options={"method": "int8", "window": 16, "page_size": 32})
    print("quantized:", generate(model, prompt, 16), f"{kvq_compile.report(model).bytes:,d} bytes")


if __name__ == "__main__":
    main()
