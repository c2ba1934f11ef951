"""Layers that the library has never seen: registered, or materialized."""

import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from helpers import random_like, random_variables, relative_error

import lora_jax
from lora_jax import Handlers, LoraConfig, Rule

KEY = jax.random.key(0)
NORMAL = nn.initializers.normal()


class Experts(nn.Module):
    """A mixture of experts: a kernel with an expert axis, last."""

    @nn.compact
    def __call__(self, x, gates):
        w = self.param("w", NORMAL, (x.shape[-1], 5, 3))
        b = self.param("b", NORMAL, (3, 5))
        return jnp.einsum("tk,te->tk", jnp.einsum("td,dke,te->tk", x, w, gates) + gates @ b, gates)


@lora_jax.register(Experts, "w")
def experts(layer, w, x, gates):
    each = w.einsum("etd,dke->etk", jnp.broadcast_to(x, (3, *x.shape)))
    y = jnp.einsum("etk,te->tk", each, gates) + gates @ layer.get_variable("params", "b")
    return jnp.einsum("tk,te->tk", y, gates)


class Transposed(nn.Module):
    """A dense layer that keeps its kernel as (out, in), with what surrounds the product."""

    @nn.compact
    def __call__(self, x, *, negate=False):
        w = self.param("weight", NORMAL, (5, x.shape[-1]))
        y = nn.gelu(x @ w.T) + 1.0
        return -y if negate else y


@lora_jax.register(Transposed, "weight")
def transposed(layer, w, x, *, negate=False):
    y = nn.gelu(w.einsum("...d,kd->...k", x)) + 1.0
    return -y if negate else y


class FusedQKV(nn.Module):
    """Queries, keys and values from one kernel."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", NORMAL, (x.shape[-1], 3, 2, 4))
        return jnp.einsum("btd,dchk->cbhtk", x, w)


@lora_jax.register(FusedQKV, "w")
def fused_qkv(layer, w, x):
    return w.einsum("btd,dchk->cbhtk", x)


class Gated(nn.Module):
    """Two kernels in one module, one of them in another method."""

    def setup(self):
        self.up = self.param("up", NORMAL, (6, 8))
        self.down = self.param("down", NORMAL, (8, 6))

    def __call__(self, x):
        return self.project(nn.silu(x @ self.up))

    def project(self, x):
        return x @ self.down


@lora_jax.register(Gated, "up")
def gated(layer, up, x):
    return layer.project(nn.silu(up.einsum("...d,dk->...k", x)))


@lora_jax.register(Gated, "down", method="project")
def project(layer, down, x):
    return down.einsum("...d,dk->...k", x)


class OwnConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", NORMAL, (3, x.shape[-1], 4))
        return conv(x, w)


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (2,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))


@lora_jax.register(OwnConv, "w")
def own_conv(layer, w, x):
    return w.linear(conv, x, inputs=(0, 1))


class Scanned(nn.Module):
    """An own layer in a scan over axis 1, rematerialised."""

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return x + 0.1 * layer(x), None

        scan = nn.scan(
            nn.remat(body, prevent_cse=False), {"params": 1}, split_rngs={"params": True}, length=3
        )
        return scan(Gated(name="gated"), x, None)[0]


X = jax.random.normal(jax.random.key(5), (4, 6))
GATES = jax.nn.softmax(jax.random.normal(jax.random.key(6), (4, 3)))
LAYERS = {
    # model, arguments, which parameters, (inputs, outputs, stacks)
    "experts": (Experts(), (X, GATES), "w", ((0,), (1,), (2,))),
    "transposed": (Transposed(), (X,), "weight", ((1,), (0,), ())),
    "fused": (FusedQKV(), (X[None],), "w", ((0,), (1, 2, 3), ())),
    "two methods": (Gated(), (X,), "up|down", ((0,), (1,), ())),
    "convolution": (OwnConv(), (X[None],), "w", ((0, 1), (2,), ())),
    "scanned": (Scanned(), (X,), "gated/(up|down)", ((0,), (2,), (1,))),
}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("layer", LAYERS)
def test_registered_layer(layer, variant):
    model, args, pattern, expected = LAYERS[layer]
    variables = random_variables(model, *args)
    params = variables["params"]
    axes = lora_jax.kernel_axes(model, variables, *args)
    assert {(a.inputs, a.outputs, a.batch) for a in axes.values()} == {expected}
    config = LoraConfig([Rule(pattern, 2, alpha=3.0, variant=variant)])
    frozen, adapters = lora_jax.lora_init(KEY, params, config, axes=axes)
    assert len(jax.tree.leaves(adapters, is_leaf=is_adapter)) == len(axes)

    @jax.jit
    def apply(adapters):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, *args)

    @jax.jit
    def merged(adapters):
        return model.apply({"params": lora_jax.lora_merge(frozen, adapters)}, *args)

    base = jax.jit(model.apply)(variables, *args)
    assert relative_error(apply(adapters), base) < 1e-6
    trained = random_like(adapters)
    y = merged(trained)
    assert relative_error(y, base) > 1e-2
    assert relative_error(apply(trained), y) < 1e-5
    weights = random_like(y, seed=3)

    ours = jax.jit(jax.grad(lambda a: jnp.vdot(weights, apply(a))))(trained)
    reference = jax.jit(jax.grad(lambda a: jnp.vdot(weights, merged(a))))(trained)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert relative_error(got, want) < 1e-4
        assert jnp.abs(got).max() > 0


def is_adapter(node):
    return isinstance(node, lora_jax.Adapter)


def test_keyword_arguments_reach_the_handler():
    model = Transposed()
    variables = model.init(KEY, X)
    axes = lora_jax.kernel_axes(model, variables, X, negate=True)
    config = LoraConfig([Rule("weight", 2)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, X, negate=True)
    assert relative_error(y, model.apply(variables, X, negate=True)) < 1e-6


def test_axes_of_a_known_layer_that_the_rule_gets_wrong():
    """A transposed kernel is a matrix too; DoRA's norm would be over its other axis."""
    params = Transposed().init(KEY, X)["params"]
    config = LoraConfig([Rule("weight", 2, variant="dora")])
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    with pytest.raises(
        ValueError, match=r"'weight' is for a kernel with input_axes=\(0,\).*\(1,\)"
    ):
        lora_jax.lora_apply(Transposed(), {"params": frozen}, adapters, X)
    config = LoraConfig([Rule("weight", 2, variant="dora", input_axes=(-1,))])
    frozen, adapters = lora_jax.lora_init(KEY, params, config)
    assert adapters["weight"].m.shape == (5,)
    lora_jax.lora_apply(Transposed(), {"params": frozen}, adapters, X)


