"""PEFT with many adapters, as its documentation says; answers a name with seconds.

`benchmarks.many.process` starts it and ends it:

    python -m benchmarks.many.peft '{"name": ..., ...}' '[1, 4, 32]'
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contenders.pytorch import THREADS
from benchmarks.models import data
from benchmarks.models.cases import Case, kernel_names
from benchmarks.models.pytorch import make

SWITCHED = 8


def main(case: Case, counts: list[int]) -> dict[str, Callable[[], Any]]:
    """What can be timed, by its name."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.hotswap import hotswap_adapter

    torch.set_num_threads(THREADS)
    tokens = torch.from_numpy(data.batch(case)[0].astype("int64"))
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.scale * case.rank,
        target_modules=kernel_names(case),
        init_lora_weights=False,
    )
    plain, model = make(case).eval(), get_peft_model(make(case), config, adapter_name="0").eval()
    for i in range(1, max(*counts, SWITCHED)):
        model.add_adapter(str(i), config)
    turn = iter(range(10**9))
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, selected_adapters=[str(i) for i in range(SWITCHED)])

    def call(model: Any, *, count: int | None = None) -> torch.Tensor:
        with torch.inference_mode():
            if count is None:
                return model(tokens)
            ids = [str(i % count) for i in range(len(tokens))]
            return model(tokens, adapter_names=ids)

    def set_adapter() -> torch.Tensor:
        model.set_adapter(str(next(turn) % SWITCHED))
        return call(model)

    swapped = get_peft_model(make(case), config).eval()

    def hotswap() -> torch.Tensor:
        name = str(next(turn) % SWITCHED)
        hotswap_adapter(swapped, os.path.join(folder, name), adapter_name="default")
        return call(swapped)

    def merged() -> torch.Tensor:
        model.set_adapter(str(next(turn) % SWITCHED))
        model.merge_adapter()
        y = call(model)
        model.unmerge_adapter()
        return y

    return {
        "PyTorch, base": lambda: call(plain),
        **{f"PEFT, {n}": lambda n=n: call(model, count=n) for n in counts},
        "switch, PyTorch, none": lambda: call(plain),
        "switch, PEFT, set_adapter": set_adapter,
        "switch, PEFT, hotswap_adapter": hotswap,
        "switch, PEFT, merge and unmerge": merged,
    }


if __name__ == "__main__":
    # Libraries print what they like; answers go where they cannot.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs = main(Case.loads(sys.argv[1]), json.loads(sys.argv[2]))
    print(json.dumps(list(jobs)), file=out, flush=True)
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        begin = time.perf_counter()
        jobs[line.strip()]()
        print(json.dumps(time.perf_counter() - begin), file=out, flush=True)
