"""What one abstract call of the model tells."""

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import KernelAxes, LoraConfig, Rule

KEY = jax.random.key(0)


def found(model, variables, *args, **kwargs):
    axes = lora_jax.kernel_axes(model, variables, *args, **kwargs)
    return {path: (a.inputs, a.outputs, a.batch) for path, a in axes.items()}


def test_costs_no_memory_and_no_arithmetic():
    """A model that no machine here could hold, and inputs without values."""
    model = zoo.Scan(0)
    x = jax.ShapeDtypeStruct((1 << 40, zoo.WIDTH), jnp.float32)
    variables = jax.eval_shape(model.init, KEY, x)
    expected = {f"blocks/{name}/kernel": ((1,), (2,), (0,)) for name in ("down", "up")}
    assert found(model, variables, x) == expected


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stacks_whose_sizes_are_those_of_other_axes(axis):
    """Three layers of 3 x 3: the shapes tell nothing."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3, use_bias=False, name="dense")(x), None

    model = nn.scan(Layer, {"params": axis}, split_rngs={"params": True}, length=3)()
    x = jnp.ones((3, 3))
    inputs, outputs = (i for i in range(3) if i != axis % 3)
    variables = model.init(KEY, x, None)
    assert found(model, variables, x, None) == {
        "dense/kernel": ((inputs,), (outputs,), (axis % 3,))
    }


class Part(nn.Module):
    def setup(self):
        self.encoder, self.head, self.dropout = nn.Dense(6), nn.Dense(3), nn.Dropout(0.5)

    def __call__(self, x, *, deterministic):
        assert isinstance(deterministic, bool)
        return self.head(self.dropout(self.encode(x), deterministic=deterministic))

    def encode(self, x):
        return self.encoder(x)


def test_arguments_are_those_of_apply():
    model, x = Part(), np.ones((2, 6), np.float32)
    variables = model.init(KEY, x, deterministic=True)
    rngs = {"dropout": KEY}
    both = {f"{name}/kernel": ((0,), (1,), ()) for name in ("encoder", "head")}
    assert found(model, variables, x, deterministic=False, rngs=rngs) == both
    axes = lora_jax.kernel_axes(model, variables, x, method="encode")
    assert set(axes) == {"encoder/kernel"}
    with pytest.raises(ValueError, match=r"'head/kernel' \(6, 3\), on which.*does not depend"):
        lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule(".*kernel", 2)]), axes=axes)


def test_wrong_arguments():
    model, x = nn.Dense(3), jnp.ones((2, 6))
    variables = model.init(KEY, x)
    with pytest.raises(TypeError, match=r"kernel_axes is for flax\.linen modules.*got function"):
        lora_jax.kernel_axes(model.apply.__func__, variables, x)
    with pytest.raises(ValueError, match=r"\{'params': params\}"):
        lora_jax.kernel_axes(model, variables["params"], x)


def test_traces_the_model_once_and_leaves_its_cache_alone():
    """Also where nn.jit has the module in its cache, from a call before."""

    traces = []

    class Traced(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.jit(nn.Dense)(6)(x)

    model, x = Traced(), jnp.ones((2, 6))
    variables = model.init(KEY, x)
    model.apply(variables, x)
    traces.clear()
    for _ in range(2):
        assert len(lora_jax.kernel_axes(model, variables, x)) == 1
    assert len(traces) == 2
    assert model.apply(variables, x).shape == (2, 6)


class RawRead(nn.Module):
    """The logits read the embeddings in their own way, as Hugging Face's models do."""

    lifted: Any = staticmethod(lambda cls: cls)

    @nn.compact
    def __call__(self, tokens):
        embed = self.lifted(nn.Embed)(11, 6, name="embed")
        x = nn.Dense(6, name="dense")(embed(tokens))
        kernel = embed.variables["params"]["embedding"].T
        return (
            nn.Dense(11, use_bias=False).clone(parent=None).apply({"params": {"kernel": kernel}}, x)
        )


