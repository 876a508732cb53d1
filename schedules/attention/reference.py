"""Attention in plain numpy, float64: what the kernels of this folder must compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from llmc.schedules.attention.layout import BLOCK, pack_keys
from llmc.schedules.attention.workloads import AttentionWorkload, KVAppendWorkload
from llmc.schedules.base import Arrays

MASKED = -1e30  # scores below count as masked


def unpack_keys(kp: np.ndarray) -> np.ndarray:
    """[B, KV, CB, D, 64] -> [B, KV, CB*64, D]."""
    B, KV, CB, D, _ = kp.shape
    return kp.swapaxes(3, 4).reshape(B, KV, CB * BLOCK, D)


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


def attention(w: AttentionWorkload, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """out [B, S, H*D]."""
    H, D = w.n_heads, w.head_dim
    q = inputs["q"][..., : H * D].astype(np.float64)
    B, S = q.shape[:2]
    keys, values = unpack_keys(inputs["kp"]).astype(np.float64), inputs["v"].astype(np.float64)
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
            if w.causal:
                seen &= key <= row
            if w.window:
                seen &= key > row - w.window
            seen &= scores > MASKED
            top = np.max(scores, axis=-1, keepdims=True, where=seen, initial=MASKED)
            p = np.where(seen, np.exp(np.minimum(scores - top, 0)), 0)
            out[b, :, h] = p @ v / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return {"out": out.reshape(B, S, H * D)}
