"""Operators of the com.microsoft domain, as onnxruntime defines them: the index of the families' files."""

from __future__ import annotations

from llmc.ops import (
    attention_ms,
    contrib_activation,
    contrib_attention,
    contrib_gemm,
    contrib_linear_attention,
    contrib_moe,
    contrib_norm,
    contrib_quant,
    contrib_tensor,
    rotary,
)
from llmc.ops.context import Rule
from llmc.ops.refused import refusal

_SEARCH = "it searches for sequences by calling a model again and again: use llmc generate, or export the model alone"
_HASH = "it hashes n-grams of tokens"
_FEW = "few models have it, and it has no rule yet"

# What onnxruntime's CPU provider has beyond this, and why llmc does not.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"), _SEARCH),
    **dict.fromkeys(("MurmurHash3", "NGramHashMapping", "VarlenNGramHashMapping", "EngramGate"), _HASH),
    **dict.fromkeys(("AttnLSTM", "WordConvEmbedding", "CropAndResize", "MaxpoolWithMask"), _FEW),
    **dict.fromkeys(("HyperConnectionPreMix", "HyperConnectionPostMix", "MoEGroupRouter", "SampleOp"), _FEW),
    **dict.fromkeys(("DynamicTimeWarping", "BifurcationDetector", "NGramRepeatBlock"), _FEW),
    "DecoderMaskedMultiHeadAttention": "its cache is a buffer that the search around the model shares",
    "SparseAttention": "attention by blocks that a sparse matrix names has no rule yet",
    "MatMulFpQ4": "its weights are packed for onnxruntime's own kernels",
    "GatherPacked": "its table is packed for onnxruntime's own kernels",
    "SparseToDenseMatMul": "it works on sparse tensors",
    "Tokenizer": "it works on strings",
    "VarlenCausalConvWithState": "sequences of several lengths in one tensor have no rule yet",
}


# those that onnxruntime accepts in the standard domain too, and those that have become part of the standard
STANDARD: dict[str, Rule] = {**contrib_norm.STANDARD, **contrib_linear_attention.STANDARD}
RULES: dict[str, Rule] = {
    **attention_ms.RULES,
    **rotary.MICROSOFT,
    **contrib_attention.RULES,
    **contrib_linear_attention.RULES,
    **contrib_gemm.RULES,
    **contrib_norm.RULES,
    **contrib_activation.RULES,
    **contrib_quant.RULES,
    **contrib_moe.RULES,
    **contrib_tensor.RULES,
    **{op: refusal(reason) for op, reason in REFUSED.items()},
}
