"""Attention in plain numpy, float64: what the kernels of this folder must compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from llmc.schedules.attention.kv_format import FORMATS, KVFormat, dequantise, pack, quantise, unpack
from llmc.schedules.attention.layout import BLOCK, pack_keys
from llmc.schedules.attention.pages import gather, scatter
from llmc.schedules.attention.workloads import MOST_DRAFTED, AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays

MASKED = -1e30  # scores below count as masked


def unpack_keys(kp: np.ndarray) -> np.ndarray:
    """[B, KV, CB, D, 64] -> [B, KV, CB*64, D]."""
    B, KV, CB, D, _ = kp.shape
    return kp.swapaxes(3, 4).reshape(B, KV, CB * BLOCK, D)


def pack_cache(codes: np.ndarray, planes: np.ndarray, format: KVFormat, values: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes and planes [B, KV, CB*64, D | rows/2] as they lie in kp or v, and in their half of planes."""
    B, KV, L, D = codes.shape
    blocks = pack(codes.reshape(B, KV, L // BLOCK, BLOCK, D), format)
    if not values:
        blocks = blocks.swapaxes(3, 4)
    return np.ascontiguousarray(blocks), planes.reshape(B, KV, L // BLOCK, BLOCK, -1).swapaxes(3, 4)


def unpack_cache(
    packed: np.ndarray, planes: np.ndarray, format: KVFormat, values: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_cache`; `planes` are those of keys and values."""
    B, KV, CB = packed.shape[:3]
    codes = unpack(packed if values else packed.swapaxes(3, 4), format)
    half = planes[:, :, :, planes.shape[3] // 2 :] if values else planes[:, :, :, : planes.shape[3] // 2]
    return codes.reshape(B, KV, CB * BLOCK, -1).copy(), half.swapaxes(3, 4).reshape(B, KV, CB * BLOCK, -1).copy()


def cached(kv_cache: str, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [B, KV, L, D] float64 of a cache of any format."""
    if "table" in inputs:
        inputs = gather(inputs)
    if kv_cache == "float32":
        return unpack_keys(inputs["kp"]).astype(np.float64), inputs["v"].astype(np.float64)
    format = FORMATS[kv_cache]
    k, v = (
        dequantise(*unpack_cache(inputs[name], inputs["planes"], format, values), format)
        for name, values in (("kp", False), ("v", True))
    )
    return k, v


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rotary embedding (Su et al., 2021) of x [B, S, heads, D] by cos, sin [B, S, R/2]; dimensions from R on pass."""
    half = cos.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    y = x.astype(np.float64)
    a, b = y[..., first].copy(), y[..., second].copy()
    cos, sin = cos[:, :, None], sin[:, :, None]
    y[..., first], y[..., second] = a * cos - b * sin, b * cos + a * sin
    return y


def kv_append(w: KVAppendWorkload, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """All outputs; for the in-place form also kp and v as they are after the call."""
    if w.paged:
        return scatter(kv_append(replace(w, paged=False), gather(inputs)), inputs)
    H, KV, D = w.n_heads, w.n_kv_heads, w.head_dim
    if w.packed_qkv:
        q, k, v = np.split(inputs["qkv"], [H * D, (H + KV) * D], axis=-1)
    else:
        k, v = inputs["k_in"], inputs["v_in"]
        q = inputs["q_in"] if w.rope else k
    B, S = k.shape[:2]
    k, v = k.reshape(B, S, KV, D), v.reshape(B, S, KV, D).swapaxes(1, 2)
    out: Arrays = {}
    if w.rope:
        out["q"] = rotate(q.reshape(B, S, H, D), inputs["cos"], inputs["sin"], w.interleaved).reshape(B, S, H * D)
        k = rotate(k, inputs["cos"], inputs["sin"], w.interleaved)
    k = k.swapaxes(1, 2)
    if w.kv_cache != "float32":
        return out | _append_rounded(w, inputs, k, v)
    if w.in_place:
        keys, values = unpack_keys(inputs["kp"]).astype(np.float64), inputs["v"].astype(np.float64)
        for b, length in enumerate(inputs["kv_len"]):
            new = slice(max(0, S - length), S)
            keys[b, :, max(0, length - S) : length] = k[b, :, new]
            values[b, :, max(0, length - S) : length] = v[b, :, new]
        return out | {"kp": pack_keys(keys), "v": values}
    if w.past:
        k = np.concatenate([inputs["past_k"], k], axis=2)
        v = np.concatenate([inputs["past_v"], v], axis=2)
    out |= {"kp": pack_keys(k), "v": v}
    return out | {"present_k": k} if w.present else out


def _append_rounded(w: KVAppendWorkload, inputs: Mapping[str, np.ndarray], k: np.ndarray, v: np.ndarray) -> Arrays:
    """kp, v and planes after new keys and values [B, KV, S, D] have entered."""
    format, S, found, planes = FORMATS[w.kv_cache], k.shape[2], {}, []
    for name, x, values in (("kp", k, False), ("v", v, True)):
        codes, scales = unpack_cache(inputs[name], inputs["planes"], format, values)
        new = quantise(x, format)
        for b, length in enumerate(inputs["kv_len"]):
            to = slice(max(0, length - S), length)
            for old, part in zip((codes, scales), new, strict=True):
                old[b, :, to] = part[b, :, max(0, S - length) :]
        found[name], half = pack_cache(codes, scales, format, values)
        planes.append(half)
    return found | {"planes": np.concatenate(planes, axis=3)}


def in_tree(masks: np.ndarray, length: int) -> np.ndarray:
    """Which of `length` keys each of the S newest tokens sees, bool [S, length]; masks uint64 [S]."""
    S = len(masks)
    new = np.array([[j < MOST_DRAFTED and bool(int(mask) >> j & 1) for j in range(S)] for mask in masks], bool)
    older = np.ones((S, max(length - S, 0)), bool)
    return np.concatenate([older, new], axis=1)[:, -length:] if length else np.ones((S, 0), bool)


def attention(w: AttentionWorkload, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """out [B, S, H*D]."""
    H, D = w.n_heads, w.head_dim
    q = inputs["q"][..., : H * D].astype(np.float64)
    B, S = q.shape[:2]
    keys, values = cached(w.kv_cache, inputs)
    out = np.zeros((B, S, H, D))
    for b, length in enumerate(inputs["kv_len"]):
        for h in range(H):
            k, v = keys[b, h // w.group, :length], values[b, h // w.group, :length]
            scores = q[b, :, h * D : (h + 1) * D] @ k.T * w.scale
            if w.softcap:
                scores = w.softcap * np.tanh(scores / w.softcap)
            row, key = np.arange(length - S, length)[:, None], np.arange(length)[None, :]
            seen = np.ones_like(scores, bool)
            if w.key_bias:
                seen &= key < inputs["key_bias"].shape[-1]
                scores = scores + inputs["key_bias"][b, :length]
            if w.bias:
                bias = np.broadcast_to(inputs["bias"], (B, H, S, inputs["bias"].shape[-1]))
                scores = scores + bias[b, h, :, :length]
            if w.alibi:
                scores = scores + float(inputs["slopes"][h]) * (key - row)
            if w.ordered:
                before = inputs["prefix_len"][b] if w.prefix else 0
                seen &= (key <= row) | ((key < before) & (row >= 0))
            if w.window:
                seen &= (key > row - w.window) | (key < w.sinks)
            if w.documents:
                number = inputs["documents"][b]
                seen &= key < len(number)
                seen &= number[np.clip(row, 0, len(number) - 1)] == number[np.minimum(key, len(number) - 1)]
            if w.tree:
                seen &= in_tree(inputs["tree"][b], length)
            seen &= scores > MASKED
            top = np.max(scores, axis=-1, keepdims=True, where=seen, initial=MASKED)
            p = np.where(seen, np.exp(np.minimum(scores - top, 0)), 0)
            out[b, :, h] = p @ v / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return {"out": out.reshape(B, S, H * D)}
