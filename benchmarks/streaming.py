"""Perplexity of a text far longer than a session's window, with attention sinks and without (StreamingLLM).

    python benchmarks/streaming.py model.llmc text.txt --window 508 --sinks 4

The text is read once, in pieces of 64 tokens; the perplexity of every 1,000 tokens is shown: of a session with sinks,
of one with the same number of tokens but no sinks, and of a plain one that keeps everything, as far as the model's
length goes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import llmc
from llmc.runtime import Session

PIECE = 64


def losses(session: Session, ids: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods (nats) of all tokens but the first, float64 [n - 1]."""
    found = []
    for start in range(0, len(ids) - 1, PIECE):
        piece = ids[start : start + PIECE]
        logits = session.append(piece, all=True)[0].astype(np.float64)
        following = ids[start + 1 : start + 1 + len(piece)]
        logits = logits[: len(following)]
        highest = logits.max(-1)
        total = np.log(np.exp(logits - highest[:, None]).sum(-1)) + highest
        found.append(total - logits[np.arange(len(following)), following])
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an artifact with its tokenizer")
    parser.add_argument("text", type=Path)
    parser.add_argument("--window", type=int, default=508)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--tokens", type=int, help="only the first so many of the text")
    parser.add_argument("--segment", type=int, default=1000)
    args = parser.parse_args()
    model = llmc.load(args.model)
    ids = np.array(model.text.encode(args.text.read_text(encoding="utf8"))[: args.tokens])
    sessions = {
        f"{args.sinks} + {args.window}": model.session(window=args.window, sinks=args.sinks),
        f"0 + {args.sinks + args.window}": model.session(window=args.sinks + args.window, sinks=0),
        "everything": model.session(),
    }
    ends = range(args.segment, len(ids), args.segment)
    print(f"{'tokens to':<14}{''.join(f'{end:>9}' for end in ends)}")
    for name, session in sessions.items():
        found = losses(session, ids[: session.max_length])
        segments = (found[end - args.segment : end] for end in ends if end <= len(found))
        print(f"{name:<14}{''.join(f'{np.exp(part.mean()):9.2f}' for part in segments)}", flush=True)


if __name__ == "__main__":
    main()
