"""com.microsoft's attention becomes `Attention` only where that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.fuse.contrib import fuse_contrib
from llmc.importer import import_model
from tests.importer.helpers import FLOAT, model, node, saved

INT32 = 6
H, KV, D = 4, 2, 16


def fused(tmp_path: Path, **attrs: Any) -> list[str]:
    """The attention operators of a model with one GroupQueryAttention, after the rewrite."""
    attention = node(
        "GroupQueryAttention",
        "q k v pk pv lens total",
        "y present_k present_v",
        domain="com.microsoft",
        num_heads=H,
        kv_num_heads=KV,
        **attrs,
    )
    inputs = [("q", FLOAT, ["b", "s", H * D]), ("lens", INT32, ["b"]), ("total", INT32, [])]
    inputs += [(x, FLOAT, ["b", "s", KV * D]) for x in "kv"] + [(x, FLOAT, ["b", KV, "p", D]) for x in ("pk", "pv")]
    path = saved(tmp_path, model([attention], inputs, ["y", "present_k", "present_v"], domains={"com.microsoft": 1}))
    return [n.op for n in fuse_contrib(import_model(path)).nodes if "Attention" in n.op]


def test_group_query_attention_is_fused(tmp_path: Path) -> None:
    assert fused(tmp_path) == ["Attention"]


@pytest.mark.parametrize("attrs", [{"causal": 0}, {"smooth_softmax": 1}])
def test_forms_that_the_kernel_lacks_are_left(tmp_path: Path, attrs: dict[str, int]) -> None:
    assert fused(tmp_path, **attrs) == ["GroupQueryAttention"]
