"""Ways to train in JAX: this library's, what one writes by hand, and other libraries'.

Each is a loss of two trees: what is trained, and what is frozen. Both are arguments of the step,
which is otherwise the same for all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from benchmarks import cases, models
from benchmarks.cases import Case
from benchmarks.step import LEARNING_RATE, WEIGHT_DECAY, Step

Loss = Callable[[Any, Any, Any], jax.Array]  # of what is trained, what is frozen, a batch


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a contender trains.

    Attributes:
      loss: function of what is trained, what is frozen, and of tokens with labels.
      trained: tree that is differentiated, updated and donated.
      frozen: tree that is an argument only.
      merge: function of what is frozen and what is trained, to plain parameters.
    """

    loss: Loss
    trained: Any
    frozen: Any
    merge: Callable[[Any, Any], Any] | None = None


def make_step(contender: str, case: Case) -> Step:
    """A step of AdamW, traced."""
    problem = PROBLEMS[contender](case)
    loss, frozen = problem.loss, problem.frozen
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = tuple(map(jnp.asarray, cases.batch(case)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trained: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    state = [problem.trained, tx.init(problem.trained)]
    leaves = jax.tree.leaves(state[0])
    facts: dict[str, Any] = {
        "trained": sum(leaf.size for leaf in leaves),
        "trained_dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
        "device": device_facts(),
    }
    program = Program(train_step, (*state, frozen, batch), facts)
    forward_fn, merge_fn = jax.jit(loss), jax.jit(problem.merge) if problem.merge else None

    def run() -> float:
        state[0], state[1], value = jax.block_until_ready(program(*state, frozen, batch))
        return float(value)

    def forward() -> float:
        return float(forward_fn(state[0], frozen, batch))

    def merge_now() -> float:
        jax.block_until_ready(merge_fn(frozen, state[0]))
        return 0.0

    jobs = {"step": run, "forward": forward}
    if merge_fn:
        jobs["merge"] = merge_now
    return Step(jobs, facts, program.compile, device_memory)


class Program:
    """A jitted function for arguments of these shapes: traced now, compiled when it is said."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], facts: dict[str, Any]) -> None:
        begin = time.perf_counter()
        traced = function.trace(*arguments)
        middle = time.perf_counter()
        self._lowered, self._facts, self._compiled = traced.lower(), facts, None
        facts["trace_seconds"] = middle - begin
        facts["lower_seconds"] = time.perf_counter() - middle

    def compile(self) -> None:
        """Compiles, and notes how long it takes, and what the program costs."""
        hits: list[str] = []

        def listen(event: str, **_: Any) -> None:
            if event == "/jax/compilation_cache/cache_hits":
                hits.append(event)

        jax.monitoring.register_event_listener(listen)
        begin = time.perf_counter()
        self._compiled = self._lowered.compile()
        self._facts["compile_seconds"] = time.perf_counter() - begin
        self._facts["compiled_before"] = bool(hits)
        self._facts |= costs(self._compiled, self._lowered)

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        assert self._compiled is not None
        return self._compiled(*args)


def device_facts() -> dict[str, Any]:
    """What computes."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind}


def device_memory() -> dict[str, int]:
    """Bytes of the device at most since the process began; none where it does not count them."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_device": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def costs(compiled: Any, lowered: Any) -> dict[str, Any]:
    """What XLA says about a program: bytes that it holds, arithmetic, bytes that it moves."""
    memory = compiled.memory_analysis()
    before, after = lowered.cost_analysis() or {}, compiled.cost_analysis() or {}
    sizes = ("temp", "argument", "output", "alias")
    return {
        **{f"{size}_bytes": getattr(memory, f"{size}_size_in_bytes", None) for size in sizes},
        "flops": after.get("flops"),
        "bytes_accessed": after.get("bytes accessed"),
        "traced_flops": before.get("flops"),
    }


def model_loss(model: nn.Module) -> Loss:
    """The loss as a function of a tree of parameters, that are trained, or frozen, or both."""

    def loss(params: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return models.loss(model.apply({"params": params}, ids), labels)

    return loss


def floor(case: Case) -> Problem:
    """The gradient of a vector that is added to the embeddings: what every way has to do."""
    plain = model_loss(models.make(case))

    def loss(shift: Any, params: Any, batch: Any) -> jax.Array:
        def intercept(
            next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            y = next_fun(*args, **kwargs)
            here = context.module.name == "embed" and context.method_name == "__call__"
            return y + shift.astype(y.dtype) if here else y

        with nn.intercept_methods(intercept):
            return plain(params, batch)

    return Problem(loss, jnp.zeros(case.width), models.params(case))


def full(case: Case) -> Problem:
    """All parameters are trained."""
    plain = model_loss(models.make(case))
    return Problem(lambda params, _, batch: plain(params, batch), models.params(case), {})


def config(case: Case, **options: Any) -> lora_jax.LoraConfig:
    """An adapter for each kernel of the case."""
    names = "|".join(sorted({path.split("/")[-1] for path in cases.kernels(case)}))
    pattern, alpha = rf"layers_\d+/({names})/kernel", case.scale * case.rank
    return lora_jax.LoraConfig([lora_jax.Rule(pattern, rank=case.rank, alpha=alpha, **options)])


def library(case: Case, *, variant: str, **options: Any) -> Problem:
    """This library."""
    model, params = models.make(case), models.params(case)
    made = adapters(case, config(case, variant=variant, **options), params)

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return models.loss(lora_jax.lora_apply(model, {"params": frozen}, adapters, ids), labels)

    return Problem(loss, made, params, lora_jax.lora_merge)


def adapters(case: Case, config: lora_jax.LoraConfig, params: Any, count: int | None = None) -> Any:
    """The library's adapters with the factors of the case; ``count`` of them in a stack.

    In one program, which leaves out what `lora_init` draws.
    """

    @jax.jit
    def make(params: Any) -> Any:
        _, made = lora_jax.lora_init(jax.random.key(0), params, config)
        if count is not None:
            made = lora_jax.stack([made] * count)
        flat = flatten_dict(made, sep="/")
        for path, (U, V) in models.factors(case, stack=() if count is None else (count,)).items():
            flat[f"{path}/kernel"] = flat[f"{path}/kernel"].replace(U=U, V=V)
        return unflatten_dict(flat, sep="/")

    return make(params)


def by_hand(call: Callable[[], Any], adapters: Any, add: Callable[..., jax.Array]) -> Any:
    """Calls a model in which ``add(x, U, V)`` is added to what each adapted layer computes.

    Args:
      call: of the model.
      adapters: ``U`` and ``V`` by the path of the layer.
      add: what is added.
    """

    def intercept(
        next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        y = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if path not in adapters or context.method_name != "__call__":
            return y
        (x,) = args
        return y + add(x, *(array.astype(x.dtype) for array in adapters[path]))

    with nn.intercept_methods(intercept):
        return call()


def lora_plain(case: Case) -> Problem:
    """LoRA in twenty lines: an interceptor, and the gradient as it comes."""
    plain, scale = model_loss(models.make(case)), case.scale

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        def add(x: jax.Array, U: jax.Array, V: jax.Array) -> jax.Array:
            return scale * (x @ U) @ V

        out: jax.Array = by_hand(lambda: plain(params, batch), adapters, add)
        return out

    return Problem(loss, models.factors(case), models.params(case))


def merge(case: Case) -> Problem:
    """LoRA as ``W + s U V`` in the place of ``W``, and the gradient as it comes."""
    plain, scale = model_loss(models.make(case)), case.scale

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        flat = flatten_dict(params, sep="/")
        for path, (u, v) in adapters.items():
            w = flat[f"{path}/kernel"]
            flat[f"{path}/kernel"] = w + (scale * u @ v).astype(w.dtype)
        return plain(unflatten_dict(flat, sep="/"), batch)

    return Problem(loss, models.factors(case), models.params(case))


def qwix(case: Case) -> Problem:
    """Qwix, as in https://qwix.readthedocs.io/en/latest/lora.html for Linen, not quantized.

    Its page ends with the adapted model. The gradient is taken for the leaves that it added only,
    as Tunix does with qwix's NNX models.
    """
    import qwix

    names = "|".join(sorted({path.split("/")[-1] for path in cases.kernels(case)}))
    provider = qwix.LoraProvider(
        module_path=rf"layers_\d+/({names})", rank=case.rank, alpha=case.scale * case.rank
    )
    model = qwix.apply_lora_to_model(models.make(case), provider)
    plain = model_loss(model)
    names = ("kernel_lora_a", "kernel_lora_b")

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        flat = flatten_dict(params, sep="/") | flatten_dict(adapters, sep="/")
        return plain(unflatten_dict(flat, sep="/"), batch)

    ids, _ = cases.batch(case)
    made = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), ids)["params"], sep="/")
    adapters = {
        f"{path}/{name}": value.astype(made[f"{path}/{name}"].dtype)
        for path, pair in models.factors(case).items()
        for name, value in zip(names, pair, strict=True)
    }
    check_paths(adapters, {path for path in made if path.endswith(names)})
    return Problem(loss, unflatten_dict(adapters, sep="/"), models.params(case))


def gemma_peft(case: Case) -> Problem:
    """`gemma.peft`, as in the README of its folder and in `gm.nn.LoRA`, of which it is a part.

    It knows no scale, so ``V`` has it. Its dtype is the base's, as in `gm.nn.LoRA`.
    """
    from gemma import peft

    plain, dtype = model_loss(models.make(case)), jnp.dtype(case.dtype)

    def replace(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Dense) and module.name != "head":
            return peft.LoRADense(rank=case.rank, dtype=dtype, wrapped=module)
        return module

    def loss(adapters: Any, params: Any, batch: Any) -> jax.Array:
        with peft.ModuleInterceptor(replace):
            return plain(peft.merge_params(params, adapters), batch)

    adapters = {}
    for path, (u, v) in models.factors(case).items():
        adapters[f"{path}/lora/a"] = u.astype(dtype)
        adapters[f"{path}/lora/b"] = (case.scale * v).astype(dtype)
    return Problem(loss, unflatten_dict(adapters, sep="/"), models.params(case))


def nnx_lora(case: Case) -> Problem:
    """`nnx.LoRALinear` in a model of NNX, in the functional form: split and merge.

    It knows no scale, so ``V`` has it.
    """
    from flax import nnx

    from benchmarks import models_nnx

    graph, abstract, rest = nnx.split(
        nnx.eval_shape(lambda: models_nnx.make(case)), nnx.LoRAParam, ...
    )
    base = flatten_dict(models.params(case), sep="/")
    factors = {}
    for path, (u, v) in models.factors(case).items():
        factors[f"{path}/lora/lora_a"] = u
        factors[f"{path}/lora/lora_b"] = case.scale * v

    def fill(state: Any, values: dict[str, Any]) -> Any:
        flat = dict(nnx.to_flat_state(state))
        check_paths(values, {models_nnx.linen_path(path) for path in flat})
        return nnx.from_flat_state(
            {path: leaf.replace(values[models_nnx.linen_path(path)]) for path, leaf in flat.items()}
        )

    def loss(adapters: Any, frozen: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return models.loss(nnx.merge(graph, adapters, frozen)(ids), labels)

    return Problem(loss, fill(abstract, factors), fill(rest, base))


def check_paths(got: Any, expected: Any) -> None:
    """Stops a contender that adapts other kernels than the others do."""
    if set(got) != set(expected):
        raise ValueError(f"other paths: {sorted(set(got) ^ set(expected))}")


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "floor": floor,
    "full": full,
    "lora": functools.partial(library, variant="lora"),
    "lora-factored": functools.partial(library, variant="lora", product="factored"),
    "lora-outer": functools.partial(library, variant="lora", product="outer"),
    "lora-merged": functools.partial(library, variant="lora", product="dense"),
    "dora": functools.partial(library, variant="dora"),
    "dora-outer": functools.partial(library, variant="dora", product="outer"),
    "dora-detached": functools.partial(library, variant="dora", detach_norm=True),
    "lora-plain": lora_plain,
    "merge": merge,
    "qwix": qwix,
    "gemma-peft": gemma_peft,
    "nnx-lora": nnx_lora,
}
CONTENDERS: dict[str, Callable[[Case], Step]] = {
    name: functools.partial(make_step, name) for name in PROBLEMS
}
