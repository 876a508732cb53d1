"""What ONNX operators mean: `RULES` maps (domain, op) to the rule that says it in Relax.

A rule takes a `Context` and returns a Relax expression, or a tuple of them where the operator has several outputs
(None for one that nobody reads). Rules are complete and correct; speed comes from fused kernels elsewhere.
"""

from __future__ import annotations

from llmc.ops import (
    attention,
    contrib,
    control,
    conv,
    elementwise,
    finding,
    fused,
    gather,
    matmul,
    ngrams,
    nn,
    quant,
    recurrent,
    reduce,
    refused,
    resize,
    rotary,
    sampling,
    shape,
    signal,
    unpool,
)
from llmc.ops.context import Rule

_STANDARD = {
    **elementwise.RULES,
    **shape.RULES,
    **gather.RULES,
    **reduce.RULES,
    **matmul.RULES,
    **nn.RULES,
    **quant.RULES,
    **conv.RULES,
    **resize.RULES,
    **attention.RULES,
    **rotary.RULES,
    **finding.RULES,
    **sampling.RULES,
    **signal.RULES,
    **unpool.RULES,
    **ngrams.RULES,
    **refused.RULES,
    **recurrent.RULES,
}

RULES: dict[tuple[str, str], Rule] = {
    **{("", op): rule for op, rule in {**_STANDARD, **contrib.STANDARD}.items()},
    **{("com.microsoft", op): rule for op, rule in contrib.RULES.items()},
    **fused.RULES,
    **control.RULES,
}

__all__ = ["RULES"]
