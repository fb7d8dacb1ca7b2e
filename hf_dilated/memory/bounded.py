"""Results that are kept for reuse, as many as a number of bytes holds."""

import functools
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

Part = tuple[int, int]  # address and bytes of what an array or a tensor lies in

AGAIN = 8  # all entries are measured again when one in so many is new: a miss costs as much as so many measurements
HOLD_NOTHING: frozenset[type] = frozenset({bool, int, float, str, range, type(None), torch.device, torch.dtype})


@dataclass
class _Entry(Generic[T]):
    result: T
    parts: set[Part] = field(default_factory=set)


class BoundedCache(Generic[T]):
    """A function that remembers its results; of those beyond a limit the ones that were used last stay.

    Arguments are kept with their results, and count as these do; what several entries share counts once. If they grow,
    as tables do that are made when they are first needed, all entries are measured again with every new one while they
    are few, and while they are many, with every so many new ones. The newest entry stays, however large.

    Args:
        function: What is remembered; its arguments are hashable.
        limit: Bytes of arrays, tensors and byte strings.
        most: Entries.
        grows: Whether arguments hold anything, or results grow; if not, results alone are measured, once.

    Example:
        >>> squares = BoundedCache(lambda n: np.zeros(n), limit=100, most=8)
        >>> first = squares(10); squares(10) is first, squares.nbytes
        (True, 80)
        >>> second = squares(5); squares(10) is first, squares.nbytes
        (False, 80)
    """

    def __init__(self, function: Callable[..., T], limit: int, most: int, grows: bool = True) -> None:
        functools.update_wrapper(self, function)
        self._function, self._grows = function, grows
        self.limit, self.most = limit, most
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._users: Counter[Part] = Counter()  # entries that hold a part
        self._nbytes = self._new = 0

    def __call__(self, *arguments: Hashable, **options: Hashable) -> T:
        """Return the result, computed or remembered."""
        key = arguments, *options.items()
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key].result
        result = self._function(*arguments, **options)
        with self._lock:
            return self._add(key, result)

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered, as measured last."""
        return self._nbytes

    def cache_clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._users.clear()
            self._nbytes = self._new = 0

    def _add(self, key: Hashable, result: T) -> T:
        if key in self._entries:  # another thread was faster, and others use its result
            self._entries.move_to_end(key)
            return self._entries[key].result
        self._entries[key] = _Entry(result)
        self._new += 1
        if self._grows and AGAIN * self._new >= len(self._entries):
            self._new = 0
            for of_key, entry in self._entries.items():
                self._hold(entry, _parts((of_key, entry.result)))
        else:
            self._hold(self._entries[key], _parts((key, result) if self._grows else result))
        while len(self._entries) > 1 and (len(self._entries) > self.most or self._nbytes > self.limit):
            _, oldest = self._entries.popitem(last=False)
            self._hold(oldest, set())
        return result

    def _hold(self, entry: _Entry[T], parts: set[Part]) -> None:
        """Count the parts of an entry instead of those that it had before."""
        for part in parts - entry.parts:
            self._nbytes += part[1] * (self._users[part] == 0)
            self._users[part] += 1
        for part in entry.parts - parts:
            self._users[part] -= 1
            if not self._users[part]:
                del self._users[part]
                self._nbytes -= part[1]
        entry.parts = parts


def bounded_cache(limit: int, most: int, *, grows: bool = True) -> Callable[[Callable[..., T]], BoundedCache[T]]:
    """Decorate a function with a :class:`BoundedCache`."""
    return lambda function: BoundedCache(function, limit, most, grows)


def nbytes_of(x: Any) -> int:
    """Return the bytes of all arrays, tensors and byte strings in an object, its fields and its containers.

    Example:
        >>> array = np.zeros(4)
        >>> nbytes_of({"one": array, "same": (array, array[1:])})
        32
    """
    return sum(size for _, size in _parts(x))


def _parts(x: Any) -> set[Part]:
    found: set[Part] = set()
    _find(x, found, set())
    return found


def _find(x: Any, found: set[Part], seen: set[int]) -> None:
    if isinstance(x, np.ndarray):
        whole = x.base if isinstance(x.base, np.ndarray) else x  # of a view
        found.add((whole.ctypes.data, whole.nbytes))
    elif isinstance(x, Tensor):
        storage = x.untyped_storage()
        found.add((storage.data_ptr(), storage.nbytes()))
    elif isinstance(x, bytes):
        found.add((id(x), len(x)))
    elif id(x) not in seen:
        seen.add(id(x))
        for part in _inside(x):
            if type(part) not in HOLD_NOTHING:
                _find(part, found, seen)


def _inside(x: Any) -> Iterable[Any]:
    if isinstance(x, dict):
        return list(x.values())  # at once: others may add to it
    if isinstance(x, list | tuple):
        return () if HOLD_NOTHING.issuperset(map(type, x)) else x
    return list(vars(x).values()) if hasattr(x, "__dict__") and not isinstance(x, type) else ()
