"""Which of many things, by name, are in one of a few places: the rules of a pool, without arrays.

One lock guards which name is in which slot. Nobody holds it who loads or waits; the update of a
slot is in it, since of two updates of the same value one would be lost. A request takes all the
slots that it needs at once or none, so that no two requests can wait for each other.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class PoolStats(NamedTuple):
    """What a pool has done so far.

    Attributes:
      hits: names asked for that were in memory.
      loads: adapters that were loaded.
      evictions: adapters that made room for others.
    """

    hits: int = 0
    loads: int = 0
    evictions: int = 0


@dataclasses.dataclass(eq=False)
class Entry:
    """An adapter in a slot, and how many use it. One that was replaced lasts while it is used."""

    name: str
    slot: int
    uses: int = 0


class LruSlots:
    """Slots of a value, which every update replaces by another value.

    Args:
      count: how many slots there are.
      value: at the start.
      update: gives a new value from the value, what is loaded, and the slot that it shall be in.
      load: gives what has a name; ``None`` if all is put.

    Example:
      >>> slots = LruSlots(2, "--", lambda v, x, i: v[:i] + x + v[i + 1 :], load=str.upper)
      >>> taken, value = slots.take(["a", "b"], timeout=None)
      >>> sorted(value)
      ['A', 'B']
      >>> slots.give_back([taken["a"]])
      >>> slots.put("c", "C", timeout=0)
      >>> slots.names(), sorted(slots.value)
      (('b', 'c'), ['B', 'C'])
    """

    def __init__(
        self,
        count: int,
        value: Any,
        update: Callable[[Any, Any, int], Any],
        load: Callable[[str], Any] | None,
    ) -> None:
        self.count = count
        self._value, self._update, self._load = value, update, load
        self._free = list(range(count))
        self._resident: OrderedDict[str, Entry] = OrderedDict()  # the last used one last
        self._loads: dict[str, _Load] = {}
        self._stats = PoolStats()
        self._changed = threading.Condition()

    @property
    def value(self) -> Any:
        """The value as it is now."""
        with self._changed:
            return self._value

    @property
    def stats(self) -> PoolStats:
        """Counts since the start."""
        with self._changed:
            return self._stats

    def names(self) -> tuple[str, ...]:
        """The names in a slot, the one used last at the end."""
        with self._changed:
            return tuple(self._resident)

    def put(self, name: str, tree: Any, timeout: float | None) -> None:
        """Adds or replaces; what is in use stays in its slot, and the new one goes into another."""
        deadline = _deadline(timeout)
        with self._changed:
            while True:
                old = self._resident.get(name)
                if (old is not None and not old.uses) or self._room(()):
                    break
                self._wait(deadline, f"put {name!r}")
            self._forget(name)
            self._place(name, tree, ())

    def remove(self, name: str) -> bool:
        """Forgets what has a name; whether there was any."""
        with self._changed:
            return self._forget(name)

    def take(
        self, names: Sequence[str | None], timeout: float | None
    ) -> tuple[dict[str, Entry], Any]:
        """Pins the adapters of the names, all at once, and loads those that are not there."""
        for name in names:
            if name is not None:
                check_adapter_name(name)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if len(wanted) > self.count:
            raise ValueError(
                f"{len(wanted)} adapters are asked for at once, and the pool has {self.count} "
                f"slots: make it larger, or the batch smaller."
            )
        deadline, held = _deadline(timeout), dict[str, _Load]()
        with self._changed:
            self._count(hits=sum(name in self._resident for name in wanted))
        try:
            while True:
                with self._changed:
                    new = self._step(wanted, held, deadline)
                    if new is None:
                        entries = {name: self._resident[name] for name in wanted}
                        for name, entry in entries.items():
                            entry.uses += 1
                            self._resident.move_to_end(name)
                        return entries, self._value
                self._run(new, held[new])
        finally:
            with self._changed:
                for name, load in held.items():
                    self._leave(name, load)

    def _step(
        self, wanted: Sequence[str], held: dict[str, _Load], deadline: float | None
    ) -> str | None:
        """Waits until there is something to load, and says its name, or until all are resident."""
        while True:
            for name in [name for name, load in held.items() if load.outdated]:
                self._leave(name, held.pop(name))
            absent = [name for name in wanted if name not in self._resident]
            for name in absent:
                if name in held and (error := held[name].error) is not None:
                    raise error
            if len(absent) > self._room(wanted):
                # Before anything is loaded, so that what waits takes no memory.
                self._wait(deadline, f"use {len(wanted)} adapters")
                continue
            new = next((name for name in absent if name not in held), None)
            if new is not None:
                mine = new not in self._loads
                held[new] = self._loads.setdefault(new, _Load())
                held[new].waiting += 1
                if mine:
                    return new
            elif any(held[name].tree is None for name in absent):
                self._wait(deadline, f"use {absent[0]!r}, which another thread is loading")
            else:
                for name in absent:
                    self._place(name, held[name].tree, wanted)
                return None

    def _run(self, name: str, load: _Load) -> None:
        """Loads, without the lock."""
        try:
            if self._load is None:
                raise LookupError(
                    f"There are no adapters {name!r} in the pool, which was made without root= and "
                    f"load=: pool.put({name!r}, adapters)."
                )
            load.tree = self._load(name)
        except Exception as error:
            load.error = error
        finally:
            with self._changed:
                load.outdated |= load.tree is None and load.error is None  # interrupted
                if load.tree is None and self._loads.get(name) is load:
                    del self._loads[name]
                self._count(loads=int(load.tree is not None))
                self._changed.notify_all()

    def _room(self, keep: Sequence[str]) -> int:
        """How many slots could be had without those that are in use, or of these names."""
        unused = (name for name, entry in self._resident.items() if not entry.uses)
        return len(self._free) + sum(name not in keep for name in unused)

    def _place(self, name: str, tree: Any, keep: Sequence[str]) -> None:
        """Writes an adapter into a slot, for which there must be room."""
        if not self._free:
            oldest = next(n for n, e in self._resident.items() if not e.uses and n not in keep)
            self._free.append(self._resident.pop(oldest).slot)
            self._count(evictions=1)
        slot = self._free[-1]
        self._value = self._update(self._value, tree, slot)
        self._free.pop()
        self._resident[name] = Entry(name, slot)
        self._loads.pop(name, None)
        self._changed.notify_all()

    def _forget(self, name: str) -> bool:
        if (load := self._loads.pop(name, None)) is not None:
            load.outdated = True  # it may have read what is no longer there
        entry = self._resident.pop(name, None)
        if entry is not None and not entry.uses:
            self._free.append(entry.slot)
        self._changed.notify_all()
        return entry is not None

    def give_back(self, entries: Iterable[Entry]) -> None:
        """Ends a use of each."""
        with self._changed:
            for entry in entries:
                entry.uses -= 1
                if not entry.uses and self._resident.get(entry.name) is not entry:
                    self._free.append(entry.slot)
            self._changed.notify_all()

    def _leave(self, name: str, load: _Load) -> None:
        load.waiting -= 1
        if not load.waiting and self._loads.get(name) is load:
            del self._loads[name]

    def _wait(self, deadline: float | None, what: str) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is None or left > 0:
            self._changed.wait(left)
            return
        used = self.count - self._room(())
        raise TimeoutError(
            f"It took too long to {what}: {used} of {self.count} slots are in use. Release leases "
            f"that are not needed, make the pool larger, or wait longer, timeout=."
        )

    def _count(self, **more: int) -> None:
        self._stats = PoolStats(*(n + more.get(k, 0) for k, n in self._stats._asdict().items()))


@dataclasses.dataclass(eq=False)
class _Load:
    """An adapter that is being loaded, or is loaded and waits for a slot."""

    waiting: int = 0
    tree: Any = None
    error: Exception | None = None
    outdated: bool = False


def check_adapter_name(name: Any) -> None:
    """Raises TypeError if it is not a name."""
    if not isinstance(name, str):
        raise TypeError(f"The name of adapters must be a string, got {name!r}.")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
