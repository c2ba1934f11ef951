"""An einsum as a matrix product."""

import string

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from lora_jax.core.products._einsum_equation import Equation

EQUATIONS = [
    # equation, shapes of x and W
    ("nd,dk->nk", (4, 3), (3, 5)),
    ("...d,dk->...k", (2, 4, 3), (3, 5)),
    ("...d,dk->...k", (3,), (3, 5)),
    ("td...,kd->k...t", (4, 3, 2), (5, 3)),
    ("btd,dhk->bthk", (2, 4, 3), (3, 5, 6)),
    ("bthk,hkd->btd", (2, 4, 5, 6), (5, 6, 3)),
    ("bthk,khd->dbt", (2, 4, 5, 6), (6, 5, 3)),
    ("etd,edk->etk", (5, 4, 3), (5, 3, 2)),
    ("tde,kdef->fkte", (4, 3, 5), (2, 3, 5, 6)),
    ("bsd,dk->bk", (2, 4, 3), (3, 5)),
]


@pytest.mark.parametrize(("equation", "x_shape", "W_shape"), EQUATIONS)
def test_is_the_matrix_product_that_it_says(equation, x_shape, W_shape):
    rng = np.random.default_rng(0)
    x, W = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in (x_shape, W_shape))
    eq = Equation.parse(equation, x_shape, W_shape)
    expected = jnp.einsum(equation, x, W)
    assert relative_error(eq.product(x, W), expected) < 1e-5

    def as_matrices(W):
        stack, free = len(eq.axes.batch), len(eq.operand(x).shape) - len(eq.axes.batch) - 1
        W = eq.axes.as_matrix(W)
        W = W.reshape(*W.shape[:stack], *(1,) * max(free - 1, 0), *W.shape[stack:])
        return eq.result(eq.operand(x) @ W)

    assert relative_error(as_matrices(W), expected) < 1e-5
    *stack, d, k = eq.axes.as_matrix(W).shape
    a = jnp.asarray(rng.standard_normal((*stack, k)), "float32")
    scaled = eq.axes.from_matrix(eq.axes.as_matrix(W) * a[..., None, :], W)
    assert relative_error(expected * eq.on_y(a), jnp.einsum(equation, x, scaled)) < 1e-5
    b = jnp.asarray(rng.standard_normal((*stack, d)), "float32")
    scaled = eq.axes.from_matrix(eq.axes.as_matrix(W) * b[..., None], W)
    assert (
        relative_error(
            jnp.einsum(equation, x * eq.on_x(b), W),
            as_matrices(scaled),
        )
        < 1e-5
    )


@pytest.mark.parametrize(
    ("equation", "x_shape", "W_shape", "match"),
    [
        ("nd,dk", (4, 3), (3, 5), "must be 'x,W->y'"),
        ("nd,dk,kl->nl", (4, 3), (3, 5), "must be 'x,W->y'"),
        ("nd,dk->nk", (4, 3), (3, 5, 2), r"does not fit an input \(4, 3\) and a kernel"),
        ("nd,dkj->nk", (4, 3), (3, 5, 2), "not a product with a matrix"),
        ("nd,dd->nd", (4, 3), (3, 3), "not a product with a matrix"),
        ("nd,nd->n", (4, 3), (4, 3), "must share letters"),
        ("nd,d...->n...", (4, 3), (3, 5), r"the kernel has '\.\.\.'"),
        ("nd,dk->nk", (4, 3), (4, 5), "other sizes for 'd'"),
        ("nd,dk->nz", (4, 3), (3, 5), "not a product with a matrix"),
    ],
)
def test_no_matrix_product(equation, x_shape, W_shape, match):
    with pytest.raises(ValueError, match=match):
        Equation.parse(equation, x_shape, W_shape)


def test_many_axes_do_not_run_out_of_letters():
    letters = string.ascii_lowercase[:9]
    eq = Equation.parse(f"...{letters[-1]},{letters[-1]}Z->...Z", (1,) * 20, (1, 2))
    assert eq.result(jnp.zeros((1,) * 19 + (2,))).ndim == 20
