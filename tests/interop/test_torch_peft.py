"""LoRA and DoRA equal PyTorch PEFT's on the same numbers: U = A^T, V = B^T, m = magnitude."""

import itertools

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

WIDTHS = (12, 7, 9, 4)
VARIANTS = {
    "lora": {"rank": 3, "alpha": 5.0},
    "rslora": {"rank": 4, "alpha": 3.0, "rslora": True},
    "dora": {"rank": 3, "alpha": 5.0, "variant": "dora", "detach_norm": True},
    "dora, rank 1": {"rank": 1, "variant": "dora", "detach_norm": True},
}


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(WIDTHS[1:]):
            x = jnp.tanh(nn.Dense(width, use_bias=i != 1, name=f"layer_{i}")(x))
        return x


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for i, (d, k) in enumerate(itertools.pairwise(WIDTHS)):
            setattr(self, f"layer_{i}", torch.nn.Linear(d, k, bias=i != 1))

    def forward(self, x):
        for i in range(len(WIDTHS) - 1):
            x = torch.tanh(getattr(self, f"layer_{i}")(x))
        return x


def tensor(x):
    return torch.from_numpy(np.array(x))


def to_torch(params, adapters, variant):
    """The same base and the same adapters in PEFT."""
    model = TorchModel()
    model.load_state_dict(
        {
            f"{layer}.{ {'kernel': 'weight', 'bias': 'bias'}[name] }": tensor(jnp.asarray(leaf).T)
            for layer, leaves in params.items()
            for name, leaf in leaves.items()
        }
    )
    config = peft.LoraConfig(
        r=variant["rank"],
        lora_alpha=variant.get("alpha", variant["rank"]),
        use_dora=variant.get("variant") == "dora",
        use_rslora=variant.get("rslora", False),
        target_modules=list(adapters),
    )
    model = peft.get_peft_model(model, config)
    parameters = dict(model.named_parameters())
    for name, value in names(adapters).items():
        assert parameters[name].requires_grad
        parameters[name].data = tensor(value)
    return model


def names(adapters):
    """PEFT's names and orientation, for adapters or their gradients."""
    flat = {}
    for layer, leaves in adapters.items():
        prefix = f"base_model.model.{layer}"
        adapter = leaves["kernel"]
        flat[f"{prefix}.lora_A.default.weight"] = adapter.U.T
        flat[f"{prefix}.lora_B.default.weight"] = adapter.V.T
        if adapter.m is not None:
            flat[f"{prefix}.lora_magnitude_vector.default.weight"] = adapter.m
    return flat


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def both(request):
    variant = request.param
    model, x = Model(), random_like(jnp.zeros((5, WIDTHS[0])), seed=1, scale=1.0)
    params = random_variables(model, x)["params"]
    config = lora_jax.LoraConfig([lora_jax.Rule(".*/kernel", **variant)])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    trained = random_like(adapters)
    return model, x, frozen, adapters, trained, to_torch(params, trained, variant)


def test_magnitude_at_the_start_is_pefts(both):
    """One norm for each output feature: our axis 0 is PEFT's dim=1."""
    _, _, frozen, adapters, _, model = both
    fresh = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    for layer in adapters:
        m = adapters[layer]["kernel"].m
        if m is None:
            assert not fresh
            continue
        linear = model.base_model.model.get_submodule(layer)
        dora = linear.lora_magnitude_vector["default"]
        zero = torch.zeros(frozen[layer]["kernel"].T.shape)
        norm = dora.get_weight_norm(linear.base_layer.weight, zero, scaling=1.0)
        assert relative_error(m, norm.detach().numpy()) < 1e-6


def test_outputs_and_gradients(both):
    model, x, frozen, _, adapters, torch_model = both
    weights = random_like(jnp.zeros((5, WIDTHS[-1])), seed=2)

    def loss(adapters):
        y = lora_jax.lora_apply(model, {"params": frozen}, adapters, x)
        return jnp.vdot(weights, y), y

    grads, y = jax.grad(loss, has_aux=True)(adapters)
    torch_y = torch_model(tensor(x))
    (tensor(weights) * torch_y).sum().backward()
    assert relative_error(y, torch_y.detach().numpy()) < 1e-5
    parameters = dict(torch_model.named_parameters())
    expected = {n: p for n, p in parameters.items() if p.requires_grad}
    got = names(grads)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        assert relative_error(grad, expected[name].grad.numpy()) < 1e-4, name


def test_merged_weights(both):
    _, _, frozen, _, adapters, torch_model = both
    merged = lora_jax.lora_merge(frozen, adapters)
    expected = torch_model.merge_and_unload().state_dict()
    for layer, leaves in merged.items():
        assert relative_error(leaves["kernel"].T, expected[f"{layer}.weight"].numpy()) < 1e-5
