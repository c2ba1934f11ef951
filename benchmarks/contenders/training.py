"""What every way to train in JAX has in common: a problem, and a step of AdamW for it.

A problem is a loss of two trees: what is trained, and what is frozen. Both are arguments of the
step, which is otherwise the same for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.contenders.program import Program, device_facts, device_memory
from benchmarks.contenders.step import LEARNING_RATE, WEIGHT_DECAY, Step
from benchmarks.models import data
from benchmarks.models.cases import Case

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


def model_loss(model: nn.Module) -> Loss:
    """The loss as a function of a tree of parameters, that are trained, or frozen, or both."""

    def loss(params: Any, batch: Any) -> jax.Array:
        ids, labels = batch
        return cross_entropy(model.apply({"params": params}, ids), labels)

    return loss


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, in float32."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def adamw_step(loss: Loss) -> tuple[optax.GradientTransformation, Any]:
    """The optimizer, and its jitted step, which all contenders share."""
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trained: Any, opt_state: Any, frozen: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, frozen, batch)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    return tx, train_step


def make_step(problem: Problem, case: Case) -> Step:
    """A step of AdamW for the batch of the case, traced."""
    loss, frozen = problem.loss, problem.frozen
    tx, train_step = adamw_step(loss)
    batch = tuple(map(jnp.asarray, data.batch(case)))
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


def check_paths(got: Any, expected: Any) -> None:
    """Stops a contender that adapts other kernels than the others do."""
    if set(got) != set(expected):
        raise ValueError(f"other paths: {sorted(set(got) ^ set(expected))}")
