"""Ways to train in PyTorch: in full, and with PEFT as its documentation says.

On a GPU if there is one. `peft-lora` is as PEFT's own comparison of methods runs it: a base in 16
bits and adapters in float32, which PEFT computes with in float32. `-autocast` puts
`torch.autocast` around the model, as `Trainer(bf16=True)` does, and `-compiled` compiles that.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import cases
from benchmarks.cases import Case, Noise
from benchmarks.step import LEARNING_RATE, WEIGHT_DECAY, Step

EPSILON = 1e-6
# On a CPU; the machine's cores, as the other contenders have them.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    for path, noise in cases.weights(case).items():
        array = array_of(noise, dtype)
        state[torch_name(path)] = array.T.contiguous() if path.endswith("kernel") else array
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def make_step(case: Case, model: nn.Module, autocast: bool = False, compiled: bool = False) -> Step:
    """The usual loop of PyTorch, with all that wants a gradient."""
    torch.set_num_threads(THREADS)
    # Products of float32 as JAX computes them on GPUs by default, and PyTorch's guides recommend.
    torch.set_float32_matmul_precision("high")
    ids, labels = (torch.from_numpy(x.astype("int64")).to(DEVICE) for x in cases.batch(case))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=DEVICE == "cuda"
    )
    model.train()
    called = torch.compile(model) if compiled else model

    def loss() -> torch.Tensor:
        context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            logits = called(ids)
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    def run() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return synchronised(value)

    def forward() -> float:
        with torch.no_grad():
            return synchronised(loss())

    facts = {
        "trained": sum(p.numel() for p in trained),
        "trained_dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trained}),
        "device": {
            "platform": "gpu" if DEVICE == "cuda" else "cpu",
            "kind": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        },
    }
    return Step({"step": run, "forward": forward}, facts, memory=device_memory)


def synchronised(value: torch.Tensor) -> float:
    """The number, when all that was begun has ended: also what the optimizer does."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return value.item()


def device_memory() -> dict[str, int]:
    """Bytes of the GPU at most since the process began."""
    return {"peak_device": torch.cuda.max_memory_allocated()} if DEVICE == "cuda" else {}


def full(case: Case, **options: bool) -> Step:
    """All parameters are trained."""
    return make_step(case, make(case), **options)


def peft_step(case: Case, use_dora: bool, **options: bool) -> Step:
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
            layer.lora_A["default"].weight.copy_(array_of(u, torch.float32).T)
            layer.lora_B["default"].weight.copy_(array_of(v, torch.float32).T)
    return make_step(case, model, **options)


CONTENDERS: dict[str, Callable[[Case], Step]] = {
    "torch-full": full,
    "torch-full-compiled": functools.partial(full, compiled=True),
}
for _name, _use_dora in (("lora", False), ("dora", True)):
    for _suffix, _options in (
        ("", {}),
        ("-autocast", {"autocast": True}),
        ("-compiled", {"autocast": True, "compiled": True}),
    ):
        CONTENDERS[f"peft-{_name}{_suffix}"] = functools.partial(
            peft_step, use_dora=_use_dora, **_options
        )
