"""Handlers are a value: a call computes with those that it is given, and nothing else."""

import copy
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import Handlers, LoraConfig, Rule
from lora_jax import _compat as compat

KEY, X = jax.random.key(0), jnp.ones((2, 6))


class Own(nn.Module):
    """A layer that nobody has registered."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 6))


TRACES = []


def once(layer, w, x):
    TRACES.append("once")
    return w.einsum("nd,dk->nk", x)


def twice(layer, w, x):
    TRACES.append("twice")
    return 2 * w.einsum("nd,dk->nk", x)


ONCE = Handlers().with_handler(Own, "w", handler=once)
TWICE = Handlers().with_handler(Own, "w", handler=twice)


class Model(nn.Module):
    """Its layer is in the cache of nn.jit from one call to the next."""

    lifted: str = "jit"

    @nn.compact
    def __call__(self, x):
        lift = {"jit": nn.jit, "remat": nn.remat, "plain": lambda cls: cls}[self.lifted]
        return lift(Own)(name="own")(x)


def split(model, pattern=".*", handlers=ONCE, x=X):
    params = random_variables(model, x)["params"]
    config = LoraConfig([Rule(pattern, 2)])
    frozen, adapters = lora_jax.lora_init_model(
        KEY, model, {"params": params}, config, x, handlers=handlers
    )
    return {"params": frozen}, random_like(adapters)


@pytest.mark.parametrize("lifted", ["jit", "remat", "plain"])
def test_calls_with_different_handlers_share_no_trace(lifted):
    model = Model(lifted)
    variables, adapters = split(model)
    merged = {"params": lora_jax.lora_merge(variables["params"], adapters)}
    expected = model.apply(merged, X)
    for _ in range(2):
        for handlers, factor in ((ONCE, 1), (TWICE, 2)):
            y = lora_jax.lora_apply(model, variables, adapters, X, handlers=handlers)
            assert relative_error(y, factor * expected) < 1e-5


def test_rows_of_a_mixed_batch_have_the_handlers_of_the_call():
    model = Model()
    variables, adapters = split(model)
    stacked = lora_jax.stack([adapters, random_like(adapters, seed=1)])
    one, two = (
        lora_jax.lora_apply(
            model, variables, stacked, X, adapter_ids=jnp.array([1, -1]), handlers=handlers
        )
        for handlers in (ONCE, TWICE)
    )
    assert relative_error(two, 2 * one) < 1e-5


def test_equal_handlers_share_a_trace():
    model = Model()
    variables, adapters = split(model)

    def apply(handlers):
        return lora_jax.lora_apply(model, variables, adapters, X, handlers=handlers)

    apply(ONCE)
    count = len(TRACES)
    apply(ONCE)
    own = len(TRACES) - count
    apply(Handlers().with_handler(Own, "w", handler=once))
    assert len(TRACES) - count == 2 * own


def test_what_is_registered_later_counts_in_the_cache_of_nn_jit_too():
    class Later(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (x.shape[-1], 6))

    model = nn.Sequential([nn.jit(Later)()])
    lora_jax.register(Later, "w")(once)
    variables, adapters = split(model, handlers=None)
    y = lora_jax.lora_apply(model, variables, adapters, X)
    lora_jax.register(Later, "w", override=True)(twice)
    assert relative_error(lora_jax.lora_apply(model, variables, adapters, X), 2 * y) < 1e-5


def test_what_is_registered_is_not_seen_by_a_call_with_handlers():
    class Registered(Own):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x)

    lora_jax.register(Registered, "w")(lambda layer, w, x: once(layer, w, x))
    model, variables = Registered(), random_variables(Registered(), X)
    assert set(lora_jax.kernel_axes(model, variables, X)) == {"w"}
    assert set(lora_jax.kernel_axes(model, variables, X, handlers=Handlers.registered())) == {"w"}
    assert set(lora_jax.kernel_axes(model, variables, X, handlers=Handlers())) == set()
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule("w", 2)]))
    with pytest.raises(ValueError, match=r"no handler for .*Registered.*with_handler\("):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, X, handlers=Handlers())
    lora_jax.lora_apply(model, {"params": frozen}, adapters, X)


def test_without_a_handler_of_this_library():
    model = nn.Sequential([nn.Dense(6), nn.Conv(6, (3,))])
    params = random_variables(model, X)["params"]
    without = Handlers().without(nn.Dense)
    axes = lora_jax.kernel_axes(model, {"params": params}, X, handlers=without)
    assert set(axes) == {"layers_1/kernel"}
    frozen, adapters = lora_jax.lora_init(KEY, params, LoraConfig([Rule("layers_0/kernel", 2)]))
    with pytest.raises(ValueError, match=r"no handler for flax\.linen\.linear\.Dense"):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, X, handlers=without)
    with pytest.raises(ValueError, match="its __call__ has no handler"):
        without.without(nn.Dense)
    own = without.with_handler(nn.Dense, "kernel", handler=lambda layer, kernel, x: x)
    assert own != Handlers()


def test_a_use_that_other_handlers_do_not_adapt_is_found():
    """Of an embedding that gives the logits too: without its handler that is another use."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(7, 6, name="embed")
            return embed.attend(embed(ids))

    model, ids = Tied(), jnp.arange(4)
    fewer = Handlers().without(nn.Embed, method="attend")
    variables, adapters = split(model, handlers=None, x=ids)
    lora_jax.lora_apply(model, variables, adapters, ids)
    with pytest.raises(ValueError, match="also reads 'embed/embedding' outside of its layer"):
        lora_jax.lora_apply(model, variables, adapters, ids, handlers=fewer)
    more = fewer.with_handler(
        nn.Embed,
        "embedding",
        method="attend",
        handler=lambda layer, w, x: w.einsum("nk,dk->nd", x, transposed=True),
    )
    variables, adapters = split(model, handlers=more, x=ids)
    lora_jax.lora_apply(model, variables, adapters, ids, handlers=more)
    with pytest.raises(ValueError, match="also reads 'embed/embedding' outside of its layer"):
        lora_jax.lora_apply(model, variables, adapters, ids, handlers=fewer)


