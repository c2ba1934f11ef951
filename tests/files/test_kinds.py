"""Every kind of node has its way into a file, and what has none is refused."""

import flax.struct
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.files._node_kinds import KINDS, add_kind


@flax.struct.dataclass
class Other(lora_jax.FullyTrained):
    """A node that no file knows."""


def test_a_node_without_a_kind_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="'head/bias' has a Other, which cannot be saved"):
        lora_jax.save(tmp_path / "a", {"head": {"bias": Other(jnp.ones(2))}})
    assert not (tmp_path / "a").exists()


def test_a_section_is_of_one_kind():
    with pytest.raises(ValueError, match="'adapters' already"):
        add_kind(KINDS[0])


def test_the_sections_of_the_format():
    assert [(kind.section, kind.always) for kind in KINDS] == [
        ("adapters", True),
        ("whole", True),
        ("shifts", False),
    ]
