"""What nobody promises, taken away: an error, a refusal, or an answer that is right."""

import collections
import dataclasses
import functools

import flax.core.lift
import flax.core.scope
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx
from helpers import random_like, random_variables, relative_error
from jax.extend.core import Literal, Primitive

import lora_jax
from lora_jax import LoraConfig, Rule
from lora_jax import _compat as compat
from lora_jax.tracing._liveness import live_inputs

KEY = jax.random.key(0)
X = random_like(jnp.zeros((4, zoo.WIDTH)), seed=1, scale=1.0)


def split(model, x=X, axes=None, **rule):
    """Variables of the model, and adapters of all its kernels with noise on them."""
    variables = random_variables(model, x)
    config = LoraConfig([Rule(r"(.*/)?kernel", 2, **rule)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    return variables, {"params": frozen}, random_like(adapters)


# --- arrays without a value ---


@pytest.mark.parametrize("gone", [False, True])
def test_is_traced(monkeypatch, gone):
    if gone:
        monkeypatch.delattr(jax.core, "Tracer")
    values = [1.0, np.ones(2), jnp.ones(2), KEY]
    assert [compat.is_traced(x) for x in values] == [False] * 4
    found = []

    def look(x):
        found.append(compat.is_traced(x))
        return x

    jax.jit(look)(1.0)
    jax.jit(look)(KEY)
    jax.vmap(look)(jnp.ones(2))
    jax.grad(look)(1.0)
    assert found == [True] * 4


@pytest.mark.parametrize("gone", [False, True])
def test_trace_state(monkeypatch, gone):
    gone |= not hasattr(jax.extend.core, "get_opaque_trace_state")
    if gone:
        monkeypatch.delattr(jax.extend.core, "get_opaque_trace_state", raising=False)
    here = compat.trace_state()
    assert (compat.trace_state() == here) is not gone
    found = []
    jax.eval_shape(lambda x: found.append(compat.trace_state() == here), 1.0)
    assert found == [False]


# --- a barrier ---


@pytest.mark.parametrize(
    "name",
    [
        "jax.extend.core.Primitive",
        "jax.interpreters.ad.deflinear2",
        "jax.interpreters.batching.primitive_batchers",
        "jax.interpreters.mlir.lower_fun",
        "jax.interpreters.mlir.register_lowering",
    ],
)
def test_without_a_primitive_of_its_own_there_is_no_barrier(monkeypatch, name):
    monkeypatch.delattr(name)
    barrier = compat.defined_barrier()
    x = jnp.ones((2, 3))
    assert "optimization_barrier" not in jax.jit(barrier).lower(x).as_text()
    assert jnp.array_equal(jax.grad(lambda x: jnp.sum(barrier(x) ** 2))(x), 2 * x)


# --- a product with its own forms for platforms ---


@pytest.mark.parametrize(
    "name",
    [
        "jax.extend.core.Primitive",
        "jax.interpreters.ad.defbilinear",
        "jax.interpreters.batching.primitive_batchers",
        "jax.interpreters.mlir.lower_fun",
        "jax.interpreters.mlir.register_lowering",
    ],
)
def test_without_a_primitive_of_its_own_a_product_is_wide(monkeypatch, name):
    monkeypatch.delattr(name)
    product = compat.defined_bilinear(lambda A, W, transposed: 0 * A, {})
    A, W = jnp.ones((2, 3)), jnp.ones((3, 4), jnp.bfloat16)
    assert jnp.array_equal(product(A, W), jnp.full((2, 4), 3.0))
    assert jnp.array_equal(product(A, W.T, transposed=True), jnp.full((2, 4), 3.0))
    assert jnp.array_equal(jax.grad(lambda A: product(A, W).sum())(A), jnp.full((2, 3), 4.0))


@pytest.mark.parametrize(
    "name",
    [
        "jax.extend.core.Primitive",
        "jax.extend.core.jaxpr_as_fun",
        "jax.extend.core.ClosedJaxpr",
        "jax.interpreters.ad.Zero",
        "jax.interpreters.ad.instantiate_zeros",
        "jax.interpreters.ad.primitive_jvps",
        "jax.interpreters.ad.primitive_transposes",
        "jax.interpreters.batching.primitive_batchers",
        "jax.interpreters.mlir.lower_fun",
        "jax.interpreters.mlir.register_lowering",
    ],
)
def test_without_a_primitive_of_its_own_what_is_computed_anew_is_a_checkpoint(monkeypatch, name):
    """The same numbers: `tests/quantized` has both."""
    monkeypatch.delattr(name)
    assert compat.defined_calls_anew() is None


def test_inside_of_shard_map_a_product_is_wide():
    """There types say over which axes of the mesh numbers differ."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    spec = jax.sharding.PartitionSpec("x")
    A, W = jnp.ones((4, 2, 3)), jnp.ones((4, 3, 5), jnp.bfloat16)
    product = compat.defined_bilinear(lambda A, W, transposed: 0 * A, {})
    got = jax.shard_map(product, mesh=mesh, in_specs=spec, out_specs=spec)(A, W)
    assert jnp.array_equal(got, jnp.full((4, 2, 5), 3.0))


# --- what jax.make_jaxpr gives ---

# Each with one equation, of which one input has no part in the first output.
EQUATIONS = {
    "scan": lambda x, y, z: jax.lax.scan(lambda c, x: (c + x, y), z, x),
    "while": lambda x, y, z: jax.lax.while_loop(
        lambda c: c[0] < z, lambda c: (c[0] + 1, y * c[0]), (0.0, y)
    ),
    "cond": lambda x, y, z: jax.lax.cond(True, lambda x, y: (x, 2 * y), lambda x, y: (-x, y), x, y),
    "jit": jax.jit(lambda x, y, z: (x + z, y)),
}
# What another jax may make of it.
CHANGES = {
    "another name": lambda eqn: eqn.replace(primitive=Primitive("unknown")),
    "no parameters": lambda eqn: eqn.replace(params={}),
    "no functions": lambda eqn: eqn.replace(params=dict.fromkeys(eqn.params)),
    "names of another": lambda eqn: eqn.replace(primitive=Primitive(OTHER[eqn.primitive.name])),
    "an input less": lambda eqn: eqn.replace(invars=eqn.invars[1:]),
    "an output less": lambda eqn: eqn.replace(outvars=eqn.outvars[:1]),
    "another order": lambda eqn: eqn.replace(invars=eqn.invars[::-1]),
}
OTHER = {"scan": "while", "while": "cond", "cond": "scan", "jit": "cond"}


def live_in_equation(name, change=lambda eqn: eqn):
    jaxpr = jax.make_jaxpr(EQUATIONS[name])(jnp.ones(3), jnp.ones((2, 2)), 1.0).jaxpr
    (eqn,) = (change(eqn) for eqn in jaxpr.eqns if eqn.primitive.name == name)
    invars = [v for v in eqn.invars if not isinstance(v, Literal)]
    one = jaxpr.replace(eqns=[eqn], invars=invars, outvars=eqn.outvars)
    return live_inputs(one, [True] + [False] * (len(eqn.outvars) - 1))


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_input_counts_as_used_where_jax_has_changed(name, change):
    assert not all(live_in_equation(name))
    if (name, change) != ("jit", "another order"):  # which the same types do not show
        assert all(live_in_equation(name, CHANGES[change]))


@pytest.mark.parametrize("name", EQUATIONS)
def test_no_input_is_lost_where_parameters_have_other_names(name):
    def renamed(eqn):
        return eqn.replace(params={f"new_{key}": value for key, value in eqn.params.items()})

    live = live_in_equation(name, renamed)
    assert live == live_in_equation(name) or all(live)


def test_an_unknown_loop_is_refused_and_can_be_materialized(monkeypatch):
    """As a jax that writes its scan down otherwise than all that are known would have it."""
    model, x = zoo.Scan(0), jnp.ones((2, zoo.WIDTH))
    variables = random_variables(model, x)
    assert not lora_jax.kernel_axes(model, variables, x).tied

    monkeypatch.delitem(compat._KNOWN, "scan")
    axes = lora_jax.kernel_axes(model, variables, x)
    assert axes.tied == set(axes) == {"blocks/up/kernel", "blocks/down/kernel"}
    pattern = "blocks/.*/kernel"
    with pytest.raises(ValueError, match=r"'blocks/down/kernel'.*tied='materialize'"):
        lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule(pattern, 2)]), axes=axes)
    config = LoraConfig([Rule(pattern, 2, tied="materialize")])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
    merged = lora_jax.lora_merge(frozen, adapters)
    assert relative_error(y, model.apply({"params": merged}, x)) < 1e-5


def converts(*arrays, dtype, **kwargs):
    return nn.dtypes.promote_dtype(*arrays, dtype=dtype, **kwargs)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(zoo.WIDTH, name="first")(x)
        return x + nn.Dense(zoo.WIDTH, name="second")(x)


def test_without_marks_it_is_asked_which_layers_are_heads(monkeypatch):
    variables = random_variables(Residual(), X)
    assert lora_jax.kernel_axes(Residual(), variables, X).unsure == set()
    monkeypatch.setattr("lora_jax.tracing._liveness.mark_of", lambda eqn: None)
    axes = lora_jax.kernel_axes(Residual(), variables, X)
    assert (axes.heads, axes.unsure) == (set(), {"first/kernel", "second/kernel"})


def test_a_promotion_that_is_not_known_is_refused(monkeypatch):
    model = nn.Dense(5, promote_dtype=converts, dtype=jnp.bfloat16)
    variables = random_variables(model, X)
    assert set(lora_jax.kernel_axes(model, variables, X)) == {"kernel"}
    monkeypatch.setattr(jax.lax.convert_element_type_p, "name", "another")
    axes = lora_jax.kernel_axes(model, variables, X)
    assert "promote_dtype" in axes.refused["kernel"]


# --- Flax's scopes ---


class Mapped(nn.Module):
    """A dense layer of bounded weights."""

    @nn.compact
    def __call__(self, x, _=None):
        def bounded(tree):
            return jax.tree.map(jnp.tanh, tree)

        mapped = nn.map_variables(nn.Dense, "params", bounded, init=self.is_initializing())
        return mapped(zoo.WIDTH, name="d")(x), None


class MapsStatistics(nn.Module):
    """Another collection is mapped, as by the scans of T5X."""

    @nn.compact
    def __call__(self, x, _=None):
        mapped = nn.map_variables(nn.Dense, "batch_stats", lambda tree: tree)
        return mapped(zoo.WIDTH, name="d")(x), None


def scanned(cls):
    return nn.scan(cls, {"params": 0}, split_rngs={"params": True}, length=2)()


def nothing_said(scope):
    return ()


def said_otherwise(scope):
    return tuple(f"{part} of transform" for part in scope.path)


@pytest.fixture(params=[nothing_said, said_otherwise])
def no_debug_path(request, monkeypatch):
    path = property(request.param, lambda scope, value: None)
    monkeypatch.setattr(flax.core.scope.Scope, "debug_path", path, raising=False)


REFUSED = r"kernel' .*mapped by nn\.map_variables.*materialize=True"


def check_refused(model, *args):
    """By kernel_axes, and by lora_apply where the axes are said."""
    variables = random_variables(model, *args)
    axes = lora_jax.kernel_axes(model, variables, *args)
    assert list(axes) == []
    config = LoraConfig([Rule(".*kernel", 2)])
    with pytest.raises(ValueError, match=REFUSED):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    kernels = dict(axes.kernels)
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=kernels)
    with pytest.raises(ValueError, match=REFUSED):
        lora_jax.lora_apply(model, {"params": frozen}, adapters, *args)


@pytest.mark.parametrize("model", [Mapped(), scanned(Mapped), zoo.Scan(0)])
def test_without_debug_path_layers_in_transforms_are_refused(no_debug_path, model):
    """As what is around them might map their parameters."""
    check_refused(model, X)


def test_without_debug_path_other_layers_are_adapted(no_debug_path):
    model = zoo.Compact()
    variables, frozen, adapters = split(model)
    assert set(lora_jax.kernel_axes(model, variables, X)) == {"first/kernel", "second/kernel"}
    merged = {"params": lora_jax.lora_merge(frozen["params"], adapters)}
    y = lora_jax.lora_apply(model, frozen, adapters, X)
    assert relative_error(y, model.apply(merged, X)) < 1e-5


@pytest.mark.parametrize("gone", ["module", "variable"])
def test_where_a_map_does_not_say_of_what_it_is_one_of_parameters(monkeypatch, gone):
    model = scanned(MapsStatistics)
    axes = lora_jax.kernel_axes(model, random_variables(model, X), X)
    assert set(axes) == {"d/kernel"}
    if gone == "module":
        monkeypatch.setitem(vars(flax.core.lift), "__name__", "flax.core.moved")
    else:
        monkeypatch.setattr(compat, "_MAPPED", "another")
    check_refused(model, X)


def test_where_flax_gives_another_method_every_layer_is_refused(monkeypatch):
    """As the model itself may intercept it, which a handler would skip."""
    model = zoo.Compact()
    _, frozen, adapters = split(model)

    @dataclasses.dataclass(frozen=True)
    class Context(nn.module.InterceptorContext):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name == "orig_method":
                return functools.partial(value.func, *value.args)
            return value

    lora_jax.lora_apply(model, frozen, adapters, X)
    monkeypatch.setattr(nn.module, "InterceptorContext", Context)
    refused = r"intercepts its calls itself.*materialize=True"
    with pytest.raises(ValueError, match=refused):
        lora_jax.lora_apply(model, frozen, adapters, X)
    axes = lora_jax.kernel_axes(model, {"params": frozen["params"]}, X)
    assert list(axes) == []


@pytest.mark.parametrize(
    "counters", [lambda scope: collections.defaultdict(int), lambda scope: {"dropout": 0}]
)
def test_dropout_needs_the_counters_of_keys(monkeypatch, counters):
    _, frozen, adapters = split(zoo.Compact(), dropout=0.5)
    rngs = {"dropout": KEY}
    lora_jax.lora_apply(zoo.Compact(), frozen, adapters, X, rngs=rngs)
    monkeypatch.setattr(
        flax.core.scope.Scope,
        "rng_counters",
        property(counters, lambda scope, value: None),
        raising=False,
    )
    with pytest.raises(RuntimeError, match=r"Flax .* has no Scope\.rng_counters"):
        lora_jax.lora_apply(zoo.Compact(), frozen, adapters, X, rngs=rngs)
    lora_jax.lora_apply(zoo.Compact(), frozen, adapters, X)


# --- layers of packages ---


@pytest.mark.parametrize("moved", [False, True])
def test_a_layer_of_a_package_that_has_moved_is_unknown(moved):
    class Einsum(nn.Module):
        weight_name: str = "w"

        @nn.compact
        def __call__(self, eqn, x):
            return jnp.einsum(eqn, x, self.param("w", nn.initializers.normal(), (zoo.WIDTH, 5)))

    function = Einsum.__call__
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    module, name = compat.GEMMA_EINSUM.split(".Einsum")
    function.__module__, function.__qualname__ = module + "2" * moved, "Einsum" + name
    variables = random_variables(Einsum(), "bd,dk->bk", X)
    axes = lora_jax.kernel_axes(Einsum(), variables, "bd,dk->bk", X)
    assert set(axes) == (set() if moved else {"w"})
    config = LoraConfig([Rule("w", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config)
    if moved:
        with pytest.raises(ValueError, match=r"'w'.*there is no handler for .*Einsum"):
            lora_jax.lora_apply(Einsum(), {"params": frozen}, adapters, "bd,dk->bk", X)


# --- NNX ---


class Scanned(nnx.Module):
    """Layers that are stacked in the second axis of their kernel."""

    def __init__(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=1)
        def make(rngs):
            return nnx.Linear(4, 4, use_bias=False, rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 1), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


def test_a_kernel_counts_as_changed_where_what_slices_it_has_another_name(monkeypatch):
    graphdef, state = nnx.split(Scanned())
    assert list(lora_jax.kernel_axes(graphdef, state, jnp.ones((2, 4)))) == ["layers/kernel"]
    monkeypatch.setattr(compat, "_PASS_ON", set())
    axes = lora_jax.kernel_axes(graphdef, state, jnp.ones((2, 4)))
    assert "an adapter would not be changed alike" in axes.refused["layers/kernel"]


def test_a_class_that_does_not_say_whether_it_is_a_pytree_is_as_flax_makes_it():
    assert compat.nnx_class_options(nnx.Linear) == {}
    assert compat.nnx_class_options(type("Silent", (), {})) == {}
    assert compat.nnx_class_options(type("No", (), {"_pytree__is_pytree": False})) == {
        "pytree": False
    }
