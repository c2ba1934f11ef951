"""What the compilers of accelerators count of a step, of shapes alone: no array is made."""

import dataclasses
import functools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax
from benchmarks.contenders import qwix
from benchmarks.contenders.baselines import with_vector
from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.program import costs
from benchmarks.contenders.training import adamw_step, cross_entropy
from benchmarks.models import arrays
from benchmarks.models.cases import Case, shapes
from benchmarks.models.sharded import LAYOUTS, ScannedDecoder, spec_of
from benchmarks.running import compilers, hlo

# A layer of a decoder, with sizes that tokens do not have.
LAYER = Case(
    *("layer of a decoder", "decoder", 2048, 8192, 16, 1, 4, 1024, 16, "bfloat16"),
    vocab=32_000,
    remat=True,
)
# Layers with the shapes of an 8B model, for 16 chips.
LAYERS = Case(
    *("layers of an 8B decoder", "decoder", 4096, 14336, 32, 4, 16, 2048, 16, "bfloat16"),
    kv_heads=8,
    vocab=32_000,
    remat=True,
)
# Of which XLA counts what is in a loop once.
IN_LOOPS = ("flops", "bytes_accessed")
# All of an 8B model, Llama 3's, with one sequence for each of 16 chips.
EIGHT_B = dataclasses.replace(LAYERS, name="8B decoder", layers=32, vocab=128_256, scale=1.0)


def abstract_problem(name: str, case: Case) -> Any:
    """A contender with shapes in the place of arrays."""

    def params(case: Case) -> Any:
        dtype = jnp.dtype(case.dtype)
        flat = {path: jnp.zeros(shape, dtype) for path, shape in shapes(case).items()}
        return unflatten_dict(flat, sep="/")

    found = []

    def make() -> tuple[Any, Any]:
        found.append(PROBLEMS[name](case))
        return found[0].trained, found[0].frozen

    with mock.patch.object(arrays, "params", params):
        trained, frozen = jax.eval_shape(make)
    return dataclasses.replace(found[0], trained=trained, frozen=frozen)


def on_one_device(name: str, case: Case, accelerator: str) -> dict[str, float]:
    """What a step of AdamW writes and needs on one device.

    Args:
      name: of the contender.
      case: a decoder whose tokens are other numbers than its features.
      accelerator: ``"h100"``, or a topology of TPUs.

    Returns:
      Costs of the program, and ``kernel_bytes``: of the arrays that it writes which are as large as
      a kernel and have no axis of tokens, that is, copies of the base.
    """
    problem = abstract_problem(name, case)
    tx, step = adamw_step(problem.loss)
    batch = (jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32),) * 2
    args = problem.trained, jax.eval_shape(tx.init, problem.trained), problem.frozen, batch
    lowered = step.lower(*compilers.placed(args, compilers.one_device(accelerator)))
    compiled = lowered.compile()
    axes_of_tokens = {case.batch, case.length, case.tokens, case.batch * case.heads}

    def is_of_the_base(array: hlo.Array) -> bool:
        return array.size >= case.width**2 and not axes_of_tokens & set(array.shape)

    found = {key: value for key, value in costs(compiled, lowered).items() if value is not None}
    return {**found, "kernel_bytes": hlo.written(compiled.as_text(), is_of_the_base)}


def on_a_mesh(
    name: str, case: Case, topology: str, layout: str, unroll: int = 1
) -> dict[str, float]:
    """What a step of AdamW needs on each chip of a mesh, and what their collectives move.

    Args:
      name: ``"floor"``, ``"lora"``, ``"dora"``, ``"qwix"`` or ``"qwix-float32"``.
      case: a decoder.
      topology: of TPUs, or ``"cpu"``.
      layout: one of `LAYOUTS`: the batch, and the inputs of kernels, are sharded by the axis
        ``data``, and their outputs by ``model``. Adapters are where the library puts them.
      unroll: how many layers are in one turn of the loop, whose body XLA counts once.
    """
    sizes = LAYOUTS[layout]
    chips = compilers.devices(topology)[: math.prod(sizes)].reshape(sizes)
    mesh = Mesh(chips, ("data", "model"))
    by_rows = NamedSharding(mesh, PartitionSpec("data"))

    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, by_rows)

    model = ScannedDecoder(case, constrain, unroll)
    ids = jax.ShapeDtypeStruct((case.batch, case.length), jnp.int32, sharding=by_rows)
    params = jax.eval_shape(
        lambda ids: ScannedDecoder(case, lambda x: x).init(jax.random.key(0), ids)["params"], ids
    )
    params = placed(params, by_hand(params, mesh))
    trained, loss = _trained(name, case, model, params)
    tx = optax.adamw(1e-4)
    where = _where(name, trained, params, mesh)
    opt_state = jax.eval_shape(tx.init, trained)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = (
        where,
        optax.tree_map_params(
            tx, lambda _, one: one, opt_state, where, transform_non_params=lambda _: whole
        ),
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state: Any, frozen: Any, ids: Any) -> Any:
        trained, opt_state = state
        value, grads = jax.value_and_grad(loss)(trained, frozen, ids)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), value

    lowered = step.lower(placed((trained, opt_state), shardings), params, ids)
    compiled = lowered.compile()
    found = {key: value for key, value in costs(compiled, lowered).items() if value is not None}
    return {**found, "sent_bytes": hlo.sent(compiled.as_text())}


def of_all_layers(once: dict[str, float], case: Case, *args: Any) -> dict[str, float]:
    """What XLA counts once of a loop, as often as it runs.

    A loop with two layers in a turn has one layer more in what is counted.

    Args:
      once: what was counted of the loop with one.
      case: a decoder.
      *args: of `on_a_mesh`, its contender, topology and layout.
    """
    name, topology, layout = args
    two = on_a_mesh(name, case, topology, layout, unroll=2)
    return {key: once[key] + (case.layers - 1) * (two[key] - once[key]) for key in IN_LOOPS}


def placed(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree, each in its place."""

    def one(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree, shardings)


def by_hand(params: Any, mesh: Mesh) -> Any:
    """Where parameters are, as a user says it of their paths."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, spec_of(path)), params
    )


def _where(name: str, trained: Any, params: Any, mesh: Mesh) -> Any:
    """Where what is trained is."""
    if name == "floor":
        return NamedSharding(mesh, PartitionSpec())
    if name.startswith("qwix"):
        return by_hand(trained, mesh)
    return lora_jax.shardings(params, trained)


def _trained(name: str, case: Case, model: Any, params: Any) -> tuple[Any, Any]:
    """What is trained, as shapes, and its loss."""
    if name == "floor":
        vector = jax.ShapeDtypeStruct((case.width,), jnp.float32)

        def loss(vector: Any, params: Any, ids: Any) -> jax.Array:
            logits = with_vector(lambda: model.apply({"params": params}, ids), vector)
            return cross_entropy(logits, ids)

        return vector, loss
    if name.startswith("qwix"):
        dtype = jnp.float32 if name == "qwix-float32" else None
        return qwix.abstract_lora(case, model, "layers/({})", dtype)
    rule = lora_jax.Rule(
        "layers/.*/kernel", rank=case.rank, variant=name, input_axes=(1,), batch_axes=(0,)
    )
    config = lora_jax.LoraConfig([rule])
    adapters = jax.eval_shape(
        lambda params: lora_jax.lora_init(jax.random.key(0), params, config)[1], params
    )

    def loss_of_adapters(adapters: Any, params: Any, ids: Any) -> jax.Array:
        return cross_entropy(lora_jax.lora_apply(model, {"params": params}, adapters, ids), ids)

    return adapters, loss_of_adapters