@pytest.mark.parametrize("lifted", [lambda cls: cls, nn.remat, nn.jit])
def test_tied_embeddings_are_found(lifted):
    tokens = jnp.arange(4)
    for model, tied in [(RawRead(lifted), {"embed/embedding"}), (zoo.Tied(), set())]:
        axes = lora_jax.kernel_axes(model, random_variables(model, tokens), tokens)
        assert axes.tied == tied
        assert set(axes) == {"embed/embedding", "dense/kernel"}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_tied_embeddings(variant):
    model, tokens = RawRead(), jnp.arange(4)
    variables = random_variables(model, tokens)
    params, axes = variables["params"], lora_jax.kernel_axes(model, variables, tokens)

    def split(**rule):
        config = LoraConfig([Rule(".*(kernel|embedding)", 2, variant=variant, **rule)])
        frozen, adapters = lora_jax.lora_init(KEY, params, config, axes=axes)
        return frozen, random_like(adapters)

    with pytest.raises(
        ValueError, match=r"'embed/embedding' \(11, 6\).*reads outside.*'materialize'"
    ):
        split()

    frozen, adapters = split(tied="materialize")
    assert adapters["embed"]["embedding"].materialize
    assert not adapters["dense"]["kernel"].materialize
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(y, model.apply({"params": merged}, tokens)) < 1e-5

    frozen, adapters = split(tied="untie")
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, tokens)
    of_layer = {"embed": {"embedding": adapters["embed"]["embedding"].replace(untied=False)}}
    embedding = lora_jax.lora_merge(frozen, of_layer)["embed"]["embedding"]
    x = embedding[tokens]
    dense = {"dense": adapters["dense"]}
    kernel = lora_jax.lora_merge(frozen, dense)["dense"]["kernel"]
    expected = (x @ kernel + params["dense"]["bias"]) @ params["embed"]["embedding"].T
    assert relative_error(y, expected) < 1e-5
    with pytest.raises(ValueError, match=r"'embed/embedding' has tied='untie'"):
        lora_jax.lora_merge(frozen, adapters)


def test_a_tie_needs_the_model():
    config = LoraConfig([Rule("kernel", 2, tied="materialize")])
    with pytest.raises(ValueError, match=r"'kernel' and has tied='materialize'.*kernel_axes"):
        lora_jax.lora_init(KEY, {"kernel": jnp.ones((3, 4))}, config)


def test_loops_and_custom_gradients_tie_nothing():
    """A kernel that goes unused through a control flow is not read there."""

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(module, x):
                return nn.Dense(6, name="dense")(x)

            nn.Dense(6, name="dense")(x)
            x = nn.while_loop(
                lambda _, x: (x < 1).all(), body, self, x, broadcast_variables="params"
            )
            return nn.cond(x.sum() > 0, body, lambda _, x: x, self, x)

    model, x = Loop(), jnp.ones((2, 6))
    axes = lora_jax.kernel_axes(model, model.init(KEY, x), x)
    assert set(axes) == {"dense/kernel"}
    assert not axes.tied


def test_axes_may_be_any_mapping():
    params = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((3, 4))}
    axes = {"a": KernelAxes((1, 2), (0,))}
    _, adapters = lora_jax.lora_init(KEY, params, LoraConfig([Rule(".*", 2)]), axes=axes)
    assert (adapters["a"].U.shape, adapters["a"].V.shape) == ((12, 2), (2, 2))
    assert (adapters["b"].U.shape, adapters["b"].V.shape) == ((3, 2), (2, 4))


def test_abstract_parameters():
    model, x = zoo.Scan(1), jnp.ones((2, zoo.WIDTH))
    variables = jax.eval_shape(model.init, KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule(".*kernel", 2, variant="dora")])
    with pytest.raises(TypeError, match=r"ShapeDtypeStruct.*jax\.eval_shape"):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    abstract = jax.eval_shape(
        lambda params: lora_jax.lora_init(KEY, params, config, axes=axes), variables["params"]
    )
    params = random_variables(model, x)["params"]
    concrete = lora_jax.lora_init(KEY, params, config, axes=axes)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, concrete)
    assert lora_jax.summary(*abstract).trained == lora_jax.summary(*concrete).trained


def test_a_rule_says_more_than_the_model():
    """Axes that a rule states are taken from it; the layer then checks them."""
    model, x = nn.DenseGeneral((3, 2)), jnp.ones((2, 6))
    variables = model.init(KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule("kernel", 2, input_axes=(0, 1))])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    with pytest.raises(ValueError, match=r"input_axes=\(0, 1\).*contracts input_axes=\(0,\)"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, x)


def test_parameters_that_come_back_are_not_tied():
    model, x = zoo.Scan(1), jnp.ones((2, zoo.WIDTH))
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x, mutable=True)
    assert len(axes) == 2
    assert not axes.tied