@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
@pytest.mark.parametrize("parts", [(0, 2), (1,), None])
@pytest.mark.parametrize(
    "layer", ["own", "dense", "dense in a scan", "materialized", "grouped conv"]
)
def test_fused_kernels_of_which_some_are_adapted(layer, parts, variant):
    x = jax.random.normal(KEY, (2, 4, 6))
    if layer == "own":
        model, name = FusedQKV(), "w"
    elif layer == "dense in a scan":
        model, name = zoo.Scan(1), "blocks/down/kernel"
    elif layer == "grouped conv":
        model, name = nn.Conv(12, (3,), feature_group_count=2), "kernel"
    else:
        model, name = nn.Dense(9), "kernel"
    variables = random_variables(model, x)
    params, axes = variables["params"], lora_jax.kernel_axes(model, variables, x)
    rule = Rule(
        name,
        2,
        variant=variant,
        fused=3,
        parts=parts,
        materialize=layer == "materialized",
        alpha=3.0,
    )
    frozen, adapters = lora_jax.lora_init(KEY, params, LoraConfig([rule]), axes=axes)
    (adapter,) = jax.tree.leaves(adapters, is_leaf=is_adapter)
    assert adapter.U.shape[-3] == adapter.V.shape[-3] == len(parts or (0, 1, 2))

    @jax.jit
    def apply(adapters):
        return lora_jax.lora_apply(model, {"params": frozen}, adapters, x)

    base = jax.jit(model.apply)
    assert relative_error(apply(adapters), base(variables, x)) < 1e-6
    trained = random_like(adapters)
    merged = jax.jit(lora_jax.lora_merge)(frozen, trained)
    assert relative_error(apply(trained), base({"params": merged}, x)) < 1e-5
    # What is left out is bit for bit what it was; each part is adapted by its own factors.
    before, after = (
        np.split(by_output(np.asarray(jax.tree.leaves(leaf)[0]), layer), 3, axis=-1)
        for leaf in (kernel(params, name), kernel(merged, name))
    )
    for part in range(3):
        assert np.array_equal(before[part], after[part]) == (part not in (parts or (0, 1, 2)))
    if variant == "lora" and layer == "dense":
        for i, part in enumerate(parts or (0, 1, 2)):
            delta = 1.5 * trained["kernel"].U[i] @ trained["kernel"].V[i]
            assert relative_error(after[part], before[part] + delta) < 1e-6
    grads = jax.jit(jax.grad(lambda a: (apply(a) ** 2).sum()))(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def kernel(params, name):
    for part in name.split("/"):
        params = params[part]
    return params


def by_output(kernel, layer):
    """The kernel with all its outputs in the last axis."""
    return kernel.reshape(kernel.shape[0], -1) if layer == "own" else kernel


class Unknown(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", NORMAL, (x.shape[-1], 6))
        scale = self.param("scale", NORMAL, (6,))
        return jnp.tanh(x @ jnp.tanh(w)) * scale


def test_unknown_layer_says_what_to_register():
    model = nn.Sequential([nn.Dense(6), Unknown()])
    variables = model.init(KEY, X)
    axes = lora_jax.kernel_axes(model, variables, X)
    assert set(axes) == {"layers_0/kernel"}
    config = LoraConfig([Rule(".*(kernel|w)", 2)])
    with pytest.raises(
        ValueError, match=r"'layers_1/w' \(6, 6\).*test_register\.Unknown.*lora_jax\.register"
    ):
        lora_jax.lora_init(KEY, variables["params"], config, axes=axes)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize(
    "model",
    [
        Unknown(),
        nn.WeightNorm(nn.Dense(5)),
        zoo.Mapped(),
        nn.Conv(4, (3,), mask=jnp.tril(jnp.ones((3 * 6, 4))).reshape(3, 6, 4)),
        nn.RNN(nn.OptimizedLSTMCell(6)),
        zoo.Scan(1),
        zoo.Tied(),
    ],
    ids=["unknown", "WeightNorm", "map_variables", "masked", "LSTM", "scan", "embedding"],
)
def test_materialized_parameters(model, variant):
    """In place of the parameter stands W', whatever reads it."""
    x = jnp.arange(5) if isinstance(model, zoo.Tied) else X[None]
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    rules = [
        Rule(".*(kernel|w|embedding)", 2, variant=variant, materialize=True),
    ]
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], LoraConfig(rules), axes=axes)
    assert (
        relative_error(
            lora_jax.lora_apply(model, {"params": frozen}, adapters, x), model.apply(variables, x)
        )
        < 1e-6
    )
    trained = random_like(adapters)
    merged = lora_jax.lora_merge(frozen, trained)
    y = lora_jax.lora_apply(model, {"params": frozen}, trained, x)
    assert jnp.array_equal(y, model.apply({"params": merged}, x))
    assert relative_error(y, model.apply(variables, x)) > 1e-3

    @jax.jit
    @jax.grad
    def gradient(adapters):
        return (lora_jax.lora_apply(model, {"params": frozen}, adapters, x) ** 2).sum()

    grads = gradient(trained)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "match"),
    [
        (
            (lambda x: x, "w"),
            {},
            TypeError,
            "for classes of flax.linen and flax.nnx modules, got <function",
        ),
        (
            (Unknown(), "w"),
            {},
            TypeError,
            "for classes of flax.linen and flax.nnx modules, got Unknown",
        ),
        ((Unknown,), {}, ValueError, "name the parameters"),
        ((Unknown, "w"), {"method": "encode"}, ValueError, "does not define encode"),
        ((zoo.MoreActivated, "kernel"), {"method": "setup"}, ValueError, "does not define setup"),
        ((nn.Conv, "kernel"), {}, ValueError, "It inherits it from _Conv: pass that class"),
        ((nn.Dense, "kernel"), {}, ValueError, "a handler of this library.*override=True"),
        ((Experts, "b"), {}, ValueError, r"a handler for \('w',\).*name them all"),
    ],
)
def test_bad_registrations(args, kwargs, error, match):
    with pytest.raises(error, match=match):
        lora_jax.register(*args, **kwargs)


