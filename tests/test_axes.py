"""A kernel as a stack of matrices, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import KernelAxes

CASES = [
    # axes, shape of the kernel, shape of the stack, (d, k)
    (KernelAxes(), (4, 3), (), (4, 3)),
    (KernelAxes(stacks=(0,)), (2, 4, 3), (2,), (4, 3)),
    (KernelAxes(stacks=(1,)), (4, 2, 3), (2,), (4, 3)),
    (KernelAxes(stacks=(-1,)), (4, 3, 2), (2,), (4, 3)),
    (KernelAxes(stacks=(0, 2)), (5, 4, 2, 3), (5, 2), (4, 3)),
    (KernelAxes(stacks=(0, -1)), (5, 4, 3, 2), (5, 2), (4, 3)),
    (KernelAxes(inputs=2), (4, 5, 3), (), (20, 3)),
    (KernelAxes(inputs=1, stacks=(0,)), (2, 4, 5, 3), (2,), (4, 15)),
]


@pytest.mark.parametrize(("axes", "shape", "stack", "matrix"), CASES)
def test_round_trip(axes, shape, stack, matrix):
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    assert axes.stack_shape(shape) == stack
    assert axes.matrix_shape(shape) == matrix
    assert axes.as_matrix(kernel).shape == (*stack, *matrix)
    assert jnp.array_equal(axes.from_matrix(axes.as_matrix(kernel), shape), kernel)
    assert jnp.array_equal(axes.add_stacks(axes.front_stacks(kernel)), kernel)


def test_stacked_layers_are_the_layers():
    """Layer i of the matrices is layer i of what nn.scan slices, for one and for two scans."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 2, 3)))
    matrices = KernelAxes(stacks=(0, 2)).as_matrix(kernel)
    assert jnp.array_equal(matrices[3, 1], kernel[3, :, 1, :])
    matrices = KernelAxes(stacks=(1,)).as_matrix(kernel[0])
    assert jnp.array_equal(matrices[1], kernel[0, :, 1, :])
