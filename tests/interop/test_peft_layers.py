"""Convolutions and embeddings equal PyTorch PEFT's on the same numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, random_variables, relative_error

import lora_jax

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.interop

KEY = jax.random.key(0)
VARIANTS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "dora": {"rank": 3, "alpha": 5.0, "variant": "dora", "detach_norm": True},
}
CONVOLUTIONS = {
    # Flax's options, PyTorch's, and the shape of the input with its features last
    "1-D": ({"kernel_size": (3,), "padding": "VALID"}, {"kernel_size": 3}, (2, 9, 4)),
    # No dilation: PEFT 0.21.2 does not give it to its lora_A, and fails on the shapes.
    "2-D, strides": (
        {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 1), (2, 2))},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
        (2, 8, 7, 4),
    ),
    "2-D, 1 x 1": ({"kernel_size": (1, 1)}, {"kernel_size": 1}, (2, 5, 6, 4)),
    "3-D": (
        {"kernel_size": (2, 3, 2), "padding": "VALID"},
        {"kernel_size": (2, 3, 2)},
        (1, 4, 5, 4, 4),
    ),
}


def tensor(x):
    return torch.from_numpy(np.array(x))


def adapted(model, x, name, variant):
    variables = random_variables(model, x)
    axes = lora_jax.kernel_axes(model, variables, x)
    config = lora_jax.LoraConfig([lora_jax.Rule(name, **variant)])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    trained = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, trained, x)
    weights = random_like(jnp.zeros(y.shape), seed=2)

    def loss(adapters):
        return jnp.vdot(weights, lora_jax.lora_apply(model, {"params": frozen}, adapters, x))

    grads = jax.grad(loss)(trained)
    merged = lora_jax.lora_merge(frozen, trained)[name]
    return variables["params"], adapters[name], trained[name], y, weights, grads[name], merged


def in_peft(layer, variant, trained):
    """The layer in PEFT, with the parameters `{name: value}` of its adapter."""
    config = peft.LoraConfig(
        r=variant["rank"],
        lora_alpha=variant["alpha"],
        use_dora=variant.get("variant") == "dora",
        target_modules=["0"],
    )
    model = peft.get_peft_model(torch.nn.Sequential(layer), config)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {name.split("base_model.model.0.")[1] for name in parameters} == set(trained)
    for name, value in trained.items():
        p = parameters[f"base_model.model.0.{name}"]
        assert p.shape == value.shape
        p.data = value
    return model, parameters, fresh


def check(parameters, grads):
    for name, grad in grads.items():
        want = parameters[f"base_model.model.0.{name}"].grad.numpy()
        assert relative_error(jnp.asarray(grad.numpy()), want) < 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("convolution", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(convolution, variant):
    options, torch_options, shape = convolution
    x = random_like(jnp.zeros(shape), seed=1, scale=1.0)
    params, start, trained, y, weights, grads, merged = adapted(
        nn.Conv(6, **options), x, "kernel", variant
    )
    kernel_size, n = params["kernel"].shape[:-2], len(shape) - 2
    out_first = (n + 1, n, *range(n))

    def to_torch(adapter):
        """PEFT's A is a convolution to r features, its B one of 1 x 1."""
        rank = adapter.U.shape[1]
        A = jnp.reshape(adapter.U, (*kernel_size, shape[-1], rank)).transpose(out_first)
        B = jnp.reshape(adapter.V.T, (-1, rank, *[1] * n))
        named = {"lora_A.default.weight": tensor(A), "lora_B.default.weight": tensor(B)}
        if adapter.m is not None:
            m = tensor(jnp.reshape(adapter.m, (1, -1, *[1] * n)))
            named["lora_magnitude_vector.default.weight"] = m
        return named

    layer = getattr(torch.nn, f"Conv{n}d")(shape[-1], 6, **torch_options)
    layer.weight.data = tensor(params["kernel"].transpose(out_first))
    layer.bias.data = tensor(params["bias"])
    model, parameters, fresh = in_peft(layer, variant, to_torch(trained))
    if start.m is not None:
        m = fresh["base_model.model.0.lora_magnitude_vector.default.weight"]
        assert relative_error(start.m, m.numpy().ravel()) < 1e-6

    channels_first = (0, n + 1, *range(1, n + 1))
    torch_y = model(tensor(x.transpose(channels_first)))
    (tensor(weights.transpose(channels_first)) * torch_y).sum().backward()
    assert relative_error(y.transpose(channels_first), torch_y.detach().numpy()) < 1e-5
    check(parameters, to_torch(grads))
    weight = model.merge_and_unload()[0].weight
    assert relative_error(merged.transpose(out_first), weight.detach().numpy()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_embedding(variant):
    """The matrix is (tokens, features): U = A^T, V = B^T, and one magnitude for each feature."""
    ids = jnp.array([[1, 7, 2], [0, 10, 7]])
    params, start, trained, y, weights, grads, merged = adapted(
        nn.Embed(11, 6), ids, "embedding", variant
    )

    def to_torch(adapter):
        named = {"lora_embedding_A.default": tensor(adapter.U.T)}
        named["lora_embedding_B.default"] = tensor(adapter.V.T)
        if adapter.m is not None:
            named["lora_magnitude_vector.default.weight"] = tensor(adapter.m)
        return named

    layer = torch.nn.Embedding(11, 6)
    layer.weight.data = tensor(params["embedding"])
    model, parameters, fresh = in_peft(layer, variant, to_torch(trained))
    if start.m is not None:
        m = fresh["base_model.model.0.lora_magnitude_vector.default.weight"]
        assert relative_error(start.m, m.numpy()) < 1e-6
    torch_y = model(tensor(ids))
    (tensor(weights) * torch_y).sum().backward()
    assert relative_error(y, torch_y.detach().numpy()) < 1e-5
    check(parameters, to_torch(grads))
    weight = model.merge_and_unload()[0].weight
    assert relative_error(merged, weight.detach().numpy()) < 1e-5
