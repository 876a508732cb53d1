"""Coverage-led fuzzing of everything that reads foreign bytes: ONNX files, artifacts, manifests, weights' headers.

    python benchmarks/fuzz_reader.py model                       until stopped
    python benchmarks/fuzz_reader.py artifact --seconds 600
    python benchmarks/fuzz_reader.py manifest --corpus corpus    keeps what it learns in corpus/manifest
    python benchmarks/fuzz_reader.py model --reproduce crash-1a2b

Needs atheris: pip install -e ".[fuzz]". The corpus begins with the small files of tests/security/seeds.py. Every
input must be read, or refused with one of llmc's errors, in little memory and at once; anything else stops the fuzzer,
which leaves the input in the current folder. It is a test for tests/security once the reader holds against it.
"""

from __future__ import annotations

import argparse
import contextlib
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the seeds are the tests'

SECONDS, MEGABYTES = 5, 2048  # of one input; the interpreter and what it has imported count too
LONGEST = 1 << 16  # bytes of an input

Target = tuple[dict[str, bytes], Callable[[bytes], None]]  # seeds by name; reads or refuses its argument


def model_target(folder: Path) -> Target:
    """A whole ONNX file, beside it the external data that a seed names."""
    from llmc.errors import ModelError
    from llmc.importer.reader import read_model
    from tests.security import seeds

    (folder / seeds.DATA).write_bytes(bytes(64))
    path = folder / "model.onnx"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(ModelError):
            read_model(path)

    return seeds.models(), read


def artifact_target(folder: Path) -> Target:
    """A whole artifact. Few mutations get behind its hashes: see the two targets that follow."""
    from llmc.errors import ArtifactError
    from llmc.package.reader import open_artifact
    from tests.security import seeds

    path = folder / "model.llmc"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(ArtifactError):
            open_artifact(path)

    return {"artifact": seeds.artifact()}, read


def manifest_target(folder: Path) -> Target:
    """The JSON of a manifest."""
    from llmc.errors import ArtifactError
    from llmc.package.manifest import Manifest
    from tests.package import files

    def read(data: bytes) -> None:
        with contextlib.suppress(ArtifactError):
            Manifest.from_json(data)

    return {"manifest": files.manifest().to_json()}, read


def weights_target(folder: Path) -> Target:
    """The header of a safetensors file, and its data."""
    from llmc.package.safetensors import parse_header
    from llmc.package.strict import Mismatch
    from tests.package import files

    def read(data: bytes) -> None:
        with contextlib.suppress(Mismatch):
            parse_header(memoryview(data))

    small = struct.pack("<Q", 2) + b"{}"
    return {"weights": files.weights_entry(files.write(folder / "seed.llmc")), "empty": small}, read


TARGETS = {"model": model_target, "artifact": artifact_target, "manifest": manifest_target, "weights": weights_target}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=0, help="stop after so long; default: never")
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many inputs; default: never")
    parser.add_argument("--corpus", type=Path, help="folder of the corpus; default: a temporary one")
    parser.add_argument("--reproduce", type=Path, help="read this one file and do nothing else")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="llmc-fuzz-") as folder:
        if args.reproduce:
            TARGETS[args.target](Path(folder))[1](args.reproduce.read_bytes())
            return
        try:
            import atheris
        except ModuleNotFoundError:
            sys.exit('fuzzing needs atheris: pip install -e ".[fuzz]"')

        with atheris.instrument_imports(include=["llmc.importer", "llmc.package"], enable_loader_override=False):
            seeds, read = TARGETS[args.target](Path(folder))
        corpus = (args.corpus or Path(folder) / "corpus") / args.target
        corpus.mkdir(parents=True, exist_ok=True)
        for name, content in seeds.items():
            (corpus / f"seed-{name}").write_bytes(content)
        limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}"]
        ends = [f"-max_total_time={args.seconds}", f"-runs={args.runs}"]
        atheris.Setup([sys.argv[0], *limits, *ends, str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
