"""What methods were measured to cost on a pretrained model, and what is said before one that costs too much is used.

`FIGURES` quotes the tables of `docs/quality.md` (`SOURCE`), which say how they were made.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvq_compile.kernels.spec import CacheSpec

MODEL = "SmolLM2-135M-Instruct"
SOURCE = "docs/quality.md"


@dataclass(frozen=True)
class Figure:
    """One method on `MODEL`: perplexity over that of a 16-bit cache in percent, and KL divergence, on WikiText-2.

    ``method`` reads as ``kvq eval --method`` takes it.
    """

    method: str
    packed_bits: float
    difference: float
    kl: float


BETTER = Figure("tc:bits=4", 4.22, 0.066, 0.00211)
FIGURES = (
    Figure("int2:group_size=64", 2.5, 300, 1.36),
    Figure("kivi:bits=2", 3, 11.1, 0.115),
    Figure("skvq:bits=2", 2.5, 11.4, 0.114),
    Figure("qaq:bits=2.3", 2.61, 50.7, 0.404),
)
# Methods to the most bits of a key's code, parameters apart, at which they are told of. Keys decide: values bear two
# bits. QAQ's keys have 3.2 where the method is asked for 3.
TOO_FEW = {"int2": 2.0, "int3": 2.0, "int4": 2.0, "int8": 2.0, "kivi": 2.0, "skvq": 2.0, "qaq": 3.2}


def warning(spec: CacheSpec) -> str | None:
    """Return what to say before ``spec`` is used; ``None`` where it is not known to cost too much.

    Overrides of single layers are not looked at: nothing was measured of them.
    """
    if spec.method not in TOO_FEW or getattr(spec.key, "bits", 16) > TOO_FEW[spec.method]:
        return None
    family = "int2" if spec.method.startswith("int") else spec.method
    figure = next(each for each in FIGURES if each.method.partition(":")[0] == family)
    return (
        f"{spec.method} with keys of {spec.key.bits:.2g} bits loses too much on pretrained models: "
        f"{figure.method} costs {figure.difference:+.0f} % of perplexity on {MODEL} ({SOURCE}); "
        f"take {BETTER.method}, which costs {BETTER.difference:+.2f} % at {BETTER.packed_bits:g} bits, "
        "or measure your model with `kvq eval`"
    )
