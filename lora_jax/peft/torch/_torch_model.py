"""The PyTorch parameters that those of a Flax model are, by their names in the state dict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

from lora_jax.core._axes import KernelAxes
from lora_jax.peft.names._key_mapping import EXPERTS, find
from lora_jax.peft.torch._flax_model import FlaxModel


@dataclasses.dataclass(frozen=True)
class TorchParameter:
    """A PyTorch parameter, as a part of a Flax one.

    Attributes:
      name: its name in the state dict.
      path: path of the Flax parameter.
      index: which of the stacked ones it is; empty where nothing is stacked.
      kind: how PyTorch stores it.
      order: which of the names it has; the parameters of a module are in the order of their names.
    """

    name: str
    path: str
    index: tuple[int, ...]
    kind: str
    order: int = 0

    @property
    def module(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]


class TorchModel(FlaxModel):
    """The parameters of a Flax model, and the PyTorch ones that they are."""

    def torch(self, path: str) -> list[TorchParameter]:
        """PyTorch's parameters for a leaf.

        Raises:
          ValueError: if no name is for it.
        """
        found = self._found(path)
        if not found:
            raise ValueError(
                f"names has no name in PyTorch for {path!r}: add a lora_jax.peft.KeyMapping for it."
            )
        return found

    def complete(self, path: str) -> list[TorchParameter]:
        """PyTorch's parameters for a leaf, which together are all of it.

        Raises:
          ValueError: if no name is for it, or for some of the kernels that are fused in it; or if
            it is not known whether it is a ``Conv1D``, where that matters.
        """
        axes = self.axes(path)
        if axes is not None and axes.fused > len(axes.parts):
            raise ValueError(
                f"{path!r} has {axes.fused} kernels side by side, and names names "
                f"{len(axes.parts)} of them: name all of them, as {{q|k|v}} does."
            )
        if self.stated_axes(path) is not None or self.kind(path) == "conv1d":
            self.check_orientation(path)
        return self.torch(path)

    def adapted(self, path: str, axes: KernelAxes) -> dict[TorchParameter, tuple[int, ...]]:
        """PyTorch's parameters that an adapter is for, with their index in its arrays.

        Args:
          path: the kernel's.
          axes: the adapter's; of fused kernels it may have some.

        Raises:
          ValueError: if no name is for one of them.
        """
        named = self.axes(path)
        if axes.fused == 1 or named is None:
            return {torch: torch.index for torch in self.torch(path)}
        if lost := sorted(set(axes.parts) - set(named.parts)):
            raise ValueError(
                f"names has no name in PyTorch for part {lost[0]} of {path!r}: name all parts that "
                f"are adapted, as {{q|k|v}} does."
            )
        places = {torch: named.parts[torch.index[-1]] for torch in self.torch(path)}
        return {
            torch: (*torch.index[:-1], axes.parts.index(part))
            for torch, part in places.items()
            if part in axes.parts
        }

    @functools.cached_property
    def by_name(self) -> Mapping[str, TorchParameter]:
        """All that have a name, by it.

        Raises:
          ValueError: if two have the same name.
        """
        by_name: dict[str, TorchParameter] = {}
        arrays = [path for path, leaf in self.leaves.items() if hasattr(leaf, "shape")]
        for torch in (torch for path in arrays for torch in self._found(path)):
            if torch.name in by_name:
                raise ValueError(
                    f"names gives {torch.path!r} and {by_name[torch.name].path!r} one name: "
                    f"{torch.name!r}."
                )
            by_name[torch.name] = torch
        return by_name

    def modules(self) -> set[str]:
        """PyTorch's modules of kernels, as far as their names are known."""
        found = set()
        for path in self.leaves:
            with contextlib.suppress(ValueError):
                found |= {
                    torch.module
                    for torch in self._found(path)
                    if torch.kind not in ("plain", *EXPERTS) and torch.name.endswith(".weight")
                }
        return found

    def _found(self, path: str) -> list[TorchParameter]:
        """PyTorch's parameters for a leaf; none if no name is for it."""
        if path in self._torches:
            return self._torches[path]
        name, kind, stack = find(path, self.names), self.kind(path), self.stack(path)
        if name is None:
            return []
        if kind in EXPERTS:  # PyTorch has all experts in one parameter
            if not stack:
                raise ValueError(
                    f"{path!r} holds experts by its KeyMapping, but nothing is stacked in it. "
                    f"What is stacked is known with axes=lora_jax.kernel_axes(...)."
                )
            stack = stack[:-1]
        order = self.names.index(name)
        self._torches[path] = [
            TorchParameter(torch, path, index, kind, order)
            for index, torch in name.match(path, stack) or ()
        ]
        return self._torches[path]

    @functools.cached_property
    def _torches(self) -> dict[str, list[TorchParameter]]:
        return {}
