"""Results that are kept for reuse, as many as a number of bytes holds."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor

T = TypeVar("T")


class BoundedCache(Generic[T]):
    """A function that remembers its results; of those beyond a limit the ones that were used last stay.

    Results may grow, as tables do that are made when they are first needed: an entry is measured when it comes, and
    again when the next one does. The newest entry stays, however large.

    Args:
        function: What is remembered; its arguments are hashable.
        limit: Bytes of arrays and tensors.
        most: Entries.

    Example:
        >>> squares = BoundedCache(lambda n: np.zeros(n), limit=100, most=8)
        >>> first = squares(10); squares(10) is first, squares.nbytes
        (True, 80)
        >>> second = squares(5); squares(10) is first, squares.nbytes
        (False, 80)
    """

    def __init__(self, function: Callable[..., T], limit: int, most: int) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self.limit, self.most = limit, most
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, T] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}

    def __call__(self, *arguments: Hashable, **options: Hashable) -> T:
        """Return the result, computed or remembered."""
        key = arguments, *options.items()
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        result = self._function(*arguments, **options)
        with self._lock:
            self._add(key, result)
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered, as measured last."""
        return sum(self._sizes.values())

    def cache_clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._sizes.clear()

    def _add(self, key: Hashable, result: T) -> None:
        if self._sizes:
            latest = next(reversed(self._sizes))
            self._sizes[latest] = nbytes_of(self._entries[latest])
        self._entries[key], self._sizes[key] = result, nbytes_of(result)
        while len(self._entries) > 1 and (len(self._entries) > self.most or self.nbytes > self.limit):
            oldest, _ = self._entries.popitem(last=False)
            del self._sizes[oldest]


def bounded_cache(limit: int, most: int) -> Callable[[Callable[..., T]], BoundedCache[T]]:
    """Decorate a function with a :class:`BoundedCache`."""
    return lambda function: BoundedCache(function, limit, most)


def nbytes_of(x: Any) -> int:
    """Return the bytes of all arrays and tensors in an object, its fields and its containers.

    Example:
        >>> array = np.zeros(4)
        >>> nbytes_of({"one": array, "same": (array, array[1:])})
        32
    """
    return _nbytes(x, set())


def _nbytes(x: Any, seen: set[int]) -> int:
    if isinstance(x, np.ndarray) and isinstance(x.base, np.ndarray):
        x = x.base  # of a view
    address = id(x)
    if isinstance(x, np.ndarray):
        address = x.ctypes.data
    elif isinstance(x, Tensor):
        address = x.untyped_storage().data_ptr()
    if address in seen:
        return 0
    seen.add(address)
    if isinstance(x, np.ndarray):
        return int(x.nbytes)
    if isinstance(x, Tensor):
        return x.untyped_storage().nbytes()
    if isinstance(x, dict):
        x = list(x.values())  # at once: others may add to it
    elif hasattr(x, "__dict__"):
        x = list(vars(x).values())
    return sum(_nbytes(part, seen) for part in x) if isinstance(x, list | tuple) else 0
