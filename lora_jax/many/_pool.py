"""Many adapters with a few of them in memory at a time, for a program that never retraces.

The adapters in memory are in the slots of one stack (``_lru_slots.py``). Its structure and shapes
never change (``_structure.py``), and its arrays are never written to: to load an adapter makes new
arrays, in which one slot differs. Whoever holds the old arrays has them as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax.core.products._row_ids import BASE
from lora_jax.files._bytes import StrPath
from lora_jax.many._folders import from_folders
from lora_jax.many._lru_slots import LruSlots, PoolStats, check_adapter_name
from lora_jax.many._structure import AdapterStructure
from lora_jax.trees._shardings import follow_base


class AdapterPool:
    """Adapters by name, the last used ones of them in memory, for batches of mixed requests.

    Safe under threads. An adapter that is in use is neither evicted nor changed.

    Args:
      params: the model's parameters, all of them.
      like: adapters, or a list of them, that the others are like: together they have every target,
        every fully trained leaf, the largest rank, and DoRA if any has it. Any scale, smaller rank
        and part of the targets fits then. What was not in ``like`` is refused when it is loaded.
        DoRA's norm is computed once, as by :func:`lora_jax.cache_norm`, and adapter dropout is
        off: the pool is for inference.
      slots: how many adapters are in memory at most.
      max_bytes: or how many bytes the stack may have. While a slot is changed there are two stacks,
        and as many more as older ones are still held.
      root: a folder with a folder for each adapter, of :func:`lora_jax.save` or of PEFT. One that
        has other collections of the model too is refused, as a batch has one of each.
      names: for PEFT's files, as for :func:`lora_jax.peft.load`.
      axes: likewise.
      load: instead of ``root``, a function that gives the adapters of a name. Several threads may
        call it at once, but not for one name. What it raises goes to all who wait for that name,
        and is not remembered. Without ``root`` and ``load`` there is only what was :meth:`put`.

    Raises:
      TypeError: if ``params`` or ``like`` is of another kind.
      ValueError: if examples do not fit the model, if arguments exclude each other, or if not one
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
        self._structure = AdapterStructure(params, like)
        one = self._structure.nbytes
        count = slots if slots is not None else (max_bytes or 0) // one
        if count < 1:
            raise ValueError(
                f"Not one adapter fits the pool: one has {one} bytes, and slots={slots}, "
                f"max_bytes={max_bytes}."
            )
        source = load
        if root is not None:
            source = from_folders(root, params, names=names, axes=axes)
        self._base = params
        nothing = self._placed(self._structure.base_alone())
        stacked = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), nothing)
        stacked = follow_base(stacked, params)
        update = _update_on(stacked)
        index = [jax.device_put(np.int32(slot)) for slot in range(count)]
        self._slots = LruSlots(
            count,
            update(stacked, nothing, index[0]),  # compiles it
            update=lambda stacked, tree, slot: update(stacked, tree, index[slot]),
            load=None if source is None else lambda name: self._conformed(name, source(name)),
        )

    @property
    def slots(self) -> int:
        """How many adapters there is room for."""
        return self._slots.count

    @property
    def nbytes(self) -> int:
        """Bytes of the stack, which is of one size whatever is in it."""
        return self.slots * self._structure.nbytes

    @property
    def resident(self) -> tuple[str, ...]:
        """The names in memory, from the one used longest ago to the one used last."""
        return self._slots.names()

    @property
    def stats(self) -> PoolStats:
        """Counts since the pool was made."""
        return self._slots.stats

    @property
    def stacked(self) -> chex.ArrayTree:
        """The stack as it is now, in which a :class:`Lease` has its ``id``."""
        return self._slots.value

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
          TimeoutError: if other requests did not give their slots back.
          ValueError: if there are more names than slots, or if an adapter does not fit. And what
            loading one raises.
        """
        if isinstance(names, str):
            raise TypeError(f"use takes a list of names, one for each row, not {names!r}.")
        names = list(names)
        entries, stacked = self._slots.take(names, timeout)
        try:
            slots = [BASE if name is None else entries[name].slot for name in names]
            yield stacked, np.array(slots, np.int32)
        finally:
            self._slots.give_back(entries.values())

    def acquire(self, name: str | None, *, timeout: float | None = 30.0) -> Lease:
        """Holds one adapter in memory, for a row that lasts over many batches.

        Args:
          name: of the adapter; ``None`` for the base alone.
          timeout: as for :meth:`use`.

        Returns:
          A lease, to be released. While it is not, its ``id`` is that of the adapter in every
          :attr:`stacked` from now on.

        Raises:
          TimeoutError: if other requests did not give their slots back.
          ValueError: if the adapter does not fit. And what loading it raises.
        """
        entries, _ = self._slots.take([name], timeout)
        if name is None:
            return Lease(None, BASE, lambda: None)
        entry = entries[name]
        return Lease(name, entry.slot, lambda: self._slots.give_back([entry]))

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
          TimeoutError: if all slots stayed in use.
          TypeError: if it is not a tree of adapters.
          ValueError: if the adapters do not fit.
        """
        check_adapter_name(name)
        self._slots.put(name, self._conformed(name, adapters), timeout)

    def remove(self, name: str) -> bool:
        """Drops an adapter from memory, so that it is loaded when it is asked for next.

        Requests that use it go on with it.

        Returns:
          Whether it was in memory.
        """
        return self._slots.remove(name)

    def _conformed(self, name: str, adapters: chex.ArrayTree) -> chex.ArrayTree:
        return self._placed(self._structure.fit(name, adapters))

    def _placed(self, adapters: chex.ArrayTree) -> chex.ArrayTree:
        """The adapters on the devices of the base."""
        return jax.device_put(follow_base(adapters, self._base))


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


def _update_on(stacked: chex.ArrayTree) -> Any:
    """The function that changes a stack, which stays where it is."""
    where = jax.tree.map(lambda array: array.sharding, stacked)
    if any(isinstance(one, NamedSharding) for one in jax.tree.leaves(where)):
        return jax.jit(_with_another, out_shardings=where)
    return _updated


def _with_another(stacked: chex.ArrayTree, one: chex.ArrayTree, slot: chex.Array) -> chex.ArrayTree:
    """The stack with another adapter in a slot. It is a copy: others may still have the old one."""
    return jax.tree.map(
        lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, slot, 0), stacked, one
    )


_updated = jax.jit(_with_another)
