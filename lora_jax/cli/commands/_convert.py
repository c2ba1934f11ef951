"""``lora-jax convert``: an adapter of one format as one of the other."""

from __future__ import annotations

from lora_jax import peft
from lora_jax.cli._arguments import Adapter, Names, Out, Text, check_new, read_names
from lora_jax.cli._printing import print_line
from lora_jax.cli.adapters._open_adapter import is_peft, open_adapter
from lora_jax.cli.adapters._trees_without_model import trees_of_lora_jax, trees_of_peft
from lora_jax.files._save import save


def convert(
    source: Adapter,
    target: Out,
    names: Names = "transformers",
    base_model: Text = None,
    task_type: Text = None,
) -> int:
    """Converts an adapter of lora_jax into one of PEFT, or one of PEFT into one of lora_jax.

    Example: lora-jax convert my-adapter for-peft --names names.json

    Args:
        source: the adapter's folder.
        target: the new folder; it must not exist.
        names: a family of names (transformers, gemma), or a JSON file with a list of
            [Flax's path, PyTorch's name, kind].
        base_model: the base's name for PEFT's config.
        task_type: the task's type for PEFT's config, as SEQ_CLS.
    """
    check_new(target)
    table = read_names(names)
    if is_peft(source):
        _, adapters = trees_of_peft(source, table)
        save(target, adapters)
    else:
        frozen, adapters, axes = trees_of_lora_jax(source, table)
        peft.save(
            target,
            frozen,
            adapters,
            names=table,
            axes=axes,
            base_model_name_or_path=base_model,
            task_type=task_type,
        )
    print_line(f"{target}: {len(open_adapter(target).matrices)} matrices.")
    return 0
