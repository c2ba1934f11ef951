"""Tables, numbers, machines and names of contenders, as the page has them."""

from collections.abc import Iterable, Sequence
from typing import Any

TITLES = {
    "floor": "floor",
    "full": "full fine-tuning",
    "lora": "**lora_jax, LoRA**",
    "dora": "**lora_jax, DoRA**",
    "dora-detached": "**lora_jax, DoRA, `detach_norm`**",
    "lora-outer": '**lora_jax, LoRA, `product="outer"`**',
    "dora-outer": '**lora_jax, DoRA, `product="outer"`**',
    "lora-plain": "LoRA by hand, `y + s x U V`",
    "merge": "LoRA by hand, `W + s U V`",
    "qwix": "qwix",
    "qwix-float32": "qwix, adapters in float32",
    "gemma-peft": "gemma.peft",
    "lora-in-nnx": "**lora_jax, LoRA, the model in NNX**",
    "dora-in-nnx": "**lora_jax, DoRA, the model in NNX**",
    "nnx-lora": "Flax NNX, `LoRALinear`",
    "lora-factored": '**lora_jax, LoRA, `product="factored"`**',
    "lora-merged": '**lora_jax, LoRA, `product="dense"`**',
    "torch-full": "PyTorch, full fine-tuning",
    "torch-full-compiled": "PyTorch, full fine-tuning, `torch.compile`",
    "peft-lora": "PyTorch, PEFT, LoRA",
    "peft-lora-autocast": "PyTorch, PEFT, LoRA, `torch.autocast`",
    "peft-lora-compiled": "PyTorch, PEFT, LoRA, `torch.autocast`, `torch.compile`",
    "peft-dora": "PyTorch, PEFT, DoRA",
    "peft-dora-autocast": "PyTorch, PEFT, DoRA, `torch.autocast`",
    "peft-dora-compiled": "PyTorch, PEFT, DoRA, `torch.autocast`, `torch.compile`",
    "serve-base": "the base alone",
    "serve-merged": "a merged model",
    "serve-lora": "**lora_jax, LoRA**",
    "serve-dora": "**lora_jax, DoRA**",
    "serve-gather": "LoRA by hand, gather",
    "serve-one-hot": "LoRA by hand, one-hot",
    "serve-ragged": "LoRA by hand, `ragged_dot`",
}


def title(label: str) -> str:
    """What a contender is called; behind a comma stands what it is measured with."""
    name, comma, rest = label.partition(",")
    return TITLES.get(name, name) + comma + rest


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def milliseconds(job: dict[str, Any] | None) -> str:
    """The median, to three digits."""
    return digits(1e3 * job["median"]) if job else ""


def digits(value: float, count: int = 3) -> str:
    """A number with so many significant digits, and never as a power of ten."""
    return f"{float(f'{value:.{count}g}'):,.10g}"


def interval(ratio: dict[str, float] | None) -> str:
    """A ratio with its quartiles, if they were measured."""
    if not ratio:
        return ""
    if "low" not in ratio:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def mebibytes(count: float | None) -> str:
    """Bytes as MiB."""
    return "" if count is None else f"{count / 2**20:,.0f}"


def shape(case: dict[str, Any]) -> str:
    """A case in words."""
    keys = f" ({case['kv_heads']} of keys)" if case.get("kv_heads") else ""
    where = f" on {', '.join(case['adapted'])}" if case.get("adapted") else ""
    return (
        f"{case['model']}, {case['layers']} layers, {case['width']} wide, feed-forward "
        f"{case['ff']}, {case['heads']} heads{keys}, {case['batch']} x {case['length']} tokens, "
        f"rank {case['rank']}{where}, {case['dtype']}"
    )


def place(environment: dict[str, Any]) -> str:
    """The machine and the versions in words."""
    versions = ", ".join(f"{k} {v}" for k, v in environment["packages"].items())
    return (
        f"{environment['cpu']}, {environment['cores']} cores, "
        f"{environment['memory_bytes'] / 2**30:.0f} GiB; {environment['date'][:10]}; "
        f"Python {environment['python']}, {versions}."
    )


def places(results: dict[str, Any]) -> str:
    """All machines and versions, each once."""
    return "\n\n".join(dict.fromkeys(place(result["environment"]) for result in results.values()))
