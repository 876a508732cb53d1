"""Perplexity of a decoder on a text: chunks of 512 tokens, each with an empty past, the second half scored.

    python benchmarks/perplexity.py text.txt --tokenizer models/smollm2/tokenizer.json llmc=smollm2.llmc \
        onnxruntime=models/smollm2/model.onnx
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llmc.engines import open_engine
from llmc.errors import LlmcError
from llmc.perplexity import perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+", metavar="ENGINE=FILE", help="engines: llmc, onnxruntime, openvino ...")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="only the first so many of the text")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf8")
    ids = np.array(Tokenizer.from_file(str(args.tokenizer)).encode(text).ids[: args.tokens], np.int64)
    for item in args.models:
        engine, _, path = item.partition("=")
        try:
            print(f"{perplexity(open_engine(engine, path, args.threads), ids):9.4f}  {item}", flush=True)
        except LlmcError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
