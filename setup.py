"""Packaging of llmc: `compiler/` is the package `llmc`, `schedules/`, `targets/` and `tuning_logs/` are inside it."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ROOMS = {"llmc": "compiler", "llmc.schedules": "schedules", "llmc.targets": "targets", "llmc.tuning_logs": "tuning_logs"}

package_dir = dict(ROOMS)
packages = list(ROOMS)
for name, folder in ROOMS.items():
    for sub in find_packages(str(ROOT / folder)):
        package_dir[f"{name}.{sub}"] = f"{folder}/{sub.replace('.', '/')}"
        packages.append(f"{name}.{sub}")

RUN = ["numpy>=1.26", "apache-tvm-ffi==0.1.14.post1", "apache-tvm==0.27.0.post1", "tokenizers>=0.20", "jinja2>=3.1"]
COMPILE = ["onnx>=1.18", "ml-dtypes>=0.5", "networkx>=3.2", "xgboost-cpu>=3.0", "psutil>=6", "cloudpickle>=3", "safetensors>=0.4"]
CLI = ["typer>=0.15", "rich>=13.9"]
TEST = ["pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "onnxruntime>=1.20"]
DEV = ["ruff>=0.9", "mypy>=1.14"]

setup(
    name="llmc",
    version="0.1.0",
    description="Compile ONNX models, large language models above all, into tuned artifacts",
    python_requires=">=3.11",
    package_dir=package_dir,
    packages=packages,
    package_data={"llmc": ["py.typed"], "llmc.tuning_logs": ["*.jsonl"]},
    install_requires=RUN + COMPILE + CLI,
    extras_require={"test": TEST, "dev": TEST + DEV},
    entry_points={"console_scripts": ["llmc = llmc.cli:main"]},
)
