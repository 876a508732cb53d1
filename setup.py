"""Packaging of llmc: `compiler/` is the package `llmc`; `schedules/`, `targets/` and `tuning_logs/` are inside it.

The base install runs artifacts and the command line; what compiles them comes with the extra `compile`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = {
    "llmc": "compiler",
    "llmc.schedules": "schedules",
    "llmc.targets": "targets",
    "llmc.tuning_logs": "tuning_logs",
}

VERSION = re.findall(r'^__version__ = "(.+)"$', (ROOT / "compiler/__init__.py").read_text(encoding="utf8"), re.M)[0]

package_dir = dict(ROOMS)
packages = list(ROOMS)
for name, folder in ROOMS.items():
    for sub in find_packages(str(ROOT / folder)):
        package_dir[f"{name}.{sub}"] = f"{folder}/{sub.replace('.', '/')}"
        packages.append(f"{name}.{sub}")

# The two halves of TVM are pinned exactly, and together: pip alone resolves a newer apache-tvm-ffi, with which this
# apache-tvm segfaults as soon as it writes a PrimFunc as JSON or tensorizes a schedule.
TVM, TVM_FFI = "apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"

RUN = ["numpy>=1.26", TVM_FFI, "tokenizers>=0.20", "jinja2>=3.1", "typer>=0.15", "rich>=13.9"]
COMPILE = [TVM, "onnx>=1.18", "ml-dtypes>=0.5", "xgboost-cpu>=3.0"]
EXAMPLES = ["gguf>=0.17"]
REPORT = ["matplotlib>=3.8"]
# What TVM's RPC needs beside itself; `cluster` spreads builds over the machines of a dask cluster.
REMOTE = ["tornado>=6.4", "psutil>=5.9", "cloudpickle>=3.0"]
CLUSTER = ["distributed>=2024.5"]
# NVIDIA's runtime compiler, the headers that it includes, and the disassembler: versions that go together. `runtime` is
# also what TVM's CUDA runtime needs on the machine with the GPU.
CUDA_VERSION = "13.5.*"
CUDA = [f"nvidia-cuda-{part}=={CUDA_VERSION}" for part in ("nvrtc", "runtime", "crt", "nvdisasm")]
FUZZ = ["atheris>=3.0"]
TEST = [
    *COMPILE,
    *EXAMPLES,
    *REPORT,
    *REMOTE,
    *CLUSTER,
    *CUDA,
    "onnxruntime>=1.23",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "setuptools>=70",
    "hypothesis>=6.100",
    "safetensors>=0.4",
    "scipy>=1.12",
]
DEV = [*TEST, "ruff>=0.9", "mypy>=1.14"]

setup(
    name="llmc",
    version=VERSION,
    description="Compiles ONNX models, language models above all, into fast single-file artifacts",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir=package_dir,
    packages=packages,
    package_data={
        "llmc": ["py.typed"],
        "llmc.emulator": ["include/*.h", "runtime/*"],
        "llmc.report": ["*.j2"],
        "llmc.tuning_logs": ["*.jsonl"],
    },
    install_requires=RUN,
    extras_require={
        "compile": COMPILE,
        "examples": EXAMPLES,
        "report": REPORT,
        "remote": REMOTE,
        "cluster": CLUSTER,
        "cuda": CUDA,
        "fuzz": [*TEST, *FUZZ],
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["llmc = llmc.__main__:main"]},
)
