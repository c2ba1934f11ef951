"""What a quantized base loses and saves: SmolLM2 on each kind, before and after training on it.

    python -m benchmarks.quantized

For each kind: the bytes of the quantized kernels, the perplexity of held-out answers, that after a
short training of LoRA and of DoRA, and the memory of a step by the compiler. And how near LoftQ
brings the start to the model that was not quantized.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.training.train_state import TrainState

import lora_jax
from benchmarks.running import files
from benchmarks.running.environment import environment
from examples import chat, smollm2, styles_finetune
from lora_jax.core._boxes import content

KINDS = ("bfloat16", "int8", "fp8", "int4", "nf4")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures quantized bases."""

    kinds: tuple[str, ...] = KINDS
    """Of the frozen kernels."""
    variants: tuple[Literal["lora", "dora", "loftq"], ...] = ("lora", "dora")
    """What is trained on them; loftq is LoRA that starts so, and is for quantized ones."""
    steps: int = 20
    """Batches to train on; with 0 only what the base loses is measured, by adapters that start."""
    tests: int = 64
    """Held-out texts."""
    out: Path = Path("benchmarks/results/quantized.json")
    """Where results go; other kinds that are there already stay."""


def with_kind(params: Any, kind: str) -> Any:
    """The parameters with the kernels of linear layers in a kind."""
    if kind == "bfloat16":
        return params
    return lora_jax.quantize(params, {styles_finetune.KERNELS: kind})


def kernel_bytes(params: Any) -> tuple[int, int]:
    """Bytes of the kernels as they are, and as they would be in bfloat16."""
    flat = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, lora_jax.QuantizedArray)
    )
    leaves = [content(leaf) for path, leaf in flat if "_proj" in jax.tree_util.keystr(path)]
    return sum(leaf.nbytes for leaf in leaves), sum(2 * math.prod(leaf.shape) for leaf in leaves)


def step_memory(model: Any, frozen: Any, adapters: Any, batch: Any) -> dict[str, int]:
    """Bytes of a step by the compiler: of what goes in, and of what is made in between."""
    state = TrainState.create(apply_fn=model.apply, params=adapters, tx=optax.adamw(1e-3))
    sizes = styles_finetune.train_step.lower(model, state, frozen, batch).compile()
    found = sizes.memory_analysis()
    return {"arguments": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes}


def main(options: Options) -> None:
    """Measures each kind, and writes down what comes out."""
    own = styles_finetune.Options(steps=options.steps, style="bible")
    config, params = smollm2.load_pretrained()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    model, tokenizer = smollm2.SmolLM2(config), chat.load_tokenizer()
    style = styles_finetune.STYLES[own.style]()
    train_set = styles_finetune.encode(tokenizer, style.train, own.length)
    test_set = styles_finetune.encode(tokenizer, style.test[: options.tests], own.length)
    results = files.read(options.out)
    for kind in options.kinds:
        base = with_kind(params, kind)
        of_kind, of_bfloat16 = kernel_bytes(base)
        found: dict[str, Any] = {"bytes": of_kind, "bytes_to_bfloat16": of_kind / of_bfloat16}
        for variant in options.variants:
            if variant == "loftq" and kind == "bfloat16":
                continue
            rule = lora_jax.Rule(
                styles_finetune.KERNELS,
                rank=own.rank,
                alpha=own.alpha,
                variant="dora" if variant == "dora" else "lora",
            )
            config_ = lora_jax.LoraConfig([rule])
            start = params if variant == "loftq" else base
            frozen, adapters = lora_jax.lora_init(jax.random.key(own.seed), start, config_)
            if variant == "loftq":
                kinds = {styles_finetune.KERNELS: kind}
                frozen, adapters, report = lora_jax.loftq(frozen, adapters, kinds)
                rows = report.rows.values()
                found["error"] = float(np.mean([row.quantized for row in rows]))
                found["error_with_loftq"] = float(np.mean([row.with_adapter for row in rows]))
            before = styles_finetune.held_out(model, frozen, adapters, test_set, own.batch)
            found["perplexity"] = math.exp(before)
            print(kind, variant, found, flush=True)
            if not options.steps:
                continue
            first = tuple(array[: own.batch] for array in train_set)
            memory = step_memory(model, frozen, adapters, first)
            adapters = jax.tree.map(jnp.copy, adapters)  # a step donates its state
            adapters, seconds = styles_finetune.train(
                model, frozen, adapters, train_set, own, lambda *_: None
            )
            after = styles_finetune.held_out(model, frozen, adapters, test_set, own.batch)
            found[variant] = {
                "perplexity_before": math.exp(before),
                "steps": options.steps,
                "perplexity_after": math.exp(after),
                "seconds_per_step": seconds,
                "memory": memory,
            }
            print(kind, variant, found[variant], flush=True)
        results[kind] = {**results.get(kind, {}), **found, "environment": environment()}
        files.write(options.out, results)


if __name__ == "__main__":
    main(tyro.cli(Options))