def test_threads_that_register_at_once(monkeypatch):
    """As where they import two packages, each with a layer of its own: none is forgotten."""
    classes = [type("Layer", (nn.Module,), {"__call__": lambda self, x: x}) for _ in range(2)]
    add = Handlers._with

    def slow(handlers, *args):
        new = add(handlers, *args)
        time.sleep(0.05)
        return new

    monkeypatch.setattr(Handlers, "_with", slow)
    threads = [threading.Thread(target=lora_jax.register(c, "w"), args=(print,)) for c in classes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    for cls in classes:
        Handlers.registered().without(cls)  # raises where there is none


def test_a_handler_is_not_replaced_by_chance():
    """A notebook's cell that shall run twice says `override=True`: then the last one counts."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", NORMAL, (x.shape[-1], 4))

    def first(layer, w, x):
        return w.einsum("nd,dk->nk", x)

    def second(layer, w, x):
        return 2 * w.einsum("nd,dk->nk", x)

    model, x = Layer(), jnp.ones((2, 3))
    params = model.init(KEY, x)["params"]
    frozen, adapters = lora_jax.lora_init(KEY, params, LoraConfig([Rule("w", 2)]))

    def factor():
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
        return round(float(jnp.mean(y / model.apply({"params": params}, x))), 3)

    assert lora_jax.register(Layer, "w")(first) is first
    assert lora_jax.register(Layer, "w")(first) is first
    message = r"register\(Layer, ...\): its __call__ has the handler .*first for \('w',\) already"
    with pytest.raises(ValueError, match=f"{message}.*override=True"):
        lora_jax.register(Layer, "w")(second)
    assert factor() == 1
    assert lora_jax.register(Layer, "w", override=True)(second) is second
    assert factor() == 2
    lora_jax.register(Layer, "w")(second)
    with pytest.raises(ValueError, match="has the handler"):
        lora_jax.register(Layer, "w")(first)


def test_each_product_of_a_handler_has_dropout_of_its_own():
    """The first one that of the key as it is."""
    x, s = jnp.ones((3, 40)), 2.0
    adapter = lora_jax.Adapter(
        random_like(jnp.zeros((40, 5))), jnp.eye(5), rank=5, alpha=5 * s, dropout=0.25
    )
    kernel = lora_jax.AdaptedKernel("w", jnp.zeros((40, 5)), adapter, KEY)
    products = [
        kernel.einsum("nd,dk->nk", x),
        kernel.einsum("nd,dk->nk", x),
        kernel.linear(jnp.matmul, x, inputs=(0,)),
    ]
    keys = [KEY, jax.random.fold_in(KEY, 1), jax.random.fold_in(KEY, 2)]
    for got, key in zip(products, keys, strict=True):
        kept = x * jax.random.bernoulli(key, 0.75, x.shape) / 0.75
        assert relative_error(got, s * kept @ adapter.U) < 1e-5


def test_handler_that_does_not_compute_with_its_kernel():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            b = self.param("b", NORMAL, (6, 6))
            return x @ self.param("w", NORMAL, (6, 6)) @ b

    @lora_jax.register(Layer, "w")
    def layer(layer, w, x):
        return x @ w.value @ layer.get_variable("params", "b")

    variables = Layer().init(KEY, X)
    axes = lora_jax.kernel_axes(Layer(), variables, X)
    for name, reason in [("w", "did not compute with it"), ("b", "is not a kernel of a layer")]:
        config = LoraConfig([Rule(name, 2)])
        with pytest.raises(ValueError, match=rf"'{name}' \(6, 6\).*{reason}"):
            lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
        frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config)
        reason = {"w": "did not compute with the kernel", "b": "is for other parameters"}[name]
        with pytest.raises(ValueError, match=rf"'{name}' was not used.*{reason}"):
            lora_jax.lora_apply(Layer(), {"params": frozen}, adapters, X)


def test_misspelt_kernel():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("weight", NORMAL, (6, 6))

    lora_jax.register(Layer, "wieght")(lambda layer, w, x: w.einsum("...d,dk->...k", x))
    variables = Layer().init(KEY, X)
    axes = lora_jax.kernel_axes(Layer(), variables, X)
    with pytest.raises(ValueError, match=r"'weight'.*the handler of .*Layer is for 'wieght'"):
        lora_jax.lora_init(KEY, variables["params"], LoraConfig([Rule("weight", 2)]), axes=axes)


def test_linear_promotes_as_einsum_does():
    kernel = jnp.ones((6, 4), jnp.bfloat16)
    both = lora_jax.AdaptedKernel("w", kernel)
    by_linear = both.linear(jnp.matmul, X, inputs=(0,))
    assert by_linear.dtype == both.einsum("nd,dk->nk", X).dtype == jnp.float32
    adapter = lora_jax.Adapter(jnp.ones((2, 1)), jnp.ones((1, 12)))
    kernel = lora_jax.AdaptedKernel("w", jnp.ones((2, 3, 4)), adapter)
    with pytest.raises(ValueError, match=r"'w' cannot be adapted.*leaves 2 axes of the kernel"):
        kernel.linear(jnp.matmul, X, inputs=(0,))


@pytest.mark.parametrize("groups", [1, 2])
def test_linear_products_have_the_precision_that_they_are_given(groups):
    W, x = jnp.ones((3 // groups, 4)), jnp.ones((2, 3 // groups * groups))
    adapter = lora_jax.Adapter(jnp.ones((3 // groups, 1)), jnp.ones((1, 4)))

    def linear(x, K):
        x = jnp.reshape(x, (2, groups, -1))
        K = jnp.reshape(K, (-1, groups, K.shape[-1] // groups))
        return jnp.einsum("ngd,dgk->ngk", x, K, precision="highest").reshape(2, -1)

    def product(x):
        kernel = lora_jax.AdaptedKernel("w", W, adapter)
        return kernel.linear(linear, x, inputs=(0,), groups=groups, precision="highest")

    text = jax.jit(product).lower(x).as_text()
    assert "HIGHEST" in text
    assert "DEFAULT" not in text
