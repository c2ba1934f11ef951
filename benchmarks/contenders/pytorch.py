"""Ways to train in PyTorch: in full, and with PEFT as its documentation says.

On a GPU if there is one. `peft-lora` is as PEFT's own comparison of methods runs it: a base in 16
bits and adapters in float32, which PEFT computes with in float32. `-autocast` puts
`torch.autocast` around the model, as `Trainer(bf16=True)` does, and `-compiled` compiles that.
"""

import contextlib
import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contenders.step import LEARNING_RATE, WEIGHT_DECAY, Step
from benchmarks.models import data
from benchmarks.models.cases import Case, kernel_names
from benchmarks.models.pytorch import DEVICE, array_of, make

# On a CPU; the machine's cores, as the other contenders have them.
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_step(case: Case, model: nn.Module, autocast: bool = False, compiled: bool = False) -> Step:
    """The usual loop of PyTorch, with all that wants a gradient."""
    torch.set_num_threads(THREADS)
    # Products of float32 as JAX computes them on GPUs by default, and PyTorch's guides recommend.
    torch.set_float32_matmul_precision("high")
    ids, labels = (torch.from_numpy(x.astype("int64")).to(DEVICE) for x in data.batch(case))
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

    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.scale * case.rank,
        target_modules=kernel_names(case),
        use_dora=use_dora,
    )
    model = get_peft_model(make(case), config)
    with torch.no_grad():
        for path, (u, v) in data.factors(case).items():
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
