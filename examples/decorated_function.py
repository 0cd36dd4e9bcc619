"""A plain function with a decorator: the smallest thing that keeps a quantized cache.

Run it: ``python examples/decorated_function.py``.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvq_compile


@kvq_compile.compile(method="int8", sinks=1, window=4, page_size=32, inner="eager")
def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend to the past and to the new tokens ``[B, H, T, D]``; return the output and the grown cache.

    An empty past is a tensor without elements of one dimension, which ``torch.cat`` skips.
    """
    keys = torch.cat([keys, key], dim=2)
    values = torch.cat([values, value], dim=2)
    return scaled_dot_product_attention(query, keys, values), keys, values


def main() -> None:
    """Feed forty tokens at once and ten one by one."""
    keys = values = torch.empty(0)
    for new in (40, *[1] * 10):
        query, key, value = torch.randn(3, 1, 4, new, 16)
        output, keys, values = attend(query, key, value, keys, values)
    print(f"output {tuple(output.shape)}, cache {keys}")
    print(kvq_compile.report([keys, values]))


if __name__ == "__main__":
    main()
