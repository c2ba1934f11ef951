"""What several tests need."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax


def relative_error(got, expected):
    """The largest difference over the largest magnitude."""
    # By NumPy: JAX would compile every one of these operations, for every shape.
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    assert np.isfinite(expected).all()
    return float(np.abs(got - expected).max() / np.maximum(np.abs(expected).max(), 1e-30))


@contextlib.contextmanager
def only_new_garbage():
    """Garbage is looked for in what is made in here, not in all of JAX and its caches.

    Who looks for leaks collects it after every trace, a third of a second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def checking_leaks():
    """`jax.checking_leaks`, quicker."""
    with only_new_garbage(), jax.checking_leaks():
        yield


def random_like(tree, seed=0, scale=0.3):
    """The tree with noise on every leaf: no factor at zero, and an m that is not the norm."""
    rng = np.random.default_rng(seed)

    def noisy(x):
        noise = scale * rng.standard_normal(x.shape)
        return jnp.asarray(np.asarray(x, np.float32) + noise, x.dtype)

    return jax.tree.map(noisy, tree)


def random_variables(model, *args, **kwargs):
    """Variables for a model: as `model.init`, but quickly, and with biases that are not zero."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables = random_like(zeros)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return variables


def layer_arrays(d=7, k=5, r=3, n=4, seed=0):
    """``x``, ``W``, ``U``, ``V`` and ``m`` of one layer."""
    rng = np.random.default_rng(seed)
    shapes = {"x": (n, d), "W": (d, k), "U": (d, r), "V": (r, k), "m": (k,)}
    return {name: jnp.asarray(rng.standard_normal(s), "float32") for name, s in shapes.items()}


def dense_case(model, x, **rule):
    """A base, and adapters of all its kernels with noise on them."""
    params = random_variables(model, x)["params"]
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", **{"rank": 2, **rule})])
    frozen, adapters = lora_jax.lora_init(jax.random.key(1), params, config)
    return frozen, random_like(adapters)
