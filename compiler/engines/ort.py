"""onnxruntime, with caches bound in place of copies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from llmc.engines.base import ROOM, Engine, decoder_inputs
from llmc.errors import ModelError


class OnnxRuntimeEngine(Engine):
    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # its errors become ours
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise ModelError(f"onnxruntime cannot load it: {error}", where=str(path)) from error
        self.path = path
        self.arguments = {i.name: i for i in self.session.get_inputs()}
        self.inputs = tuple(self.arguments)
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.pasts = [name for name in self.inputs if name.startswith("past")]

    def call(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            results = self.session.run(None, dict(inputs))
        except Exception as error:
            raise ModelError(f"onnxruntime cannot run it: {error}", where=str(self.path)) from error
        return dict(zip(self.outputs, results, strict=True))

    def reset(self, batch: int = 1, room: int = ROOM) -> None:
        self.length = 0
        self.caches = {}
        for name in self.pasts:
            _, heads, _, size = self.arguments[name].shape
            self.caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), np.float32))

    def step(self, ids: np.ndarray) -> np.ndarray:
        binding = self.session.io_binding()
        for name, value in decoder_inputs(ids, self.length).items():
            if name in self.inputs:
                binding.bind_cpu_input(name, value)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        self.caches = dict(zip(self.pasts, presents, strict=True))
        self.length += ids.shape[1]
        return np.asarray(logits.numpy())
