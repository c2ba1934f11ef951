"""Public names: what they are, and those of before, which work for one version more."""

import dataclasses
import importlib
import pkgutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Adapter, KernelAxes, LoraConfig, Rule

PUBLIC = [lora_jax, lora_jax.peft]


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: package.__name__)
def test_all_that_is_shown_is_public(package):
    shown = {name for name in dir(package) if not name.startswith("_")}
    assert shown == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


def test_all_modules_are_private():
    """By a leading underscore, but packages and what `python -m` runs."""
    modules = pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")
    names = [(m.name.rpartition(".")[2], m.ispkg) for m in modules]
    assert len(names) > 50
    assert [name for name, is_package in names if not is_package and name[0] != "_"] == []
    for module in pkgutil.iter_modules(lora_jax.__path__, "lora_jax."):
        assert importlib.import_module(module.name).__doc__, module.name


@pytest.mark.parametrize(
    ("package", "old", "new"),
    [
        (lora_jax, "freeze_norm", "cache_norm"),
        (lora_jax, "each_adapter", "per_adapter"),
        (lora_jax, "Whole", "FullyTrained"),
        (lora_jax, "Shift", "LoraBias"),
        (lora_jax.peft, "Name", "KeyMapping"),
    ],
)
def test_old_name(package, old, new):
    with pytest.warns(DeprecationWarning, match=rf"{old} is now {package.__name__}.{new}"):
        assert getattr(package, old) is getattr(package, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def trained():
    params = {"kernel": jnp.ones((4, 3))}
    _, adapters = lora_jax.lora_init(jax.random.key(0), params, LoraConfig([Rule("kernel", 2)]))
    return jax.tree.map(lambda x: x + 0.5, adapters)


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        (
            lambda: Rule("a", 1, stack_axes=(0,)),
            lambda: Rule("a", 1, batch_axes=(0,)),
            "batch_axes",
        ),
        (lambda: Rule("a", 1, substitute=True), lambda: Rule("a", 1, materialize=True), "material"),
        (
            lambda: Rule("a", 1, tied="substitute"),
            lambda: Rule("a", 1, tied="materialize"),
            "tied='materialize'",
        ),
        (
            lambda: KernelAxes((1,), (2,), stacks=(0,)),
            lambda: KernelAxes((1,), (2,), (0,)),
            "batch",
        ),
        (lambda: KernelAxes((1,), (2,), (0,)).stacks, lambda: (0,), "batch"),
        (lambda: KernelAxes((1,), (2,), (0,)).stack_shape((5, 2, 3)), lambda: (5,), "batch_shape"),
        (lambda: Rule("a", 1, batch_axes=(0,)).stack_axes, lambda: (0,), "batch_axes"),
        (lambda: trained()["kernel"].substitute, lambda: False, "materialize"),
        (
            lambda: lora_jax.combine([trained()], [2.0], method="linear")[0],
            lambda: lora_jax.combine([trained()], [2.0], combination_type="linear")[0],
            "combination_type=",
        ),
        (
            lambda: lora_jax.compress(trained(), energy=0.9)[0],
            lambda: lora_jax.compress(trained(), explained_variance=0.9)[0],
            "explained_variance=",
        ),
    ],
)
def test_old_argument(old, new, names):
    with pytest.warns(DeprecationWarning, match=names):
        found = old()
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), found, new())
    assert jax.tree.all(same)


@pytest.mark.parametrize(
    ("value", "old", "new"),
    [
        (Rule("a", 1), {"substitute": True}, {"materialize": True}),
        (Rule("a", 1, batch_axes=(0,)), {"stack_axes": ()}, {"batch_axes": ()}),
        (
            KernelAxes((1,), (2,), (0,)),
            {"inputs": (0,), "stacks": (1,)},
            {"inputs": (0,), "batch": (1,)},
        ),
        (Adapter(1.0, 2.0), {"substitute": True}, {"materialize": True}),
        (Adapter(1.0, 2.0, 3.0, "dora"), {"detach_norm": True}, {"variant": lora_jax.DoRA(True)}),
    ],
)
def test_old_field_in_replace(value, old, new):
    """Which passes all fields: those that stay, and so the new name too."""
    with pytest.warns(DeprecationWarning, match=" is now "):
        found = dataclasses.replace(value, **old)
    assert found == dataclasses.replace(value, **new)


def test_both_names_of_an_argument():
    with pytest.raises(TypeError, match="substitute= is the old name of materialize="):
        Rule("a", 1, substitute=True, materialize=True)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.einsum("etd,edk->etk", x, self.param("w", nn.initializers.ones, (2, 3, 4)))


def test_old_arguments_of_a_handler():
    @lora_jax.register(Stacked, "w")
    def handler(layer, w, x):
        def product(x, W):
            return jnp.einsum("etd,edk->tek", x, W)

        return jnp.moveaxis(w.linear(product, x, inputs=(1,), stacks=(0,)), 1, 0)

    model, x = Stacked(), jnp.ones((2, 5, 3))
    variables = model.init(jax.random.key(0), x)
    with pytest.warns(DeprecationWarning, match="batch_axes="):
        axes = lora_jax.kernel_axes(model, variables, x)
    assert axes["w"] == KernelAxes((1,), (2,), (0,))
