"""A decoder in the style of nanoGPT with a cache of tuples, grown by ``torch.cat``.

Run it: ``python examples/nanogpt_style.py``. Attention is ``scaled_dot_product_attention`` or written out as
products; the backend reads both.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kvq_compile

Cache = list[tuple[Tensor, Tensor]]


class CausalSelfAttention(nn.Module):
    """Attention over the past keys and values and those of the new tokens."""

    def __init__(self, width: int, heads: int, block_size: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = heads, flash
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer(
            "bias", torch.tril(torch.ones(block_size, block_size))[None, None], persistent=False
        )

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the output and the grown keys and values ``[B, H, S, D]``."""
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2)
        )
        if past is not None:
            k = torch.cat((past[0], k), dim=-2)
            v = torch.cat((past[1], v), dim=-2)
        S = k.shape[2]
        mask = self.bias[:, :, S - T : S, :S]
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask == 1)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(mask == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)), (k, v)


class Block(nn.Module):
    """Attention and a small network, each added to the stream."""

    def __init__(self, width: int, heads: int, block_size: int, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads, block_size, flash)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the stream after this block, and its cache."""
        y, past = self.attn(self.ln_1(x), past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), past


class GPT(nn.Module):
    """Embedding, blocks, output."""

    def __init__(
        self,
        vocabulary: int = 64,
        width: int = 64,
        heads: int = 4,
        blocks: int = 2,
        block_size: int = 128,
        flash: bool = True,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, block_size, flash) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Return logits of the tokens ``ids`` ``[B, T]`` behind ``past``, and the cache with them."""
        first = 0 if past is None else past[0][0].shape[2]
        x = self.wte(ids) + self.wpe(torch.arange(first, first + ids.shape[1], device=ids.device))
        grown: Cache = []
        for index, block in enumerate(self.blocks):
            x, pair = block(x, None if past is None else past[index])
            grown.append(pair)
        return self.lm_head(x), grown


def make_model(flash: bool = True) -> GPT:
    """Return a small model with fixed random weights."""
    torch.manual_seed(0)
    return GPT(flash=flash).eval()


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, new_tokens: int) -> tuple[list[int], Cache]:
    """Continue a prompt ``[1, T]`` greedily; return the new tokens and the cache."""
    ids, past = prompt, None
    out: list[int] = []
    for _ in range(new_tokens):
        logits, past = model(ids, past)
        ids = logits[:, -1:].argmax(-1)
        out.append(int(ids))
    assert past is not None
    return out, past


def main() -> None:
    """Generate with a plain and with a quantized cache."""
    prompt = torch.randint(0, 64, (1, 90))
    for name in ("plain", "quantized"):
        model = make_model(flash=False)
        if name == "quantized":
            model.compile(backend="kvq", options={"method": "int8", "window": 16, "page_size": 32})
        text, cache = generate(model, prompt, 16)
        print(f"{name:10s}", text, f"{kvq_compile.report(cache).bytes:,d} bytes")


if __name__ == "__main__":
    main()
