"""NVIDIA GPUs on the CPU: generated CUDA C runs under judgement (README.md), for tests and `llmc check --emulate`."""
