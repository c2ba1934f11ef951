"""Checkpoints of a training with orbax: after a kill it goes on as if it had not been killed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState


class CannotResume(RuntimeError):
    """There are checkpoints, but this training is not the one that they are of."""


@dataclasses.dataclass
class Log:
    """What a training has recorded so far: losses and times of its steps, and accuracies."""

    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    curve: list[list[float]] = dataclasses.field(default_factory=list)


class Checkpoints:
    """The checkpoints of one training, written in the background; the newest one is kept.

    Each has all that training changes, so that the next step is the same bit for bit: adapters,
    optimizer state and step, which says what batch is next; the key; the log. Never the base.
    """

    def __init__(self, folder: Path, every: int, last: int, options: Mapping[str, Any]):
        """Opens the folder of a training.

        Args:
          folder: of this training alone; it is made where there is none.
          every: steps from one checkpoint to the next.
          last: the last step, after which there is always one.
          options: all that the results depend on, as JSON has it.
        """
        self.options = dict(options)
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=every,
                save_on_steps=[last],
                preservation_policy=ocp.checkpoint_managers.LatestN(1),
                cleanup_tmp_directories=True,  # of saves that were killed
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()  # waits for what is being written

    def save(self, step: int, state: TrainState, key: jax.Array, log: Log) -> None:
        """Saves where it is time to. Next steps may donate the state and write to the log."""
        if self.manager.should_save(step):
            said = {"options": self.options, "log": dataclasses.asdict(log)}  # a copy
            arrays = ocp.args.StandardSave({"state": state, "key": key})
            self.manager.save(
                step, args=ocp.args.Composite(arrays=arrays, said=ocp.args.JsonSave(said))
            )

    def restore(self, state: TrainState, key: jax.Array) -> tuple[TrainState, jax.Array, Log]:
        """State, key and log of the newest checkpoint; without one those of a new training.

        Args:
          state: of the new training, which says what the arrays are.
          key: its key.

        Raises:
          CannotResume: the checkpoint is of a training with other options.
        """
        step = self.manager.latest_step()
        if step is None:
            return state, key, Log()
        said = self._read(step, "said", ocp.args.JsonRestore())
        before = said["options"]
        differ = [
            f"{name} was {before.get(name)!r} and is {self.options.get(name)!r}"
            for name in sorted(before | self.options)
            if before.get(name) != self.options.get(name)
        ]
        if differ:
            raise CannotResume(
                f"{self.manager.directory} has checkpoints of a training with other options: "
                f"{'; '.join(differ)}. Use the same, or another --out."
            )
        # A new state's step is a number: as an array it is like later ones, and compiled once.
        target = jax.tree.map(jnp.asarray, {"state": state, "key": key})
        arrays = self._read(step, "arrays", ocp.args.StandardRestore(target))
        return arrays["state"], arrays["key"], Log(**said["log"])

    def _read(self, step: int, name: str, args: ocp.args.CheckpointArgs) -> Any:
        return self.manager.restore(step, args=ocp.args.Composite(**{name: args}))[name]
