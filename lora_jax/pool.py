"""Many adapters, of which a few are in memory at a time, for a program that never retraces.

The adapters in memory are in the slots of one stack. Its structure and shapes never change
(:mod:`lora_jax.form`), and its arrays are never written to: to load an adapter makes new arrays, in
which one slot differs. Who has the arrays of before has them as they were.

One lock guards which name is in which slot. Nobody holds it who reads a file or waits; the update
of a slot is in it, since of two updates of the same stack one would be lost, and is compiled when
the pool is made. A request takes all the slots that it needs at once or none, so that no two
requests can wait for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.folders import from_folders
from lora_jax.form import Form
from lora_jax.mixed import BASE
from lora_jax.tensors import StrPath


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


class AdapterPool:
    """Adapters by name, the last used ones of them in memory, for batches of mixed requests.

    Safe under threads. An adapter that is in use is neither evicted nor changed.

    Args:
      params: the model's parameters, all of them.
      like: adapters, or a list of them, that the others are like: together they have every target,
        every leaf trained whole, the largest rank, and DoRA if any has it. Any scale, smaller rank
        and part of the targets fits then. What was not in ``like`` is refused when it is loaded.
        DoRA's norm is computed once, as by :func:`lora_jax.freeze_norm`, and adapter dropout is
        off: the pool is for inference.
      slots: how many adapters are in memory at most.
      max_bytes: or how many bytes the stack may have. While a slot is changed there are two stacks,
        and as many more as older ones are still held.
      root: a folder with a folder for each adapter, of :func:`lora_jax.save` or of PEFT.
      names: for PEFT's files, as for :func:`lora_jax.peft.load`.
      axes: likewise.
      load: instead of ``root``, a function that gives the adapters of a name. Several threads may
        call it at once, but not for one name. What it raises goes to all who wait for that name,
        and is not remembered. Without ``root`` and ``load`` there is only what was :meth:`put`.

    Raises:
      TypeError: ``params`` or ``like`` of another kind.
      ValueError: examples that do not fit the model; arguments that exclude each other; not one
        adapter fits ``max_bytes``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax
      >>> model, x = nn.Dense(3), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> def load(name):  # of rank 1 to 3
      ...     config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=len(name))])
      ...     return lora_jax.lora_init(jax.random.key(1), params, config)[1]
      >>> pool = lora_jax.AdapterPool(params, like=load("abc"), slots=2, load=load)
      >>> with pool.use(["ab", None, "c", "ab"]) as (stacked, ids):
      ...     y = lora_jax.lora_apply(model, {"params": params}, stacked, x, adapter_ids=ids)
      >>> y.shape, pool.resident, pool.stats
      ((4, 3), ('ab', 'c'), PoolStats(hits=0, loads=2, evictions=0))
    """

    def __init__(
        self,
        params: chex.ArrayTree,
        like: Any,
        *,
        slots: int | None = None,
        max_bytes: int | None = None,
        root: StrPath | None = None,
        names: Any = None,
        axes: Any = None,
        load: Callable[[str], chex.ArrayTree] | None = None,
    ) -> None:
        if (slots is None) == (max_bytes is None):
            raise ValueError("Say how much is in memory, either by slots= or by max_bytes=.")
        if root is not None and load is not None:
            raise ValueError("Say where adapters come from, by root= or by load=, not by both.")
        if root is None and (names is not None or axes is not None):
            raise ValueError("names= and axes= are for the files in root=, which is not given.")
        self._form = Form(params, like)
        one = self._form.nbytes
        count = slots if slots is not None else (max_bytes or 0) // one
        if count < 1:
            raise ValueError(
                f"Not one adapter fits the pool: one has {one} bytes, and slots={slots}, "
                f"max_bytes={max_bytes}."
            )
        self._load = load
        if root is not None:
            self._load = from_folders(root, params, names=names, axes=axes)
        self._free = list(range(count))
        self._resident: OrderedDict[str, _Entry] = OrderedDict()  # the last used one last
        self._loads: dict[str, _Load] = {}
        self._stats = PoolStats()
        self._changed = threading.Condition()
        nothing = jax.device_put(self._form.base_alone())
        self._index = [jax.device_put(np.int32(slot)) for slot in range(count)]
        stacked = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), nothing)
        self._stacked = _updated(stacked, nothing, self._index[0])  # compiles it

    @property
    def slots(self) -> int:
        """How many adapters there is room for."""
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of the stack, which is of one size whatever is in it."""
        return self.slots * self._form.nbytes

    @property
    def resident(self) -> tuple[str, ...]:
        """The names in memory, from the one used longest ago to the one used last."""
        with self._changed:
            return tuple(self._resident)

    @property
    def stats(self) -> PoolStats:
        """Counts since the pool was made."""
        with self._changed:
            return self._stats

    @property
    def stacked(self) -> chex.ArrayTree:
        """The stack as it is now, in which a :class:`Lease` has its ``id``."""
        with self._changed:
            return self._stacked

    @contextlib.contextmanager
    def use(
        self, names: Sequence[str | None], *, timeout: float | None = 30.0
    ) -> Iterator[tuple[chex.ArrayTree, np.ndarray]]:
        """The stack and the ids for a batch, whose adapters stay in memory until the end of it.

        Requests that wait are not in a queue: one for many slots may wait longer than one for few.

        Args:
          names: of the adapter of each row; ``None`` for the base alone.
          timeout: seconds to wait while others use too many slots, or load the same adapters;
            ``None`` for ever.

        Returns:
          A context manager that gives ``(stacked, ids)``, for ``lora_apply(..., adapter_ids=ids)``.
          The ids are ``int32`` of shape ``(len(names),)``. Both stay valid after it.

        Raises:
          TimeoutError: other requests did not give their slots back.
          ValueError: more names than slots, or an adapter that does not fit. And what loading one
            raises.
        """
        if isinstance(names, str):
            raise TypeError(f"use takes a list of names, one for each row, not {names!r}.")
        names = list(names)
        entries, stacked = self._take(names, timeout)
        try:
            slots = [BASE if name is None else entries[name].slot for name in names]
            yield stacked, np.array(slots, np.int32)
        finally:
            self._give_back(entries.values())

    def acquire(self, name: str | None, *, timeout: float | None = 30.0) -> Lease:
        """Holds one adapter in memory, for a row that lasts over many batches.

        Args:
          name: of the adapter; ``None`` for the base alone.
          timeout: as for :meth:`use`.

        Returns:
          A lease, to be released. While it is not, its ``id`` is that of the adapter in every
          :attr:`stacked` from now on.

        Raises:
          As :meth:`use`.
        """
        entries, _ = self._take([name], timeout)
        if name is None:
            return Lease(None, BASE, lambda: None)
        entry = entries[name]
        return Lease(name, entry.slot, lambda: self._give_back([entry]))

    def put(self, name: str, adapters: chex.ArrayTree, *, timeout: float | None = 30.0) -> None:
        """Adds an adapter, or replaces the one of that name, in memory only.

        Requests that use the old one go on with it, and its slot is free when the last of them
        ends; who asks for the name from now on gets the new one. Evicted, it is gone, and the name
        is loaded as others are: save it first to keep it.

        Args:
          name: any name.
          adapters: as from :func:`lora_jax.load`.
          timeout: seconds to wait for a slot while all are in use.

        Raises:
          TimeoutError: all slots stayed in use.
          TypeError: no tree of adapters.
          ValueError: adapters that do not fit.
        """
        _check_name(name)
        tree, deadline = self._formed(name, adapters), _deadline(timeout)
        with self._changed:
            while True:
                old = self._resident.get(name)
                if (old is not None and not old.uses) or self._room(()):
                    break
                self._wait(deadline, f"put {name!r}")
            self._forget(name)
            self._place(name, tree, ())

    def remove(self, name: str) -> bool:
        """Drops an adapter from memory, so that it is loaded when it is asked for next.

        Requests that use it go on with it.

        Returns:
          Whether it was in memory.
        """
        with self._changed:
            return self._forget(name)

    # --- what is done with the lock held, but for loading ---

    def _take(
        self, names: Sequence[str | None], timeout: float | None
    ) -> tuple[dict[str, _Entry], chex.ArrayTree]:
        """Pins the adapters of the names, all at once, and loads those that are not there."""
        for name in names:
            if name is not None:
                _check_name(name)
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        if len(wanted) > self.slots:
            raise ValueError(
                f"{len(wanted)} adapters are asked for at once, and the pool has {self.slots} "
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
                        return entries, self._stacked
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
            load.tree = self._formed(name, self._load(name))
        except Exception as error:
            load.error = error
        finally:
            with self._changed:
                load.outdated |= load.tree is None and load.error is None  # interrupted
                if load.tree is None and self._loads.get(name) is load:
                    del self._loads[name]
                self._count(loads=int(load.tree is not None))
                self._changed.notify_all()

    def _formed(self, name: str, adapters: chex.ArrayTree) -> chex.ArrayTree:
        return jax.device_put(self._form.fit(name, adapters))

    def _room(self, keep: Sequence[str]) -> int:
        """How many slots could be had without those that are in use, or of these names."""
        unused = (name for name, entry in self._resident.items() if not entry.uses)
        return len(self._free) + sum(name not in keep for name in unused)

    def _place(self, name: str, tree: chex.ArrayTree, keep: Sequence[str]) -> None:
        """Writes an adapter into a slot, for which there must be room."""
        if not self._free:
            oldest = next(n for n, e in self._resident.items() if not e.uses and n not in keep)
            self._free.append(self._resident.pop(oldest).slot)
            self._count(evictions=1)
        slot = self._free[-1]
        self._stacked = _updated(self._stacked, tree, self._index[slot])
        self._free.pop()
        self._resident[name] = _Entry(name, slot)
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

    def _give_back(self, entries: Any) -> None:
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
        used = self.slots - self._room(())
        raise TimeoutError(
            f"It took too long to {what}: {used} of {self.slots} slots are in use. Release leases "
            f"that are not needed, make the pool larger, or wait longer, timeout=."
        )

    def _count(self, **more: int) -> None:
        self._stats = PoolStats(*(n + more.get(k, 0) for k, n in self._stats._asdict().items()))


class Lease:
    """An adapter that stays in memory until it is released. Also a context manager.

    Attributes:
      name: of the adapter; ``None`` for the base.
      id: in :attr:`AdapterPool.stacked`.
    """

    def __init__(self, name: str | None, id_: int, release: Callable[[], None]) -> None:
        self.name, self.id = name, id_
        self._release = [release]

    def release(self) -> None:
        """Gives the slot back; again, does nothing."""
        with contextlib.suppress(IndexError):  # pop is atomic
            self._release.pop()()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


@dataclasses.dataclass(eq=False)
class _Entry:
    """An adapter in a slot, and how many use it. One that was replaced lasts while it is used."""

    name: str
    slot: int
    uses: int = 0


@dataclasses.dataclass(eq=False)
class _Load:
    """An adapter that is being loaded, or is loaded and waits for a slot."""

    waiting: int = 0
    tree: Any = None
    error: Exception | None = None
    outdated: bool = False


@jax.jit
def _updated(stacked: chex.ArrayTree, one: chex.ArrayTree, slot: chex.Array) -> chex.ArrayTree:
    """The stack with another adapter in a slot. It is a copy: others may still have the old one."""
    return jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, slot, 0), stacked, one
    )


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"The name of adapters must be a string, got {name!r}.")


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
