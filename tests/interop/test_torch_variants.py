"""Variants of the tests against PEFT's own, on the same numbers."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from variants import LoHa, VeRA

import lora_jax

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.interop


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class FlaxNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="second")(jnp.tanh(nn.Dense(8, name="first")(x)))


def array(tensor):
    return tensor.detach().numpy()


def noised(model, words):
    """Random numbers in the place of those that start at zero or one."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.data = torch.randn_like(parameter)
    return model.eval()


def compare(net, model, nodes, variant):
    """The outputs, with PEFT's numbers for the arrays of the variant."""
    params = {
        name: {"kernel": array(layer.weight).T, "bias": array(layer.bias)}
        for name, layer in (("first", net.first), ("second", net.second))
    }
    config = lora_jax.LoraConfig([lora_jax.Rule(".*kernel", 2, alpha=3.0, variant=variant)])
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    variables = {"params": params}
    frozen, adapters = lora_jax.lora_init_model(jax.random.key(0), FlaxNet(), variables, config, x)
    for name, arrays in nodes.items():
        adapters[name]["kernel"] = adapters[name]["kernel"].replace(arrays=arrays)
    y = lora_jax.lora_apply(FlaxNet(), {"params": frozen}, adapters, x)
    expected = model(torch.tensor(x))
    assert relative_error(y, array(expected)) < 1e-5


def test_loha():
    net = Net()
    model = noised(
        peft.get_peft_model(net, peft.LoHaConfig(r=2, alpha=3, target_modules=["first", "second"])),
        ("hada",),
    )
    plain = Net()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in net.state_dict().items() if "hada" not in k}
    )
    nodes = {
        name: {
            "U1": array(getattr(net, name).hada_w1_b["default"]).T,
            "V1": array(getattr(net, name).hada_w1_a["default"]).T,
            "U2": array(getattr(net, name).hada_w2_b["default"]).T,
            "V2": array(getattr(net, name).hada_w2_a["default"]).T,
        }
        for name in ("first", "second")
    }
    compare(plain, model, nodes, LoHa())


@dataclasses.dataclass(frozen=True)
class PeftsVeRA(VeRA):
    """With PEFT's own A and B, which it draws for the largest layer, and no scale."""

    name = "pefts_vera"

    def shared(self, d, k, r):
        if r != 2:
            return super().shared(d, k, r)
        A, B = SHARED
        return A[:r, :d].T, B[:k, :r].T / 1.5  # s is 3 / 2 in this test, and 1 in PEFT


SHARED = []


def test_vera():
    net = Net()
    model = noised(
        peft.get_peft_model(net, peft.VeraConfig(r=2, target_modules=["first", "second"])),
        ("vera_lambda",),
    )
    plain = Net()
    plain.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in net.state_dict().items() if "vera" not in k}
    )
    SHARED[:] = [array(net.first.vera_A["default"]), array(net.first.vera_B["default"])]
    nodes = {
        name: {
            "lambda_d": array(getattr(net, name).vera_lambda_d["default"]),
            "lambda_b": array(getattr(net, name).vera_lambda_b["default"]),
        }
        for name in ("first", "second")
    }
    compare(plain, model, nodes, PeftsVeRA())
