"""What the tests of com.microsoft's operators share: random inputs, and a case in that domain."""

from functools import partial

import numpy as np

from .harness import case

MS = "com.microsoft"
ms = partial(case, domain=MS)


class Random:
    """Arrays by type; each file has a generator of its own, so that its cases do not depend on another's."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def f32(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def f16(self, *shape: int) -> np.ndarray:
        return self.f32(*shape).astype(np.float16)

    def u8(self, *shape: int, high: int = 256) -> np.ndarray:
        return self.rng.integers(0, high, shape).astype(np.uint8)

    def i8(self, *shape: int) -> np.ndarray:
        return self.rng.integers(-128, 128, shape).astype(np.int8)

    def i32(self, high: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, high, shape).astype(np.int32)

    def scales(self, *shape: int) -> np.ndarray:
        return (self.rng.random(shape) * 0.1 + 0.01).astype(np.float32)
