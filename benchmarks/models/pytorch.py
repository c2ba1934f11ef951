"""The models of `benchmarks.models.linen` in PyTorch. On a GPU if there is one."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models import data
from benchmarks.models.cases import EPSILON, Case
from benchmarks.models.data import Noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Cosine and sine of rotary positions.
Turns = tuple[torch.Tensor, torch.Tensor]


class Layer(nn.Module):
    """A layer of either model; the decoder's has a gate."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.causal = case, case.model == "decoder"
        width, ff = case.width, case.ff
        dense = functools.partial(nn.Linear, bias=not self.causal)
        norm = nn.RMSNorm if self.causal else nn.LayerNorm
        self.q, self.o = dense(width, width), dense(width, width)
        self.k, self.v = dense(width, case.kv_width), dense(width, case.kv_width)
        self.up, self.down = dense(width, ff), dense(ff, width)
        if self.causal:
            self.gate = dense(width, ff)
        self.norm_1, self.norm_2 = norm(width, eps=EPSILON), norm(width, eps=EPSILON)

    def attend(self, x: torch.Tensor, turns: Turns | None) -> torch.Tensor:
        """Attention with its projections."""
        return self.o(attend(self.case, self.q(x), self.k(x), self.v(x), turns))

    def forward(self, x: torch.Tensor, turns: Turns | None) -> torch.Tensor:
        """``(batch, length, width)`` to the same."""
        if self.causal:
            x = x + self.attend(self.norm_1(x), turns)
            y = self.norm_2(x)
            return x + self.down(gated(self.gate(y), self.up(y)))
        x = self.norm_1(x + self.attend(x, turns))
        return self.norm_2(x + self.down(F.gelu(self.up(x))))


def attend(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: Turns | None = None
) -> torch.Tensor:
    """Attention of ``(batch, length, width)``; a decoder's is causal, with rotary positions."""
    q, k, v = (x.unflatten(-1, (-1, case.head_features)).transpose(1, 2) for x in (q, k, v))
    if causal := case.model == "decoder":
        turns = turns or turns_of(case, q)
        q, k = rotary(q, *turns), rotary(k, *turns)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(-2)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) up``."""
    return F.silu(gate) * up


def sum_and_norm(x: torch.Tensor, y: torch.Tensor, causal: bool) -> torch.Tensor:
    """A residual sum and its norm, with a scale of one."""
    norm = F.rms_norm if causal else F.layer_norm
    return norm(x + y, x.shape[-1:], eps=EPSILON)


def turns_of(case: Case, x: torch.Tensor) -> Turns:
    """Cosine and sine of rotary positions, for the dtype and the device of an array."""
    half = case.head_features // 2
    steps = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(case.length, device=x.device)[:, None] * steps
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of ``(batch, heads, length, features)``."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model(nn.Module):
    """Either model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.causal = case, case.model == "decoder"
        self.embed = nn.Embedding(case.vocab, case.width)
        self.layers = nn.ModuleList([Layer(case) for _ in range(case.layers)])
        norm = nn.RMSNorm if self.causal else nn.LayerNorm
        self.norm = norm(case.width, eps=EPSILON)
        if not self.causal:
            self.positions = nn.Embedding(case.length, case.width)
        if not case.tied:
            outputs = case.vocab if self.causal else 2
            self.head = nn.Linear(case.width, outputs, bias=not self.causal)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``(batch, length)`` to logits."""
        x = self.embed(ids)
        if not self.causal:
            x = self.norm(x + self.positions.weight)
        turns = turns_of(self.case, x) if self.causal else None
        for layer in self.layers:
            x = layer(x, turns)
        x = self.norm(x) if self.causal else x.mean(1)
        return F.linear(x, self.embed.weight) if self.case.tied else self.head(x)


def torch_name(path: str) -> str:
    """``"layers_0/q/kernel"`` as ``"layers.0.q.weight"``."""
    *module, name = path.replace("layers_", "layers/").split("/")
    return ".".join([*module, "bias" if name == "bias" else "weight"])


def array_of(noise: Noise, dtype: torch.dtype) -> torch.Tensor:
    """Noise as a tensor on the device."""
    index = torch.arange(math.prod(noise.shape), dtype=torch.int32, device=DEVICE)
    numbers = noise.integers(index.reshape(noise.shape)).to(torch.float32)
    return (numbers * noise.step + noise.mean).to(dtype)


def make(case: Case) -> Model:
    """The model with the weights of a case."""
    with torch.device("meta"):
        model = Model(case)
    dtype = getattr(torch, case.dtype)
    state = {}
    for path, noise in data.weights(case).items():
        array = array_of(noise, dtype)
        state[torch_name(path)] = array.T.contiguous() if path.endswith("kernel") else array
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)
