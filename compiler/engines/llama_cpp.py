"""llama.cpp on a GGUF file, timed by its own benchmark programs: a process for each measurement."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import numpy as np

from llmc.engines.base import ROOM, Engine
from llmc.errors import ModelError, OptionError


class LlamaCppEngine(Engine):
    """llama-bench for one sequence, llama-batched-bench for several; their tokens are random ones of their own."""

    def __init__(self, path: Path, threads: int, programs: Path | None = None) -> None:
        """`programs` is the folder that holds them, None for the PATH.

        Raises OptionError where they are missing, ModelError for a file that they cannot load. Every measurement does.
        """
        self.path, self.threads, self.programs = path, threads, programs
        self._bench("-p", 1, "-n", 0, "--no-warmup")

    def reset(self, batch: int = 1, room: int = ROOM) -> NoReturn:
        raise OptionError(
            "llama.cpp is timed by its own programs, which show no logits",
            hint="its llama-perplexity scores a GGUF file",
        )

    def step(self, ids: np.ndarray) -> NoReturn:
        self.reset()

    def measure(self, prompt: np.ndarray, decode: int = 0) -> float:
        batch, length = prompt.shape
        if batch > 1:
            return self._batched_bench(batch, length, decode)
        if decode:
            return self._bench("-p", 0, "-n", decode, "-d", length)
        # Embeddings ask for every position, and the output layer then serves every position too.
        return self._bench("-p", length, "-n", 0, "-embd", 1)

    def _bench(self, *options: str | int) -> float:
        """Seconds of one repetition; llama-bench warms up before it."""
        printed = self._run("llama-bench", "-r", 1, "-o", "json", *options)
        return _figure(printed, "llama-bench", "avg_ns") / 1e9

    def _batched_bench(self, batch: int, length: int, decode: int) -> float:
        """Seconds of the steps after the prompts; of the prompts, logits of the last position only, without steps."""
        sizes = ("-npp", length, "-ntg", decode, "-npl", batch, "-c", batch * (length + decode))
        printed = self._run("llama-batched-bench", "--output-format", "jsonl", *sizes)
        return _figure(printed, "llama-batched-bench", "t_tg" if decode else "t_pp")

    def _run(self, program: str, *options: str | int) -> str:
        """What `program` prints on standard output."""
        where = shutil.which(program, path=self.programs)
        if where is None:
            raise OptionError(
                f"no {program} in {self.programs or 'the folders of PATH'}",
                where="llama.cpp",
                hint="build llama.cpp, and put the folder of its programs on the PATH",
            )
        line = [where, "-m", str(self.path), "-t", str(self.threads), *map(str, options)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise ModelError(
                f"{program} failed: {said[-1] if said else f'exit code {done.returncode}'}",
                where=str(self.path),
                hint="llama.cpp reads GGUF files",
            )
        return done.stdout


def _figure(printed: str, program: str, name: str) -> float:
    """One figure of the only result of a run: a JSON object, alone or in a list, and what else a program prints."""
    starts = [i for i in (printed.find("["), printed.find("{")) if i >= 0]
    try:
        found, _ = json.JSONDecoder().raw_decode(printed, min(starts))
        return float((found[0] if isinstance(found, list) else found)[name])
    except (ValueError, IndexError, KeyError, TypeError):
        raise ModelError(
            f"{program} printed no result with '{name}'", where="llama.cpp", hint="is it of a very old release?"
        ) from None
