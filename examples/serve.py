"""Answers in several styles from one batch, whose rows come and go: one base, one program.

make styles   trains the adapters
make serve    serves them, side by side
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.table
import tyro
from rich.console import Console

import lora_jax
from examples import chat, generate, smollm2
from examples.assets import MissingAsset
from examples.styles_finetune import SAMPLES
from lora_jax.many._pool import Lease


@dataclasses.dataclass(frozen=True)
class Options:
    """Serves the styles that `examples.styles_finetune` has trained, and the base."""

    adapters: Path = Path("runs/styles")
    """The folder with a folder for each style."""
    rows: int = 4
    """Requests that are answered at a time."""
    slots: int = 2
    """Adapters that are in memory at most."""
    most: int = 40
    """Tokens of an answer at most."""


@dataclasses.dataclass
class Request:
    """A question, and who shall answer it.

    Attributes:
      name: of the adapter; ``None`` for the base.
      prompt: the tokens of the question.
      answer: the tokens of the answer, as far as there is one.
      row: of the batch, where it is answered.
    """

    name: str | None
    prompt: Sequence[int]
    answer: list[int] = dataclasses.field(default_factory=list)
    row: int = -1


def cached_apply(model: smollm2.SmolLM2) -> Any:
    """The model for `generate.step`; its variables are the base, the stack, and each row's id."""

    def apply(variables: Any, cache: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        params, stacked, ids = variables
        return lora_jax.lora_apply(
            model,
            {"params": params, "cache": cache},
            stacked,
            tokens,
            lengths,
            cached=True,
            mutable="cache",
            adapter_ids=ids,
            in_axes=0,
            variable_axes={"cache": 0},
        )

    return apply


def serve(
    model: smollm2.SmolLM2,
    apply: Any,
    params: Any,
    pool: lora_jax.AdapterPool,
    requests: Iterable[Request],
    *,
    rows: int,
    most: int,
    end: int,
) -> Iterator[Request]:
    """Answers requests as rows of a batch become free, and yields each when it is answered.

    A row keeps its adapter in memory by a lease. Of the program that reads one new token in every
    row there is one, whichever adapters are in it; of that which reads a new prompt there is one
    for each of a few lengths.

    Args:
      model: whose cache it is.
      apply: of `cached_apply`; compiled once, so pass the same one each time.
      params: the base.
      pool: the adapters.
      requests: taken one by one.
      rows: of the batch; the pool must have a slot for each of their adapters, or the next request
        waits for one that it cannot get.
      most: tokens of an answer at most.
      end: the token that ends an answer; it is left out.
    """
    waiting, running = deque(requests), dict[int, tuple[Request, Lease]]()
    cache = smollm2.empty_cache(model, rows)
    last, ids = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    put_row = jax.jit(smollm2.put_row, donate_argnames="cache")
    while waiting or running:
        while waiting and len(running) < rows:
            used = {lease.name for _, lease in running.values()} - {None}
            if waiting[0].name not in {*used, None} and len(used) == pool.slots:
                break  # until a row of another adapter is free
            request = waiting.popleft()
            lease = pool.acquire(request.name)
            row = next(row for row in range(rows) if row not in running)
            tokens, lengths = generate.pad([request.prompt])
            variables = params, pool.stacked, np.array([lease.id], np.int32)
            alone, first = generate.step(
                apply, variables, smollm2.empty_cache(model, 1), tokens, lengths
            )
            cache = put_row(cache=cache, row=row, other=alone)
            last[row], ids[row], request.row = int(first[0]), lease.id, row
            running[row] = request, lease
        for row, (request, lease) in list(running.items()):
            ended = last[row] == end
            if not ended:
                request.answer.append(int(last[row]))
            if ended or len(request.answer) == most:
                lease.release()
                del running[row]
                yield request
        if running:
            lengths = np.array([row in running for row in range(rows)], np.int32)
            variables = params, pool.stacked, ids
            cache, new = generate.step(apply, variables, cache, last[:, None], lengths)
            last = np.array(new)


def main(options: Options) -> None:
    """Asks every style the same questions, and shows what it took."""
    console = Console()
    folders = sorted(path.parent for path in options.adapters.glob("*/adapter.json"))
    if not folders:
        raise MissingAsset(f"There are no adapters in {options.adapters}: run `make styles` first.")
    config, params = smollm2.load_pretrained()
    model, tokenizer = smollm2.SmolLM2(config), chat.load_tokenizer()
    like = [lora_jax.load(folder, params)[1] for folder in folders]
    pool = lora_jax.AdapterPool(params, like, slots=options.slots, root=options.adapters)
    requests = [
        Request(name, chat.prompt(tokenizer, question))
        for question in SAMPLES
        for name in (None, *(folder.name for folder in folders))
    ]
    questions = {
        id(request): SAMPLES[i // (len(folders) + 1)] for i, request in enumerate(requests)
    }
    begin = time.perf_counter()
    answered = serve(
        model,
        cached_apply(model),
        params,
        pool,
        requests,
        rows=options.rows,
        most=options.most,
        end=tokenizer.token_to_id(chat.END),
    )
    count = 0
    for request in answered:
        count += len(request.answer)
        who = request.name or "base"
        console.print(f"[bold]row {request.row}, {who}[/]: {questions[id(request)]}")
        console.print(f"  {tokenizer.decode(request.answer)}", highlight=False, markup=False)
    seconds = time.perf_counter() - begin
    table = rich.table.Table(show_header=False)
    for name, value in {
        "answers, tokens": f"{len(requests)}, {count}",
        "tokens a second, with compiling": f"{count / seconds:.1f}",
        "programs compiled": f"{generate.step._cache_size()}",
        "adapters in memory, of": f"{pool.slots} of {len(folders)}, {pool.nbytes / 2**20:.1f} MiB",
        "loads, evictions": f"{pool.stats.loads}, {pool.stats.evictions}",
    }.items():
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except MissingAsset as error:
        sys.exit(f"error: {error}")