def test_handlers_are_values():
    assert Own.__qualname__ not in repr(Handlers())
    assert repr(ONCE).endswith(f"{Own.__qualname__})")
    again = Handlers().with_handler(Own, "w", handler=once)
    assert (again == ONCE, hash(again) == hash(ONCE), ONCE == TWICE) == (True, True, False)
    assert ONCE.with_handler(Own, "w", handler=once) == ONCE
    assert ONCE.with_handler(Own, "w", handler=twice, override=True) == TWICE
    assert ONCE.without(Own) == Handlers()
    assert copy.deepcopy(ONCE) == ONCE
    with pytest.raises(dataclasses.FrozenInstanceError):
        ONCE._entries = {}
    with pytest.raises(TypeError, match="does not support item assignment"):
        ONCE._entries[once] = None


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (
            (once, "w"),
            {},
            TypeError,
            "with_handler is for classes of flax.linen and flax.nnx modules",
        ),
        ((Own,), {}, ValueError, r"with_handler\(Own, ...\): name the parameters"),
        ((Own, "w"), {"method": "encode"}, ValueError, "does not define encode itself"),
        ((nn.Conv, "kernel"), {}, ValueError, "It inherits it from _Conv"),
        ((nn.Dense, "kernel"), {}, ValueError, "has a handler of this library.*override=True"),
        ((Own, "b"), {}, ValueError, r"has a handler for \('w',\).*with_handler\(Own, 'a', 'b'\)"),
        ((Own, "w"), {}, ValueError, r"has the handler once for \('w',\) already.*override=True"),
        ((Own, "w"), {"handler": "w"}, TypeError, "the handler must be a function, got 'w'"),
    ],
)
def test_bad_handlers(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        ONCE.with_handler(*args, **{"handler": twice, **kwargs})


def test_a_handler_for_a_layer_of_a_package_is_not_replaced_by_chance():
    class Embedder(nn.Module):
        def decode(self, x):
            return x

    function = Embedder.decode
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    module, name = compat.GEMMA_DECODE.split(".Embedder")
    function.__module__, function.__qualname__ = module, "Embedder" + name
    with pytest.raises(ValueError, match="has a handler of this library"):
        lora_jax.register(Embedder, "w", method="decode")
    handlers = Handlers().with_handler(Embedder, "w", method="decode", handler=once, override=True)
    with pytest.raises(ValueError, match="its decode has no handler"):
        handlers.without(Embedder, method="decode").without(Embedder, method="decode")


class Named(nn.Module):
    """Its own argument has the name of that of ``lora_apply``."""

    @nn.compact
    def __call__(self, x, handlers=1):
        return handlers * nn.Dense(6)(x)


def test_an_argument_of_the_model_with_this_name_is_passed_by_position():
    model = Named()
    variables = random_variables(model, X)
    config = LoraConfig([Rule(".*kernel", 2)])
    frozen, adapters = lora_jax.lora_init_model(KEY, model, variables, config, X, 3)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, X, 3)
    assert jnp.array_equal(y, model.apply(variables, X, handlers=3))
    for call in (
        lambda: lora_jax.kernel_axes(model, variables, X, handlers=3),
        lambda: lora_jax.lora_init_model(KEY, model, variables, config, X, handlers=3),
        lambda: lora_jax.lora_apply(model, {"params": frozen}, adapters, X, handlers=3),
    ):
        with pytest.raises(TypeError, match=r"lora_jax\.Handlers, got int.*by position only"):
            call()


