"""Operators of ai.onnx that llmc does not compile, and why: a model with one of them is refused in these words."""

from __future__ import annotations

from typing import NoReturn

from llmc.ops.context import Context, Rule

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_STRINGS = ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit")

REFUSED: dict[str, str] = {
    **dict.fromkeys(_RANDOM, "it is random: two runs give different results"),
    **dict.fromkeys(_STRINGS, "it works on strings"),
    "ImageDecoder": "it decodes image files",
}


def refusal(reason: str) -> Rule:
    """The rule of an operator that is not supported."""

    def rule(ctx: Context) -> NoReturn:
        ctx.fail(reason)

    return rule


RULES: dict[str, Rule] = {op: refusal(reason) for op, reason in REFUSED.items()}
