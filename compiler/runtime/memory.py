"""Where a model's arrays lie: in the host's memory, where numpy's arrays are all that is needed, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmc.runtime.arrays import aligned, aligned_zeros, to_numpy, to_tensor

Array = Any  # np.ndarray in the host's memory, DeviceArray on a GPU


class Stage(Protocol):
    """Small arrays that the host writes before every call."""

    @property
    def tensors(self) -> list[Any]:
        """As a function takes them."""

    def send(self) -> None:
        """Have the function see what the arrays hold now."""


class Memory(Protocol):
    """Where weights, caches, inputs and outputs lie."""

    on_device: bool  # or the host's: views of one memory, and nothing to copy

    def put(self, array: np.ndarray) -> Any:
        """The runtime's tensor of an array."""

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        """The array of a tensor, whose elements are of `dtype`, where its own type does not say it."""

    def bound(self, code: Any) -> Callable[..., Any]:
        """Compiled code, to be called. Its results may be there only once they are asked for."""

    def demand(self, size: int, what: str) -> None:
        """Raises InputError where there are no `size` bytes left for `what`, as far as is known."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """A new array, which is indexed by numbers and by slices without steps; what that gives is a view."""

    def tensor(self, array: Array) -> Any:
        """The runtime's tensor of an array whose elements lie side by side."""

    def copy(self, target: Array, source: Array) -> None:
        """Write one view to another of its shape; they may overlap."""

    def clear(self, array: Array) -> None:
        """Write zeros."""

    def edit(self, views: Sequence[Array]) -> AbstractContextManager[list[np.ndarray]]:
        """The views as arrays of numpy's, which may be written until the end of the context."""

    def edit_rows(
        self, arrays: Sequence[Array], numbers: np.ndarray
    ) -> AbstractContextManager[tuple[list[np.ndarray], np.ndarray]]:
        """As `edit` does, of the rows `numbers` [n] of all arrays; and the rows' numbers [n] in what that gives."""

    def stage(self, arrays: Sequence[np.ndarray]) -> Stage:
        """Has the host's `arrays` go to a function again and again."""


@dataclass(frozen=True)
class HostStage:
    """Functions read the arrays themselves."""

    tensors: list[Any]

    def send(self) -> None:
        """Nothing to do."""


class HostMemory:
    """Tensors share the arrays' memory."""

    on_device = False

    def put(self, array: np.ndarray) -> Any:
        return to_tensor(aligned(array))

    def get(self, tensor: Any, dtype: str) -> np.ndarray:
        return to_numpy(tensor, dtype)

    def bound(self, code: Any) -> Any:
        return code

    def demand(self, size: int, what: str) -> None:
        """The system gives memory out as it is written."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return aligned_zeros(shape, dtype)

    def tensor(self, array: np.ndarray) -> Any:
        return to_tensor(array)

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def clear(self, array: np.ndarray) -> None:
        array[...] = 0

    @contextmanager
    def edit(self, views: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        yield list(views)

    @contextmanager
    def edit_rows(
        self, arrays: Sequence[np.ndarray], numbers: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        yield list(arrays), numbers

    def stage(self, arrays: Sequence[np.ndarray]) -> HostStage:
        return HostStage([to_tensor(array) for array in arrays])


HOST = HostMemory()