def test_ties_in_results_of_any_class():
    @dataclasses.dataclass
    class Output:
        logits: Any

    class Returns(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return Output(RawRead(name="inner")(tokens))

    tokens = jnp.arange(4)
    params = {"inner": random_variables(RawRead(), tokens)["params"]}
    axes = lora_jax.kernel_axes(Returns(), {"params": params}, tokens)
    assert axes.tied == {"inner/embed/embedding"}


class Unread(nn.Module):
    @nn.compact
    def __call__(self, x, head=True):
        x = nn.Dense(6, name="body")(x)
        y = nn.Dense(3, name="head")(x)
        return y if head else x


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig([Rule("head/kernel", 2, materialize=True)]),
        LoraConfig([Rule("body/kernel", 2)], trainable=["head/bias"]),
    ],
)
def test_what_nobody_reads_is_not_trained_in_silence(config):
    model, x = Unread(), jnp.ones((2, 6))
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    axes = lora_jax.kernel_axes(model, variables, x, head=False)
    if config.rules[0].materialize:
        axes = dataclasses.replace(axes, read=axes.read - {"head/kernel"})
    with pytest.raises(ValueError, match=r"'head/(kernel|bias)'.*does not depend"):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        ({"a": ((0,), (1,))}, TypeError, "axes must be what lora_jax.kernel_axes returns.*dict"),
        (nn.Dense(3), TypeError, "axes must be what.*got Dense"),
        (KernelAxes(), TypeError, "axes must be what.*got KernelAxes"),
        ({"a": KernelAxes((0, 1), (2,))}, ValueError, r"3 axes for 'a', but there is the shape"),
        ({"b": KernelAxes()}, ValueError, "2 axes for 'b', but there is no such parameter"),
    ],
)
def test_wrong_axes(axes, error, match):
    with pytest.raises(error, match=match):
        lora_jax.lora_init(KEY, {"a": jnp.ones((3, 4))}, LoraConfig([Rule("a", 2)]), axes=axes)


def test_printed():
    model, tokens = RawRead(), jnp.arange(4)
    text = str(lora_jax.kernel_axes(model, random_variables(model, tokens), tokens))
    assert text.splitlines() == [
        "dense/kernel     inputs (0,)  outputs (1,)  flax.linen.linear.Dense",
        "embed/embedding  inputs (0,)  outputs (1,)  tied  flax.linen.linear.Embed",
    ]


class Jitted(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6)(x)


class SameJit(nn.Module):
    """Layers that nn.jit cannot tell apart."""

    def setup(self):
        self.blocks = [Jitted() for _ in range(3)]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Score(nn.Module):
    """The gradient of a submodule, which is applied on its own."""

    def setup(self):
        self.net = nn.Dense(1)

    def __call__(self, x):
        if self.is_initializing():
            return self.net(x)
        net, variables = self.net.unbind()
        return jax.grad(lambda x: jnp.tanh(net.apply(variables, x)).sum())(x)


class Dictionary(nn.Module):
    """A parameter that is a dict itself, over which the model iterates."""

    @nn.compact
    def __call__(self, x):
        p = self.param("p", lambda key: {f"w{i}": jnp.eye(6) for i in range(3)})
        for name in sorted(p):
            x = jnp.tanh(x @ p[name])
        return nn.Dense(6, name="dense")(x)


class Sized(nn.Module):
    """Sizes from a NumPy array."""

    @nn.compact
    def __call__(self, x, sizes):
        return nn.Dense(4)(x.reshape(-1, int(sizes[0]) * int(sizes[1])))


class List(nn.Module):
    """A parameter that is a list."""

    @nn.compact
    def __call__(self, x):
        for w in self.param("p", lambda key: [jnp.eye(6), jnp.eye(6)]):
            x = x @ w
        return nn.Dense(6, name="dense")(x)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model", [SameJit(), Score(), Dictionary(), Sized(), List()])
def test_unusual_models(model, variant):
    x = jax.random.normal(KEY, (2, 6))
    args = (x, np.array([3, 2])) if isinstance(model, Sized) else (x,)
    variables = model.init(KEY, *args)
    axes = lora_jax.kernel_axes(model, variables, *args)
    config = LoraConfig([Rule("|".join(axes), 1, variant=variant)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    assert lora_jax.summary(frozen, adapters, config=config, axes=axes).total > 0
    adapters = random_like(adapters)
    for _ in range(2):
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, *args)
        merged = lora_jax.lora_merge(frozen, adapters)
        assert relative_error(y, model.apply({"params": merged}, *args)) < 1e-5


def test_parameters_in_a_dict_are_materialized_or_refused():
    model, x = Dictionary(), jnp.ones((2, 6))
    variables = model.init(KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    with pytest.raises(ValueError, match=r"'p/w0'.*not as a parameter of a module.*materialize"):
        lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule("p/.*", 2)]), axes=axes)
    config = LoraConfig([Rule("p/.*", 2, materialize=True)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    assert jnp.array_equal(y, model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, x))


def test_kernels_of_unknown_layers_are_reported_as_frozen():
    model, x = nn.Sequential([nn.RNN(nn.OptimizedLSTMCell(6)), nn.Dense(3)]), jnp.ones((2, 4, 6))
    variables = model.init(KEY, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = LoraConfig([Rule("|".join(axes), 2)])
    split = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    assert len(lora_jax.summary(*split, axes=axes).frozen_kernels) == 8


def test_errors_of_the_model_are_the_models_own():
    model = nn.Sequential([nn.Dense(6), lambda x: x + jnp.ones(5)])
    params = {"layers_0": {"kernel": jnp.ones((6, 6)), "bias": jnp.ones(6)}}
    with pytest.raises((TypeError, ValueError), match=r"[Ii]ncompatible shapes"):
        lora_jax.kernel_axes(model, {"params": params}, jnp.ones((2, 6)))
