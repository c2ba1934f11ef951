"""The formulas of the papers."""

import jax
import jax.numpy as jnp
from helpers import layer_arrays, relative_error

from lora_jax.core._numerics import column_norm, safe_sqrt
from lora_jax.core.variants._dora import DoRA


def test_norm_is_of_the_columns_one_for_each_output():
    """Axis 0 of a Flax kernel (in, out), where PyTorch's (out, in) has dim=1."""
    W = jnp.array([[3.0, 1.0, 0.0], [4.0, 0.0, 2.0]])
    assert jnp.array_equal(column_norm(W), jnp.array([5.0, 1.0, 2.0]))
    zeros = jnp.zeros((2, 1))
    m = jnp.array([10.0, 1.0, 2.0])
    W_ = DoRA().kernel(W, 1.0, zeros, jnp.zeros((1, 3)), m)
    assert jnp.allclose(W_, W * jnp.array([2.0, 1.0, 1.0]))


def test_scale_acts_inside_the_norm():
    a = layer_arrays()
    got = DoRA().kernel(a["W"], 3.0, a["U"], a["V"], a["m"])
    adapted = a["W"] + 3.0 * a["U"] @ a["V"]
    assert relative_error(got, a["m"] * adapted / jnp.linalg.norm(adapted, axis=0)) < 1e-6
    assert relative_error(jnp.linalg.norm(got, axis=0), jnp.abs(a["m"])) < 1e-6


def test_safe_sqrt():
    x = jnp.array([4.0, 0.0, -1e-9])
    assert jnp.array_equal(safe_sqrt(x), jnp.array([2.0, 0.0, 0.0]))
    assert jnp.array_equal(jax.grad(lambda x: safe_sqrt(x).sum())(x), jnp.array([0.25, 0.0, 0.0]))
