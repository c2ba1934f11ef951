"""Ways to train in PyTorch: in full, and with PEFT as its documentation says."""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.step import LEARNING_RATE, WEIGHT_DECAY, Step

EPSILON = 1e-6
THREADS = 2


class Layer(nn.Module):
    """A layer of either model; the decoder's has a gate."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads, self.causal = case.heads, case.model == "decoder"
        width, ff = case.width, case.ff
        dense = functools.partial(nn.Linear, bias=not self.causal)
        norm = nn.RMSNorm if self.causal else nn.LayerNorm
        self.q, self.k, self.v, self.o = (dense(width, width) for _ in "qkvo")
        self.up, self.down = dense(width, ff), dense(ff, width)
        if self.causal:
            self.gate = dense(width, ff)
        self.norm_1, self.norm_2 = norm(width, eps=EPSILON), norm(width, eps=EPSILON)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Attention with its projections."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(attention(q, k, v, heads=self.heads, causal=self.causal))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, length, width)`` to the same."""
        if self.causal:
            x = x + self.attend(self.norm_1(x))
            y = self.norm_2(x)
            return x + self.down(gated(self.gate(y), self.up(y)))
        x = self.norm_1(x + self.attend(x))
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool
) -> torch.Tensor:
    """Attention of ``(batch, length, width)``; a causal one has rotary positions."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if causal:
        q, k = rotary(q), rotary(k)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).flatten(-2)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) up``."""
    return F.silu(gate) * up


def sum_and_norm(x: torch.Tensor, y: torch.Tensor, causal: bool) -> torch.Tensor:
    """A residual sum and its norm, with a scale of one."""
    norm = F.rms_norm if causal else F.layer_norm
    return norm(x + y, x.shape[-1:], eps=EPSILON)


def rotary(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of ``(batch, heads, length, features)``."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    """Either model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.causal = case.model == "decoder"
        self.embed = nn.Embedding(case.vocab, case.width)
        self.layers = nn.ModuleList([Layer(case) for _ in range(case.layers)])
        norm = nn.RMSNorm if self.causal else nn.LayerNorm
        self.norm = norm(case.width, eps=EPSILON)
        if not self.causal:
            self.positions = nn.Embedding(case.length, case.width)
        outputs = case.vocab if self.causal else 2
        self.head = nn.Linear(case.width, outputs, bias=not self.causal)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``(batch, length)`` to logits."""
        x = self.embed(ids)
        if not self.causal:
            x = self.norm(x + self.positions.weight)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x) if self.causal else x.mean(1))


def torch_name(path: str) -> str:
    """``"layers_0/q/kernel"`` as ``"layers.0.q.weight"``."""
    *module, name = path.replace("layers_", "layers/").split("/")
    return ".".join([*module, "bias" if name == "bias" else "weight"])


def make(case: Case) -> Model:
    """The model with the weights of a case."""
    with torch.device("meta"):
        model = Model(case)
    dtype = getattr(torch, case.dtype)
    state = {}
    for path, value in cases.weights(case):
        array = np.ascontiguousarray(value.T) if path.endswith("kernel") else value
        state[torch_name(path)] = torch.from_numpy(array).to(dtype)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def make_step(case: Case, model: nn.Module) -> Step:
    """The usual loop of PyTorch, with all that wants a gradient."""
    torch.set_num_threads(THREADS)
    ids, labels = (torch.from_numpy(np.array(x, np.int64)) for x in cases.batch(case))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.train()

    def loss() -> torch.Tensor:
        logits = model(ids).float()
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def run() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    def forward() -> float:
        with torch.no_grad():
            return loss().item()

    facts = {
        "trained": sum(p.numel() for p in trained),
        "trained_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trained}),
    }
    return Step(run, forward, facts)


def full(case: Case) -> Step:
    """All parameters are trained."""
    return make_step(case, make(case))


def peft_step(case: Case, use_dora: bool) -> Step:
    """`get_peft_model`, as in https://huggingface.co/docs/peft/quicktour."""
    from peft import LoraConfig, get_peft_model

    names = sorted({path.split("/")[-1] for path in cases.kernels(case)})
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.scale * case.rank,
        target_modules=names,
        use_dora=use_dora,
    )
    model = get_peft_model(make(case), config)
    with torch.no_grad():
        for path, (u, v) in cases.factors(case).items():
            layer = model.get_submodule(
                f"base_model.model.{path.replace('_', '.').replace('/', '.')}"
            )
            layer.lora_A["default"].weight.copy_(torch.from_numpy(u.T))
            layer.lora_B["default"].weight.copy_(torch.from_numpy(v.T))
    return make_step(case, model)


CONTENDERS: dict[str, Callable[[Case], Step]] = {
    "torch-full": full,
    "peft-lora": functools.partial(peft_step, use_dora=False),
    "peft-dora": functools.partial(peft_step, use_dora=True),
}
