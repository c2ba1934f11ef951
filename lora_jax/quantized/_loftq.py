"""LoftQ (Li et al. 2024): adapters that start at what quantizing the base has lost.

Algorithm 1 alternates between the two: with ``U V = 0`` at first,

    W_q  = quantized(W - s U V)
    s U V = the best approximation of W - W_q of rank r, by its singular values

so that ``W_q + s U V`` is near to ``W`` from the first step on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core._boxes import content, unbox
from lora_jax.core._meshes import explicit_sharding
from lora_jax.core._numerics import column_norm, float32_or_more, product
from lora_jax.core.quantized._encode import specs_like
from lora_jax.core.quantized._quantization import Quantization
from lora_jax.core.variants._dora import DoRA
from lora_jax.core.variants._lora import LoRA
from lora_jax.quantized._quantize import assigned, axes_to_quantize, quantize_leaf
from lora_jax.trees._pair import pair
from lora_jax.trees._paths import path_of, unflatten, unflatten_adapters
from lora_jax.trees._quantized_leaf import requantized_leaf
from lora_jax.trees._shardings import follow
from lora_jax.trees._states import parameters_in
from lora_jax.trees._table import Report, text_table


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """What quantizing one kernel loses, as a share of the kernel's norm.

    Attributes:
      kind: of its codes.
      quantized: ``||W - W_q|| / ||W||`` where it is quantized alone, Frobenius norms.
      with_adapter: ``||W - (W_q + s U V)|| / ||W||``, with the adapter that starts there.
    """

    kind: str
    quantized: float
    with_adapter: float


@dataclasses.dataclass(frozen=True)
class LoftQReport(Report[QuantizationError]):
    """The error of every quantized kernel that has an adapter, by its path; as text, a table.

    Attributes:
      rows: the same as a dict.
    """

    def __str__(self) -> str:
        """A table."""
        body = [
            (path, one.kind, f"{one.quantized:.4f}", f"{one.with_adapter:.4f}")
            for path, one in self.rows.items()
        ]
        return "\n".join(text_table(("path", "kind", "quantized", "with adapter"), body, left=2))


def loftq(
    frozen: chex.ArrayTree,
    adapters: chex.ArrayTree,
    kinds: Mapping[str, str | Quantization],
    *,
    axes: Mapping[str, KernelAxes] | None = None,
    steps: int = 5,
) -> tuple[chex.ArrayTree, chex.ArrayTree, LoftQReport]:
    """Quantizes a base, and starts its adapters at what that loses (LoftQ, Li et al. 2024).

    ``W_q + s U V`` is nearer to ``W`` than ``W_q`` is: the adapted model starts nearer to the model
    that was not quantized. ``m`` of DoRA starts at the norms of ``W_q + s U V``.

    Args:
      frozen: the base in floats, as :func:`lora_jax.lora_init` returned it.
      adapters: the adapters that it returned, untrained.
      kinds: how kernels are quantized, as for :func:`lora_jax.quantize`. A kernel that has no
        adapter is quantized alone.
      axes: of the kernels without adapters, as for :func:`lora_jax.quantize`.
      steps: how often to alternate. What comes nearest to ``W`` is taken.

    Returns:
      ``(frozen, adapters, report)``: the quantized base, the adapters, and the error of each kernel
      before and after. It prints as a table.

    Raises:
      TypeError: as :func:`lora_jax.quantize` and :func:`lora_jax.lora_merge` do.
      ValueError: as they do, if ``steps`` is below 1, or a kernel has an adapter that is neither
        LoRA nor DoRA.

    Example:
      >>> import jax, lora_jax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> config = lora_jax.LoraConfig([lora_jax.Rule("kernel", rank=8)])
      >>> frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
      >>> frozen, adapters, report = lora_jax.loftq(frozen, adapters, {"kernel": "nf4"})
      >>> report["kernel"].with_adapter < 0.9 * report["kernel"].quantized
      True
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}.")
    base, nodes = pair(frozen, adapters)
    leaves = {path_of(key): key for key in parameters_in(base)}
    rows: dict[str, QuantizationError] = {}
    for path, quantization in assigned(kinds, list(leaves), axes).items():
        key = leaves[path]
        node, leaf = nodes.get(key), base[key]
        own = axes_to_quantize(path, leaf, axes, node.axes if isinstance(node, Adapter) else None)
        codes = quantize_leaf(path, leaf, quantization, own)
        base[key] = codes
        if isinstance(node, Adapter):
            _check(path, node)
            base[key], nodes[key], rows[path] = _alternated(leaf, codes, node, steps)
    split = {key: node.as_leaf() for key, node in nodes.items()}
    return unflatten(base, frozen), unflatten_adapters(split, adapters), LoftQReport(rows)


def _alternated(
    leaf: Any, codes: Any, adapter: Adapter, steps: int
) -> tuple[Any, Adapter, QuantizationError]:
    """The quantized leaf and the adapter that are nearest to the kernel, and their error."""
    kernel = jnp.asarray(unbox(leaf))
    sharding: Any = None if explicit_sharding(kernel) is None else kernel.sharding
    if sharding is not None:  # what is sharded in its type has no singular values
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        kernel, codes = jax.device_put((kernel, codes), whole)
    wide = kernel.astype(float32_or_more(kernel.dtype))
    W, axes = adapter.axes.as_matrix(wide), adapter.axes
    size = jnp.maximum(jnp.linalg.norm(W), 1e-30)
    best: tuple[float, Any, Any] | None = None
    alone = 0.0
    for step in range(steps):
        Q = axes.as_matrix(unbox(codes).astype(wide.dtype))
        U, V = _nearest(W - Q, adapter.rank, adapter.scale)
        delta = adapter.scale * product(U, V)
        error = float(jnp.linalg.norm(W - Q - delta) / size)
        if step == 0:
            alone = float(jnp.linalg.norm(W - Q) / size)
        if best is None or error < best[0]:
            best = error, codes, (U, V, Q + delta)
        codes = requantized_leaf(codes, axes.from_matrix(W - delta, wide), axes)
    assert best is not None
    error, codes, (U, V, start) = best
    arrays = {"U": U, "V": V}
    if "m" in adapter.arrays:
        arrays["m"] = column_norm(start)
    arrays = {name: a.astype(adapter.arrays[name].dtype) for name, a in arrays.items()}
    adapter = follow(adapter.replace(arrays=arrays), leaf)
    if sharding is not None:
        place = functools.partial(NamedSharding, sharding.mesh)
        codes = jax.tree.map(
            lambda x, spec: jax.device_put(x, place(spec)), codes, specs_like(codes, sharding)
        )
    kind = content(codes).quantization.kind
    return codes, adapter, QuantizationError(kind, alone, error)


@functools.partial(jax.jit, static_argnames=("rank", "scale"))
def _nearest(R: chex.Array, rank: int, scale: float) -> tuple[chex.Array, chex.Array]:
    """``U`` and ``V`` of rank ``r``, with ``s U V`` nearest to ``R``: ``(*stack, d, k)``."""
    left, values, right = jnp.linalg.svd(R, full_matrices=False)
    half = jnp.sqrt(values[..., :rank] / scale)
    return left[..., :rank] * half[..., None, :], half[..., :, None] * right[..., :rank, :]


def _check(path: str, adapter: Adapter) -> None:
    if type(adapter.variant) not in (LoRA, DoRA) or adapter.count is not None:
        raise ValueError(
            f"The adapter of {path!r} is of variant {adapter.kind!r}, or a stack. LoftQ is for one "
            f"adapter of 'lora' or 'dora', as lora_init returns it."
        )
