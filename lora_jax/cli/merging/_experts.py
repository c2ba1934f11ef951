"""Which parameters PEFT's adapters of parameters are for, where no model says it.

PEFT wraps a module once for each of its parameters, in the module's order, the first innermost; its
files have the wraps and not the names. The shapes of the factors, and the ranks, say which is
which, unless two parameters are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lora_jax.cli.base._base_at_start import BaseAtStart
from lora_jax.peft._folder import PeftFiles
from lora_jax.peft.names._key_mapping import EXPERTS, KeyMapping
from lora_jax.peft.names._keys import wrapped_module
from lora_jax.peft.torch._layout import factor_shapes


def alone_in(
    files: PeftFiles, base: BaseAtStart, order: Mapping[str, bool | None]
) -> dict[str, tuple[str, str]]:
    """For each wrap of a module, as the files call it, the parameter and how PyTorch stores it.

    Args:
      files: those of PEFT.
      base: the base, with PyTorch's names.
      order: names of parameters in their module, in its order, and whether the module stores them
        ``(experts, in, out)``; ``None`` where that is not known.

    Raises:
      ValueError: if adapters fit no parameter, or several.
    """
    targeted: dict[str, list[str]] = {}
    for name in base:
        if files.config.targets_parameter(name):
            targeted.setdefault(name.rpartition(".")[0], []).append(name)
    wraps: dict[str, list[str]] = {}
    for wrap in files.modules:
        root = wrapped_module(wrap)
        if root in targeted:
            wraps.setdefault(root, []).append(wrap)
    for module, names in targeted.items():
        if (count := len(wraps.get(module, ()))) != len(names):
            raise ValueError(
                f"{files.tensors.path} has {count} adapters of {module!r}, but by "
                f"target_parameters it should have one for each of {', '.join(names)}."
            )
    found: dict[str, tuple[str, str]] = {}
    for module, ones in wraps.items():
        # The innermost is the first.
        ones.sort(key=len, reverse=True)
        found |= _Module(files, base, module, ones, targeted[module], order).resolved()
    return found


def order_of(names: Sequence[KeyMapping]) -> dict[str, bool | None]:
    """The order that names have, for :func:`alone_in`."""
    order: dict[str, bool | None] = {}
    for name in names:
        if name.kind in EXPERTS:
            last, transposed = name.torch.rpartition(".")[2], name.kind == "experts_transposed"
            order[last] = transposed if order.get(last, transposed) is transposed else None
    return order


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module with parameters that are adapted by themselves."""

    files: PeftFiles
    base: BaseAtStart
    module: str
    wraps: Sequence[str]
    names: Sequence[str]
    order: Mapping[str, bool | None]

    def resolved(self) -> dict[str, tuple[str, str]]:
        """The parameter for each wrap, and how PyTorch stores it."""
        transposed = {self.order.get(name.rpartition(".")[2]) for name in self.names} - {None}
        kinds = (
            [k for k in EXPERTS if (k == "experts_transposed") in transposed]
            if transposed
            else EXPERTS
        )
        possible: list[dict[str, tuple[str, str]] | None] = []
        for kind in kinds:
            fits = {w: [n for n in self.names if self._fits(w, n, kind)] for w in self.wraps}
            found = self._by_order(fits) if self._is_ordered() else _only_choice(fits)
            if found is None:
                possible.append(None)
            elif found:
                possible.append({w: (n, self._kind(n, kind)) for w, n in found.items()})
        if not possible:
            shapes = ", ".join(f"{n!r} {self.base.info[n].shape}" for n in self.names)
            wraps = ", ".join(f"A {A} and B {B}" for A, B in map(self._shapes, self.wraps))
            raise ValueError(
                f"{self.files.tensors.path}: the adapters of {self.module!r} have {wraps}, which "
                f"do not fit the base's {shapes}."
            )
        first = possible[0]
        if first is None or any(other != first for other in possible):
            names = " ".join(name.rpartition(".")[2] for name in self.names)
            raise ValueError(
                f"{self.files.tensors.path}: the adapters of {self.module!r} fit its parameters in "
                f"several ways, and the files do not say which is right. Say what its class does: "
                f"--experts {names} in the order in which it makes them, and --layout in-out or "
                f"out-in for (experts, in, out) or (experts, out, in)."
            )
        return first

    def _is_ordered(self) -> bool:
        return all(name.rpartition(".")[2] in self.order for name in self.names)

    def _by_order(self, fits: Mapping[str, Sequence[str]]) -> dict[str, str]:
        places = list(self.order)
        names = sorted(self.names, key=lambda name: places.index(name.rpartition(".")[2]))
        found = dict(zip(self.wraps, names, strict=True))
        return found if all(name in fits[wrap] for wrap, name in found.items()) else {}

    def _shapes(self, wrap: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        A, B = (self.files.tensors.info[self.files.modules[wrap][r]].shape for r in ("A", "B"))
        return A, B

    def _kind(self, name: str, kind: str) -> str:
        return kind if len(self.base.info[name].shape) == 3 else "linear"

    def _fits(self, wrap: str, name: str, kind: str) -> bool:
        shape, kind = self.base.info[name].shape, self._kind(name, kind)
        if len(shape) not in (2, 3):
            return False
        d, k = shape[-2:] if kind == "experts_transposed" else shape[:-3:-1]
        experts = shape[0] if kind in EXPERTS else 1
        expected = factor_shapes(kind, (d, k), self.files.config.rank_of(name), (), experts)
        return self._shapes(wrap) == (expected["A"], expected["B"])


def _only_choice(fits: Mapping[str, Sequence[str]]) -> dict[str, str] | None:
    """The one choice of a parameter for every wrap; empty if there is none, ``None`` if several.

    Where there is only one choice, there is always a wrap with one choice, or a parameter with one.
    """
    left = {wrap: set(names) for wrap, names in fits.items()}
    found: dict[str, str] = {}
    while left:
        if any(not names for names in left.values()):
            return {}
        pairs = [(wrap, name) for wrap, names in left.items() for name in names]
        chosen = next(
            (
                (wrap, name)
                for wrap, name in pairs
                if len(left[wrap]) == 1 or sum(other == name for _, other in pairs) == 1
            ),
            None,
        )
        if chosen is None:
            return None
        wrap, name = chosen
        found[wrap] = name
        del left[wrap]
        for names in left.values():
            names.discard(name)
    return found
