"""What a user can do about an attention that was not rewritten, by the reason that the lowering gave."""

from __future__ import annotations

import re

from kvq_compile.lowering.find.reasons import BY_OPTION, NO_CACHE, SHORT_WINDOW

# The first pattern that a reason matches. Reasons that say themselves what to do are their own advice.
_ADVICE: dict[str, str] = {
    re.escape(NO_CACHE): "Nothing, if the call keeps no cache; else pass one, with use_cache=True.",
    re.escape(BY_OPTION): "Take the layer out of the option layers.",
    re.escape(SHORT_WINDOW): "There is nothing to gain; a smaller window and page_size would pack some of it.",
    "gradient|dropout|trained": "Call the model in eval mode, under torch.no_grad().",
    "fault of kvq-compile": "Report it, with the model's name and the line of source.",
    "weights are used|scores are used": "Use the weights nowhere else: output_attentions=False.",
    "keep_exact": "Leave keep_exact out, or take a dynamic cache that keeps all its tokens.",
    "bits depend on attention": "Take a method whose bits do not depend on attention, as tc or int4.",
    "flex_attention": 'Load the model with attn_implementation="sdpa".',
    "dtype|device .* is not supported": "Run keys and values in one of float16, bfloat16 and float32, "
    "on a CPU or an NVIDIA GPU.",
    "head_dim|group|calibrat|couple": "Choose another group_size, or a method that takes this head size, as int4.",
    "branch": "Compile the branches as functions of their own.",
    "single heads": "Read the heads of a cache alike in all of its calls: one by one, or all at once.",
    "rotation|rotated|angle|RoPE": "Take a method that codes keys as attention sees them, or pre_rope=False.",
    "higher-order operator": "Attend outside of it; a checkpoint saves nothing where no gradients are recorded.",
    "adds to what": "Write tokens over what the cache holds, as cache.index_copy_(2, positions, tokens) does.",
    "behind the new tokens": "Let the mask hide all cache positions behind the new tokens, as a causal one does.",
    r"\bmasks?\b": "Pass a boolean or an additive mask, [B, 1 or H, T, S], over all cache positions.",
    "some rows|every sequence|every row": "Take the same rows wherever a call uses the cache, as cache[:batch], or "
    "allocate it for the batch at hand.",
    "windows of different|rings of different": "Give keys and values the same window.",
    "too large to be evaluated": "Compile with a short prompt first; the graph serves longer ones.",
    "reads a part of it": "Let attention read the cache as it is; a mask, or what is kept, leaves tokens out.",
    "behind those held": "Join new tokens to all that is held; drop tokens between the calls, as cache[:, :, :n].",
    "this call does not write": "Write the cache and attend to it in one graph, without a graph break between the two.",
    "reaches attention through": "Let attention read the cache as it is; change tokens before they are written.",
    "are returned through": "Return the keys and values that attention reads, as they are.",
    "quantized cache|quantized buffer|dynamic cache|outside attention|view taken|read before|written":
    "Write new tokens behind the old ones, once a call, and let attention alone read the cache.",
}  # fmt: skip
SPELL = (
    "Write the attention as scaled_dot_product_attention over whole keys and values [B, H, S, D], or as matmul, "
    "softmax and matmul; if it is that already, report the line of source."
)


def advice(reason: str) -> str:
    """Return what would make an attention work that was left alone for a reason."""
    return next((text for pattern, text in _ADVICE.items() if re.search(pattern, reason)), SPELL)
