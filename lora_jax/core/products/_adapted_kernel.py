"""The kernel that a layer's handler gets: it computes products with ``W'``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from lora_jax._deprecated import renamed_arguments
from lora_jax.core._adapter import Adapter
from lora_jax.core._axes import KernelAxes
from lora_jax.core.products._dequantized import product_with
from lora_jax.core.products._dropout_mask import dropped
from lora_jax.core.products._einsum_equation import Equation
from lora_jax.core.products._factored import Product
from lora_jax.core.products._layer_factors import LayerFactors, layer_factors
from lora_jax.core.products._mixed_product import mixed_einsum, mixed_linear
from lora_jax.core.products._normal_form import normalized
from lora_jax.core.products._observer import Observer
from lora_jax.core.products._product import adapted_einsum, adapted_linear
from lora_jax.core.products._row_ids import BASE, Ids, repeat_ids
from lora_jax.core.products._shared_input import SharedInputs
from lora_jax.core.quantized._array import QuantizedArray


class ComputesItself(Exception):
    """A layer whose kernels have no adapter shall compute as it would without a handler."""


class AdaptedKernel:
    """A kernel of a layer, as the layer's handler gets it: it computes products with ``W'``.

    A handler gets one for each of its kernels, adapted or not; without an adapter the products
    are with ``W``.

    Attributes:
      value: the kernel ``W`` as it is stored, or what it dequantizes to.
      dtype: its dtype.
      ids: which of several adapters a row of the batch has, or ``None`` where there is one.
    """

    def __init__(
        self,
        path: str,
        value: chex.Array,
        adapter: Adapter | None = None,
        rng: chex.PRNGKey | None = None,
        observer: Observer | None = None,
        use: Callable[[], None] | None = None,
        ids: Ids | None = None,
        product: str = "auto",
        inputs: SharedInputs | None = None,
        built_in: bool = False,
        optional: bool = False,
    ) -> None:
        # Whether a handler is of this library, so that the W it gives is the kernel in another
        # dtype; and whether a layer may compute itself, as nothing of it is adapted.
        self._built_in, self._optional = built_in, optional
        self._product, self._inputs = product, inputs
        self._path, self._adapter, self._rng, self._observer = path, adapter, rng, observer
        self._use, self.ids = use, ids
        self._draws = 0
        self._stored, self._refused = value, False

    @functools.cached_property
    def value(self) -> chex.Array:
        """The kernel ``W`` as it is stored, or what it dequantizes to."""
        stored = self._stored
        W = stored.dequantize() if isinstance(stored, QuantizedArray) else stored
        return self._observable(W)

    @property
    def dtype(self) -> Any:
        """Dtype of the stored kernel, or what it dequantizes to."""
        return self._stored.dtype

    @property
    def was_seen_as_read(self) -> bool:
        """Whether a quantized kernel is known to be what its layer computes with.

        Each reader of it dequantizes anew, so that nothing tells one from another; but an abstract
        call has found it.
        """
        quantized = isinstance(self._stored, QuantizedArray)
        return quantized and self._adapter is not None and self._adapter.axes.alone is not None

    @property
    def untied(self) -> bool:
        """Whether only one use of the kernel is adapted, and the others keep the base."""
        return self._adapter is not None and self._adapter.untied

    def einsum(
        self,
        equation: str,
        x: chex.Array,
        W: chex.Array | None = None,
        *,
        base: Product | None = None,
        transposed: bool = False,
        precision: jax.lax.PrecisionLike = None,
    ) -> chex.Array:
        """``jnp.einsum(equation, x, W')``.

        Letters that ``W`` shares only with ``x`` are its inputs, those that it shares only with
        the result are its outputs, and those in all three are its batch axes: each matrix has
        its own ``U`` and ``V``.

        Args:
          equation: ``"x,W->y"``; ``...`` may stand in ``x`` and ``y``.
          x: the input.
          W: the kernel in the dtype to compute in; by default the stored one, promoted as
            ``jnp.einsum`` would.
          base: the layer's own product of ``x`` and ``W``, where it does more than the einsum.
          transposed: this product is with the transposed matrix, as where an embedding gives the
            logits: the letters that are contracted here are the *outputs* of the kernel.
          precision: of the products.

        Raises:
          ValueError: if the equation is not a product with a matrix, or the adapter is for other
            axes of the kernel.

        Example:
          >>> kernel = AdaptedKernel("w", jnp.ones((2, 3, 4)))
          >>> kernel.einsum("btd,dhk->bthk", jnp.ones((1, 5, 2))).shape
          (1, 5, 3, 4)
        """
        is_kernel = self._built_in or W is None or W is self.value
        if W is None:
            dtype = jnp.result_type(x, self.value)
            x, W = x.astype(dtype), self.value.astype(dtype)
        W = self._observable(W)
        try:
            eq = Equation.parse(equation, x.shape, W.shape)
        except ValueError as error:
            self.refuse(str(error))
            plain = base or functools.partial(jnp.einsum, equation, precision=precision)
            return self._observed(x, plain(x, W))
        axes = eq.transposed_axes if transposed else eq.axes
        if is_kernel:
            base = self._base_product(W, base, functools.partial(eq.product, precision=precision))
        factors, ids = self._factors(axes, W, contracted=not transposed)
        if factors is None:
            return self._observed(x, eq.product(x, W, precision) if base is None else base(x, W))
        options: dict[str, Any] = {
            "base": base,
            "transposed": transposed,
            "precision": precision,
            "x_in": self._input(x, ids),
        }
        if ids is not None:
            return mixed_einsum(eq, x, W, factors, ids, **options)
        dropout = self._rng is not None
        return adapted_einsum(eq, x, W, factors, dropout=dropout, **options)

    @renamed_arguments(stacks="batch_axes", batch="batch_shape")
    def linear(
        self,
        product: Product,
        x: chex.Array,
        W: chex.Array | None = None,
        *,
        inputs: tuple[int, ...],
        base: Product | None = None,
        batch_axes: tuple[int, ...] = (),
        groups: int = 1,
        batch_shape: tuple[int, ...] | None = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> chex.Array:
        """``product(x, W')`` for a product that is linear in the kernel, such as a convolution.

        Args:
          product: computes it from ``x`` and a kernel with any number of outputs; called with
            ``W``, and with ``U`` in the kernel's layout, which has ``r`` outputs. The result's
            last axes must be the batch axes and the outputs.
          x: the input.
          W: the kernel in the dtype to compute in; by default the stored one, promoted with ``x``
            where that is floating-point.
          inputs: axes of the kernel that are contracted. One axis is left: the outputs.
          base: the layer's own product, for ``W``; by default ``product``.
          batch_axes: axes of the kernel along which matrices are stacked, each with its own ``U``
            and ``V``.
          groups: number of groups that the outputs are in, each with its own inputs.
          batch_shape: sizes of the axes that the layer has made into the first one of ``x``, if it
            has.
          precision: of the product with ``V``; give the one that ``product`` has.

        Raises:
          ValueError: if the adapter is for other axes of the kernel, or there is not exactly one
            output axis.

        Example:
          >>> kernel = AdaptedKernel("embedding", jnp.ones((10, 4)))
          >>> take = lambda ids, W: jnp.take(W, ids, axis=0)
          >>> kernel.linear(take, jnp.array([1, 7]), inputs=(0,)).shape
          (2, 4)
        """
        is_kernel = self._built_in or W is None or W is self.value
        if W is None:
            W = self.value
            if jnp.issubdtype(x.dtype, jnp.inexact):
                dtype = jnp.result_type(x, W)
                x, W = x.astype(dtype), W.astype(dtype)
        W = self._observable(W)
        outputs = tuple(axis for axis in range(W.ndim) if axis not in {*inputs, *batch_axes})
        if len(outputs) != 1:
            self.refuse(
                f"its handler leaves {len(outputs)} axes of the kernel {W.shape} for the outputs, "
                f"and linear() takes one; use einsum()"
            )
            return self._observed(x, (base or product)(x, W))
        axes = KernelAxes(inputs, outputs, batch_axes)
        if is_kernel:
            base = self._base_product(W, base, product)
        base = base or product
        factors, ids = self._factors(axes, W, contracted=False)
        if factors is None:
            return self._observed(x, base(x, W))
        if ids is not None and batch_shape is not None:
            ids = repeat_ids(ids, batch_shape)
        options: dict[str, Any] = {
            "base": base,
            "groups": groups,
            "precision": precision,
            "x_in": self._input(x, ids),
        }
        if ids is not None:
            return mixed_linear(product, x, W, factors, axes, ids, **options)
        return adapted_linear(product, x, W, factors, axes, **options)

    def check_batch(self, batch: tuple[int, ...]) -> None:
        """Says how far the batch goes, in a layer that mixes the positions behind it.

        Args:
          batch: sizes of the first axes of the input, which are the batch.

        Raises:
          ValueError: if positions behind the batch have their own adapters.
        """
        if self.ids is not None and len(self.ids.shape) > max(len(batch), 1):
            raise ValueError(
                f"Of one row adapter_ids is {self.ids.shape}, but the layer of {self._path!r} "
                f"convolves the axes behind {batch}, so that no position in them can have an "
                f"adapter of its own: give one number for each example."
            )

    def refuse(self, reason: str) -> None:
        """Says that this layer cannot be adapted, in a handler that meets such a case.

        Args:
          reason: why.

        Raises:
          ValueError: if the kernel has an adapter.
        """
        self._refused = True
        if self._optional:
            raise ComputesItself
        if self._observer is not None:
            self._observer.refuse(reason)
        elif self._adapter is not None:
            raise ValueError(
                f"The kernel {self._path!r} cannot be adapted in its layer: {reason}. Give it a "
                f"rule with materialize=True."
            )

    def _base_product(self, W: chex.Array, base: Product | None, plain: Product) -> Product | None:
        """The layer's own product; of a quantized kernel one that does not keep it.

        Args:
          W: the kernel in the compute dtype.
          base: the layer's own product, if it is more than the plain one.
          plain: the plain one.
        """
        stored = self._stored
        keeps = self._observer is not None or self._refused
        if keeps or not isinstance(stored, QuantizedArray) or W.shape != stored.shape:
            return base
        return product_with(stored, base or plain, W.dtype)

    def _observable(self, W: chex.Array) -> chex.Array:
        """The kernel, or zeros where only its use is observed."""
        return W if self._observer is None else jnp.zeros_like(W)

    def _observed(self, x: chex.Array, y: chex.Array) -> chex.Array:
        """The result, or what stands for it where only the use of the kernel is observed."""
        return y if self._observer is None else self._observer.product(x, y)

    def _factors(
        self, axes: KernelAxes, W: chex.Array, contracted: bool
    ) -> tuple[LayerFactors | None, chex.Array | None]:
        """The factors of this layer, and the id of its row or those of the row's tokens.

        There are ids where there are several adapters: then the factors are those of all of them,
        on an axis in front.

        Args:
          axes: of the kernel, as the layer uses it.
          W: the kernel in the layer.
          contracted: as for :meth:`Observer.use`.

        Raises:
          ValueError: if the adapter is for other axes.
        """
        if self._observer is not None:
            self._observer.use(axes, contracted)
        if self._adapter is None:
            return None, None
        if self._use is not None:
            self._use()
        stored = self._adapter.axes
        layer = stored.in_layer(axes)
        if layer is None:
            raise ValueError(
                f"The adapter of {self._path!r} is for a kernel with {_as_arguments(stored)}, but "
                f"its layer contracts {_as_arguments(axes)}. Pass axes=lora_jax.kernel_axes(model, "
                f"variables, *args) to lora_init, or say input_axes and batch_axes in the rule."
            )
        adapter = self._sliced(layer, W)
        ids = None if self.ids is None else self.ids.in_layer(layer, W.shape)
        if ids is None:
            adapter = normalized(self._stored, adapter)  # as it is, where it was before its layer
        return layer_factors(self._stored, adapter, self._product, self._path), ids

    def _sliced(self, axes: KernelAxes, W: chex.Array) -> Adapter:
        """The adapter in the layer, where transforms have sliced it like the kernel."""
        assert self._adapter is not None
        adapter = self._adapter
        if axes != adapter.axes:
            adapter = adapter.replace(axes=axes)
        arrays = {}
        behind, ndims = len(axes.batch_shape(W.shape)), adapter.matrix_ndims()
        for name, shape in adapter.shapes(W.shape).items():
            if self.ids is not None:
                shape = (*shape[:behind], self.ids.count, *shape[behind:])
            array = axes.take(adapter.arrays[name], ndims[name], shape)
            if array is None:
                raise ValueError(
                    f"In the layer of {self._path!r} the kernel is {W.shape}, so {name} should be "
                    f"{shape}, but a transform has left {jnp.shape(adapter.arrays[name])} of it. "
                    f"The adapter has batch_axes={self._adapter.axes.batch}: they must be those "
                    f"on which nn.scan and nn.vmap stack the kernel "
                    f"(variable_axes={{'params': ...}}). Correct them in the rule."
                )
            arrays[name] = array if self.ids is None else jnp.moveaxis(array, behind, 0)
        if all(array is adapter.arrays[name] for name, array in arrays.items()):
            return adapter
        return adapter.replace(arrays=arrays)

    def _input(self, x: chex.Array, ids: chex.Array | None) -> chex.Array:
        """The input of the factors, with dropout; each product of the handler has its own mask.

        Args:
          x: the input of the layer.
          ids: which adapter a row has, where each has its own rate.
        """
        if self._inputs is not None:
            x = self._inputs.copy(x)
        if self._rng is None or self._adapter is None:
            return x
        rate: Any = self._adapter.dropout or 0.0
        if isinstance(rate, tuple):
            assert ids is not None
            rate = jnp.where(ids == BASE, 0.0, jnp.array(rate, jnp.float32)[ids])
            rate = jnp.reshape(rate, (*ids.shape, *(1,) * (x.ndim - ids.ndim)))
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                f"The adapter of {self._path!r} has dropout, but its layer looks up {x.dtype} "
                f"numbers, which cannot be dropped. Give it a rule of its own with dropout=0."
            )

        rng = jax.random.fold_in(self._rng, self._draws) if self._draws else self._rng
        self._draws += 1
        return dropped(x, rng, rate)


def _as_arguments(axes: KernelAxes) -> str:
    """The axes as a rule says them."""
    batch = f" and batch_axes={axes.batch}" if axes.batch else ""
    return f"input_axes={axes.inputs}{batch}"
