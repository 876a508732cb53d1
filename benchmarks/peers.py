"""llmc against onnxruntime, onnxruntime-genai, OpenVINO and llama.cpp on one decoder, all in one interleaved run.

    python benchmarks/peers.py --llmc smollm2.llmc --onnx models/smollm2/model.onnx
    python benchmarks/peers.py --llmc avx2.llmc --gguf q4_0.gguf q4_1.gguf --llama-cpp llama.cpp/build-avx2/bin

Every engine runs in a process of its own; the rounds go round: each engine is timed once on each task, then again.
llama.cpp is timed by its own llama-bench, and llama-batched-bench for batches, a process for each measurement, which
warms up by itself; its cache is float16. Logits are computed for every position of a prompt by all of them. An engine
that is not installed, or cannot load the model, is left out with a note. Ratios are to llmc's median: above 1 the peer
is faster.
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
    parser.add_argument("--gguf", type=Path, nargs="+", default=[], help="decoders for llama.cpp")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        nargs="+",
        default=[None],
        help="folders of llama.cpp's programs, each of another build; without, those on the PATH",
    )
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512], help="prompt lengths")
    parser.add_argument("--decode", type=int, default=64, help="tokens after a prompt of 128")
    parser.add_argument("--context", type=int, nargs="+", default=[], help="longer prompts, to decode after")
    parser.add_argument("--batch", type=int, nargs="+", default=[], help="sequences to decode at once, after 128 each")
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
    contestants += [_llama_cpp(gguf, programs) for programs in args.llama_cpp for gguf in args.gguf]
    decoder = open_artifact(args.llmc[0]).manifest.decoder
    if decoder is None:
        sys.exit(f"{args.llmc[0]} is no decoder")
    tasks = decoder_tasks(args.prefill, args.decode, args.context, args.batch)
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
    width = 2 + max(map(len, results))
    print(f"{'tokens/s':{width}}" + "".join(f"{task.name:>34}" for task in tasks) + f"{'load s':>8}{'MB':>7}")
    for name, result in results.items():
        if not isinstance(result, Result):
            print(f"{name:{width}}left out: {result.what}")
            continue
        cells = ""
        for task in tasks:
            figure = result.figures[task.name]
            ratio = figure.median / ours.figures[task.name].median
            cells += f"{f'{figure.median:.1f} [{figure.low:.1f}–{figure.high:.1f}] {ratio:.2f}×':>34}"
        print(f"{name:{width}}{cells}{result.load_s:8.2f}{result.peak_rss_mb:7.0f}")


def _llama_cpp(gguf: Path, programs: Path | None) -> Contestant:
    label = f"llama.cpp {gguf.stem}" + (f" in {programs}" if programs else "")
    return Contestant("llama.cpp", gguf, label, {"programs": programs})


def _progress(message: str) -> None:
    """Overwrites one line."""
    print(f"\033[K{message}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
