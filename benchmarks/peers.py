"""llmc against onnxruntime, onnxruntime-genai and OpenVINO on one decoder, all in one interleaved run.

    python benchmarks/peers.py --llmc smollm2.llmc --onnx models/smollm2/model.onnx

Every engine runs in a process of its own; the rounds go round: each engine is timed once on each task, then again.
Logits are computed for every position of a prompt by all of them. An engine that is not installed, or cannot load the
model, is left out with a note. Ratios are to llmc's median: above 1 the peer is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmc.bench import Contestant, Result, as_json, compare, decoder_tasks
from llmc.package.reader import open_artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmc", type=Path, action="append", required=True, help="an artifact; may be repeated")
    parser.add_argument("--onnx", type=Path, help="a decoder for onnxruntime")
    parser.add_argument("--genai", type=Path, help="a decoder beside a genai_config.json, for onnxruntime-genai")
    parser.add_argument("--openvino", type=Path, help="a float32 decoder for OpenVINO")
    parser.add_argument(
        "--openvino-int4", type=Path, help="a float32 decoder that NNCF compresses to int4 for OpenVINO"
    )
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512], help="prompt lengths")
    parser.add_argument("--decode", type=int, default=64, help="tokens after a prompt of 128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    contestants = [Contestant("llmc", path, f"llmc {path.stem}" if i else "llmc") for i, path in enumerate(args.llmc)]
    peers = {
        "onnxruntime": args.onnx,
        "onnxruntime-genai": args.genai,
        "openvino": args.openvino,
        "openvino-int4": args.openvino_int4,
    }
    contestants += [Contestant(engine, path) for engine, path in peers.items() if path]
    decoder = open_artifact(args.llmc[0]).manifest.decoder
    if decoder is None:
        sys.exit(f"{args.llmc[0]} is no decoder")
    tasks = decoder_tasks(args.prefill, args.decode)
    results = compare(
        contestants,
        tasks,
        threads=args.threads,
        repeat=args.repeat,
        vocabulary=decoder.vocab_size,
        progress=_progress if sys.stderr.isatty() else lambda message: None,
    )
    if args.json:
        print(json.dumps({name: as_json(result) for name, result in results.items()}, indent=2))
        return
    ours = results["llmc"]
    if not isinstance(ours, Result):
        sys.exit(str(ours))
    print(f"{'tokens/s':20}" + "".join(f"{task.name:>34}" for task in tasks) + f"{'load s':>8}{'MB':>7}")
    for name, result in results.items():
        if not isinstance(result, Result):
            print(f"{name:20}left out: {result.what}")
            continue
        cells = ""
        for task in tasks:
            figure = result.figures[task.name]
            ratio = figure.median / ours.figures[task.name].median
            cells += f"{f'{figure.median:.1f} [{figure.low:.1f}–{figure.high:.1f}] {ratio:.2f}×':>34}"
        print(f"{name:20}{cells}{result.load_s:8.2f}{result.peak_rss_mb:7.0f}")


def _progress(message: str) -> None:
    """Overwrites one line."""
    print(f"\033[K{message}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
