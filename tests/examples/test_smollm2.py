"""The exporter on a made-up GGUF of two layers: its ONNX against the same decoder in numpy, in the GGUF's order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import onnxruntime
import pytest
from tokenizers import Tokenizer

EXPORT = Path(__file__).parents[2] / "examples/smollm2/export.py"
LAYERS, HIDDEN, FFN, HEADS, KV, D, VOCABULARY, THETA, EPSILON = 2, 64, 96, 4, 2, 16, 40, 10000.0, 1e-5
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A GGUF file, and what its blocks stand for."""
    rng, weights = np.random.default_rng(0), {}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    tokens = ["<end>", *(chr(ord("a") + i) for i in range(26)), "ab", "Ġ", *(f"<{i}>" for i in range(11))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        array = rng.standard_normal(shape).astype(np.float32) * (1 if len(shape) == 1 else shape[1] ** -0.5)
        if name.endswith("0.attn_v.weight"):
            array[:4] = 0.25  # blocks of one value, which have no scale
        stored = gguf.quantize(array, kind)
        weights[name] = gguf.dequantize(stored, kind).astype(np.float64).reshape(shape)
        writer.add_tensor(name, stored, raw_dtype=None if kind == gguf.GGMLQuantizationType.F32 else kind)

    q4, q8, f32 = (getattr(gguf.GGMLQuantizationType, k) for k in ("Q4_1", "Q8_0", "F32"))
    add("token_embd.weight", (VOCABULARY, HIDDEN), q8)
    add("output_norm.weight", (HIDDEN,), f32)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", (HIDDEN,), f32)
        add(f"blk.{i}.ffn_norm.weight", (HIDDEN,), f32)
        add(f"blk.{i}.attn_q.weight", (HEADS * D, HIDDEN), q4)
        add(f"blk.{i}.attn_k.weight", (KV * D, HIDDEN), q4)
        add(f"blk.{i}.attn_v.weight", (KV * D, HIDDEN), q4)
        add(f"blk.{i}.attn_output.weight", (HIDDEN, HEADS * D), q4)
        add(f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN), q4)
        add(f"blk.{i}.ffn_up.weight", (FFN, HIDDEN), q4)
        add(f"blk.{i}.ffn_down.weight", (HIDDEN, FFN), q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def reference(w: Weights, ids: np.ndarray) -> np.ndarray:
    """Logits [S, V] of ids [S] in float64. Rotated pairs are neighbours, as GGUF stores them."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[name]

    def heads(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(len(ids), n, D).swapaxes(0, 1)

    def rotate(x: np.ndarray) -> np.ndarray:
        angle = np.outer(np.arange(len(ids)), THETA ** -(np.arange(0, D, 2) / D))
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    h = w["token_embd.weight"][ids]
    for i in range(LAYERS):
        b = f"blk.{i}."
        x = norm(h, b + "attn_norm.weight")
        q = rotate(heads(x @ w[b + "attn_q.weight"].T, HEADS))
        k, v = rotate(heads(x @ w[b + "attn_k.weight"].T, KV)), heads(x @ w[b + "attn_v.weight"].T, KV)
        k, v = (np.repeat(a, HEADS // KV, axis=0) for a in (k, v))
        score = q @ k.swapaxes(1, 2) / np.sqrt(D) + np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        p = np.exp(score - score.max(-1, keepdims=True))
        o = (p / p.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), -1)
        h = h + o @ w[b + "attn_output.weight"].T
        x = norm(h, b + "ffn_norm.weight")
        gate, up = x @ w[b + "ffn_gate.weight"].T, x @ w[b + "ffn_up.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ w[b + "ffn_down.weight"].T
    return norm(h, "output_norm.weight") @ w["token_embd.weight"].T


def export(gguf_path: Path, folder: Path, *options: str) -> onnxruntime.InferenceSession:
    subprocess.run([sys.executable, EXPORT, folder, "--gguf", gguf_path, *options], check=True)
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def inputs(ids: np.ndarray, past: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Batch 1; `past` holds key and value of each layer."""
    names = [f"past_key_values.{i}.{kv}" for i in range(LAYERS) for kv in ("key", "value")]
    before = past[0].shape[2]
    return {
        "input_ids": ids[None],
        "attention_mask": np.ones((1, before + len(ids)), np.int64),
        "position_ids": np.arange(before, before + len(ids))[None],
        **dict(zip(names, past, strict=True)),
    }


@pytest.mark.parametrize(("options", "tolerance"), [((), 1e-4), (("--quantized",), 0.05)], ids=["float32", "quantized"])
def test_computes_what_the_file_says(
    model: tuple[Path, Weights], tmp_path: Path, options: tuple[str, ...], tolerance: float
) -> None:
    """At once, and in two parts with a cache. onnxruntime rounds activations to 8 bits in the quantised form."""
    path, weights = model
    session = export(path, tmp_path, *options)
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6])
    expected = reference(weights, ids)
    bound = tolerance * np.abs(expected).max()
    empty = [np.zeros((1, KV, 0, D), np.float32)] * (2 * LAYERS)
    whole, *_ = session.run(None, inputs(ids, empty))
    assert np.abs(whole[0] - expected).max() < bound
    _, *past = session.run(None, inputs(ids[:5], empty))
    rest, *_ = session.run(None, inputs(ids[5:], past))
    assert np.abs(rest[0] - expected[5:]).max() < bound


def test_quantized_blocks_are_exact(model: tuple[Path, Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPORT.parent)
    import weights as reader

    path, expected = model
    checkpoint = reader.read(path)
    for name, blocks in checkpoint.matrices.items():
        if "attn_q" in name or "attn_k" in name:
            continue  # their rows are in another order: the logits above prove it
        np.testing.assert_allclose(blocks.float32(), expected[name], rtol=2e-7, atol=2e-7)
        assert blocks.q.max() < 2**blocks.bits


def test_fewer_layers(model: tuple[Path, Weights], tmp_path: Path) -> None:
    session = export(model[0], tmp_path, "--layers", "1")
    assert sum(i.name.startswith("past") for i in session.get_inputs()) == 2


def test_tokenizer_travels_along(model: tuple[Path, Weights], tmp_path: Path) -> None:
    export(model[0], tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abc<end>").tokens == ["ab", "c", "<end>"]
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<end>"


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    line = [sys.executable, EXPORT, tmp_path / "out", "--gguf", tmp_path / "absent.gguf"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "absent.gguf" in done.stderr