def test_the_layer_of_the_user_is_left_as_it_is():
    """Also while its product is computed."""
    bound, seen = [], []

    class Layer(nn.Dense):
        @nn.compact
        def __call__(self, x):
            bound.append(self)
            return super().__call__(x)

    def own_dot(x, W, dims, **kwargs):
        seen.append(bound[-1].dot_general is own_dot)
        return jax.lax.dot_general(x, W, dims, **kwargs)

    model = Layer(6, dot_general=own_dot)
    variables, adapters = split(model, "kernel", handlers=None)
    seen.clear()
    y = lora_jax.lora_apply(model, variables, adapters, X)
    merged = {"params": lora_jax.lora_merge(variables["params"], adapters)}
    assert relative_error(y, model.apply(merged, X)) < 1e-5
    assert seen
    assert all(seen)


def doubles(next_fun, args, kwargs, context):
    y = next_fun(*args, **kwargs)
    return 2 * y if context.method_name == "__call__" else y


LAYERS = [
    nn.Dense(6),
    nn.Conv(6, (3,)),
    nn.ConvLocal(6, (3,)),
    nn.ConvTranspose(6, (3,)),
    nn.Einsum((6, 6), "nd,dk->nk"),
    Own(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_interceptors_around_the_call_are_as_they_are_without_adapters(layer):
    variables, adapters = split(layer, "kernel|w")
    merged = {"params": lora_jax.lora_merge(variables["params"], adapters)}
    with nn.intercept_methods(doubles):
        y = lora_jax.lora_apply(layer, variables, adapters, X, handlers=ONCE)
        assert relative_error(y, layer.apply(merged, X)) < 1e-5


class Intercepts(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        with nn.intercept_methods(doubles):
            return self.layer(x)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_interceptors_inside_of_the_model_are_not_skipped_in_silence(layer):
    model = Intercepts(layer)
    params = random_variables(model, X)["params"]
    rule = Rule(".*(kernel|w)", 2)
    match = r"'layer/(kernel|w)' .*model intercepts its calls itself.*materialize=True"
    axes = lora_jax.kernel_axes(model, {"params": params}, X, handlers=ONCE)
    with pytest.raises(ValueError, match=match):
        lora_jax.lora_init(KEY, params, LoraConfig([rule]), axes=axes)
    for materialize in (False, True):
        inputs = tuple(range(jax.tree.leaves(params["layer"])[-1].ndim - 1))
        config = LoraConfig([dataclasses.replace(rule, input_axes=inputs, materialize=materialize)])
        frozen, adapters = lora_jax.lora_init(KEY, params, config)
        adapters = random_like(adapters)
        if materialize:
            y = lora_jax.lora_apply(model, {"params": frozen}, adapters, X, handlers=ONCE)
            merged = {"params": lora_jax.lora_merge(frozen, adapters)}
            assert relative_error(y, model.apply(merged, X)) < 1e-5
        else:
            with pytest.raises(ValueError, match=match):
                lora_jax.lora_apply(model, {"params": frozen}, adapters, X, handlers=ONCE)
