"""The axes of every kernel, from an abstract call of the model, whichever library it is of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

import jax

from lora_jax.core._boxes import unbox
from lora_jax.core._model_axes import ModelAxes
from lora_jax.layers._axes_seen import MARK, AxesSeen
from lora_jax.layers._output_heads import output_heads
from lora_jax.tracing._liveness import live_inputs, marked_inputs
from lora_jax.trees._paths import Key, path_of


class AbstractCall(Protocol):
    """A call of a model that can be traced, without arrays in it.

    Attributes:
      params: the parameters without values, by their keys. They are the first inputs of the jaxpr.
    """

    @property
    def params(self) -> Mapping[Key, Any]:
        """The parameters without values, by their keys."""

    def trace(self, cuts: bool) -> tuple[AxesSeen, Any]:
        """What is seen in the call, and its jaxpr."""


def find_axes(call: AbstractCall, name: str | None) -> ModelAxes:
    """What is found out about the kernels of a model.

    Args:
      call: a call of it.
      name: of the call; ``None`` where ``lora_apply`` cannot know that a kernel is read in its
        layer only.
    """
    seen, jaxpr = call.trace(cuts=False)
    of_call = functools.partial(_paths_of, call.params)
    read = of_call(live_inputs(jaxpr, [True] * len(jaxpr.outvars)))
    known = seen.kernels.keys() | seen.refused.keys()
    unused = {path: why for path, why in seen.handled.items() if path not in known}
    tied = frozenset(read & seen.kernels.keys() - seen.refused.keys())
    paths = {key: path_of(key) for key in call.params}
    layers = {key[:-1] for key, path in paths.items() if path in seen.kernels}
    matrices = {  # of a layer that is not known
        path
        for key, path in paths.items()
        if key[:-1] not in layers
        and getattr(unbox(call.params[key]), "ndim", 0) - len(seen.batch.get(path, ())) > 1
    }
    return ModelAxes(
        kernels=dict(sorted(seen.kernels.items())),
        layers=seen.layers,
        batch=seen.batch,
        refused={**seen.refused, **unused},
        read=frozenset(read | seen.kernels.keys()),
        tied=tied,
        shared=frozenset(p for p, methods in seen.methods.items() if len(methods) > 1),
        convolutions=seen.convolutions,
        linear=frozenset(seen.kernels.keys() - seen.not_contracted),
        call=name,
        find_heads=functools.partial(_find_heads, call, tied, matrices),
    )


def _find_heads(
    call: AbstractCall, tied: Set[str], matrices: Set[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """The kernels of the output heads, and those that may be, where it cannot be known.

    In another call every product forgets its input and depends on its kernel instead: what a result
    depends on then are the last layers before it.
    """
    seen, jaxpr = call.trace(cuts=True)
    of_call: Callable[[list[bool]], set[str]] = functools.partial(_paths_of, call.params)
    feeding, marks = marked_inputs(jaxpr)

    def behind(i: int) -> set[str]:
        live = [output == i for output in range(len(jaxpr.outvars))]
        return of_call(live_inputs(jaxpr, live, effects=False))

    widths = {path: sizes for path, sizes in seen.widths.items() if path not in tied}
    known = {MARK + path for path in seen.widths} <= marks
    return output_heads(
        seen.results, behind, of_call(feeding) if known else None, widths, matrices | tied
    )


def _paths_of(params: Mapping[Key, Any], live: list[bool]) -> set[str]:
    """The paths of the parameters among the inputs of the jaxpr that are live."""
    leaves, structure = jax.tree.flatten(params)
    of_params = jax.tree.unflatten(structure, live[: len(leaves)])
    return {path_of(key) for key, leaf in of_params.items() if any(jax.tree.leaves(leaf))}
