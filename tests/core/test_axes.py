"""A kernel as a stack of matrices, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import KernelAxes

CASES = [
    # axes, shape of the kernel, shape of the stack, (d, k)
    (KernelAxes(), (4, 3), (), (4, 3)),
    (KernelAxes((1,), (0,)), (3, 4), (), (4, 3)),
    (KernelAxes((1,), (2,), (0,)), (2, 4, 3), (2,), (4, 3)),
    (KernelAxes((0,), (2,), (1,)), (4, 2, 3), (2,), (4, 3)),
    (KernelAxes((1,), (3,), (0, 2)), (5, 4, 2, 3), (5, 2), (4, 3)),
    (KernelAxes((0, 1), (2,)), (4, 5, 3), (), (20, 3)),
    (KernelAxes((1,), (2, 3), (0,)), (2, 4, 5, 3), (2,), (4, 15)),
    (KernelAxes((0, 3), (1,), (2,)), (2, 5, 3, 4), (3,), (8, 5)),
    (KernelAxes(fused=3), (4, 6), (3,), (4, 2)),
    (KernelAxes((0,), (2, 3), (1,), fused=3, parts=(0, 2)), (4, 5, 3, 2), (5, 2), (4, 2)),
]


@pytest.mark.parametrize(("axes", "shape", "stack", "matrix"), CASES)
def test_round_trips(axes, shape, stack, matrix):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    assert axes.batch_shape(shape) == stack
    assert axes.matrix_shape(shape) == matrix
    assert axes.as_matrix(kernel).shape == (*stack, *matrix)
    assert jnp.array_equal(axes.from_matrix(axes.as_matrix(kernel), kernel), kernel)
    other = axes.as_matrix(kernel) + 1
    assert jnp.array_equal(axes.as_matrix(axes.from_matrix(other, kernel)), other)
    for array_shape, ndim in [((*stack, *matrix), 2), ((*stack, matrix[1]), 1)]:
        array = jnp.asarray(np.random.default_rng(1).standard_normal(array_shape))
        placed = axes.place(array, ndim)
        assert not axes.batch or placed.ndim == kernel.ndim
        assert jnp.array_equal(axes.take(placed, ndim, array_shape), array)


def test_matrices_are_those_of_the_layers():
    """Layer i of the matrices is layer i of what nn.scan slices, for one and for two scans."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 2, 3)))
    matrices = KernelAxes((1,), (3,), (0, 2)).as_matrix(kernel)
    assert jnp.array_equal(matrices[3, 1], kernel[3, :, 1, :])
    matrices = KernelAxes((0,), (2,), (1,)).as_matrix(kernel[0])
    assert jnp.array_equal(matrices[1], kernel[0, :, 1, :])


def test_placed_arrays_are_sliced_like_the_kernel():
    axes = KernelAxes((0, 3), (2,), (1, 4))
    shape = (2, 5, 3, 4, 6)
    for array, ndim in [(jnp.zeros((5, 6, 8, 7)), 2), (jnp.zeros((5, 6, 3)), 1)]:
        placed = axes.place(array, ndim)
        assert placed.ndim == len(shape)
        assert (placed.shape[1], placed.shape[4]) == (5, 6)
        one = KernelAxes((0, 2), (1,), (3,))
        assert one.take(placed[:, 0], ndim, (6, *array.shape[2:])).shape == (6, *array.shape[2:])
        assert one.take(placed[:, :, 0], ndim, (6, *array.shape[2:])) is None
    assert {layer.batch for layer in axes.of_layers(4)} == {(3,), (1,)}
    assert [layer.inputs for layer in axes.of_layers(3)] == [(0, 2)]
    assert list(axes.of_layers(2)) == []


def test_fused_kernels_lie_side_by_side():
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    matrices = KernelAxes(fused=3, parts=(2, 0)).as_matrix(kernel)
    assert jnp.array_equal(matrices, jnp.stack([kernel[:, 4:], kernel[:, :2]]))


@pytest.mark.parametrize("axes", [((0,), (1,), (1,)), ((0,), (2,)), ((-1,), (0,))])
def test_every_axis_once(axes):
    with pytest.raises(ValueError, match=r"must name every axis of the kernel once"):
        KernelAxes(*axes)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fused": 0}, ValueError, r"KernelAxes\(fused=0\): fused must be at least 1"),
        ({"fused": -2}, ValueError, r"KernelAxes\(fused=-2\): fused must be at least 1"),
        ({"fused": 0, "parts": (0,)}, ValueError, "fused must be at least 1"),
        ({"fused": 2.0}, TypeError, r"KernelAxes\(fused=...\) must be an int, got 2.0"),
        ({"fused": True}, TypeError, r"KernelAxes\(fused=...\) must be an int, got True"),
        ({"fused": None}, TypeError, r"KernelAxes\(fused=...\) must be an int, got None"),
        ({"fused": 2, "parts": (0, 0)}, ValueError, "parts must be some of 0 to 1, each once"),
        ({"fused": 2, "parts": (2,)}, ValueError, "parts must be some of 0 to 1, each once"),
        ({"fused": 2, "parts": (-1,)}, ValueError, "parts must be some of 0 to 1, each once"),
        ({"fused": 2, "parts": (True,)}, TypeError, r"KernelAxes\(parts=...\) must be a tuple of"),
        ({"fused": 2, "parts": (0.0,)}, TypeError, r"KernelAxes\(parts=...\) must be a tuple of"),
        ({"inputs": (False,)}, TypeError, r"KernelAxes\(inputs=...\) must be a tuple of ints"),
        ({"inputs": 0}, TypeError, r"KernelAxes\(inputs=...\) must be a tuple of ints"),
    ],
)
def test_impossible_fields(fields, error, message):
    with pytest.raises(error, match=message):
        KernelAxes(**fields)


def test_outputs_that_are_not_so_many_kernels():
    """So that no output is left out: a kernel of 7 outputs is not 3 of 2."""
    axes = KernelAxes(fused=3)
    with pytest.raises(
        ValueError, match=r"\(4, 7\) has 7 outputs, which are not 3 kernels side by"
    ):
        axes.matrix_shape((4, 7))
    params = {"kernel": jnp.ones((4, 7))}
    config = lora_jax.LoraConfig([lora_jax.Rule("kernel", 1)])
    with pytest.raises(
        ValueError, match="'kernel', whose 7 outputs are not 3 kernels side by side"
    ):
        lora_jax.lora_init(jax.random.key(0), params, config, axes={"kernel": axes})
    adapter = lora_jax.Adapter(jnp.ones((3, 4, 1)), jnp.ones((3, 1, 2)), axes=axes)
    with pytest.raises(ValueError, match=r"adapter for 'kernel' does not fit: .* has 7 outputs"):
        lora_jax.lora_merge(params, {"kernel": adapter})


def test_ints_of_any_kind():
    axes = KernelAxes(np.array([0]), [np.int8(1)], fused=np.int64(2))
    assert axes == KernelAxes(fused=2)
    assert repr(axes) == repr(KernelAxes(fused=2))
