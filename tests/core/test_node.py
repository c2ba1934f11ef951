"""A leaf of a tree of adapters as a node, and back."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core._fully_trained import as_node


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.ones(2), "float32"),
        (jnp.ones(2, jnp.bfloat16), "bfloat16"),
        (nn.Partitioned(jnp.ones(2, jnp.float16), ("x",)), "float16"),
        (lora_jax.FullyTrained(jnp.ones(2), "bfloat16"), "bfloat16"),
        (lora_jax.FullyTrained(jnp.ones(2), "float32"), "float32"),
        (lora_jax.FullyTrained(nn.Partitioned(jnp.ones(2), ("x",)), "bfloat16"), "bfloat16"),
    ],
)
def test_leaves_are_nodes_and_come_back_as_they_were(leaf, dtype):
    node = as_node(leaf)
    assert node.as_leaf() is leaf
    assert not node.in_base
    assert node.merged_dtype() == dtype
    assert node.merge(None).shape == (2,)
    parameter = node.as_parameter()
    assert {x.dtype.name for x in jax.tree.leaves(parameter)} == {dtype}
    boxed = isinstance(getattr(leaf, "value", None), nn.Partitioned)
    assert isinstance(parameter, nn.Partitioned) == (boxed or isinstance(leaf, nn.Partitioned))


def test_what_only_changes_a_leaf_is_no_parameter():
    adapter = lora_jax.Adapter(jnp.zeros((3, 1)), jnp.ones((1, 2)))
    assert as_node(adapter) is adapter.as_leaf() is adapter
    with pytest.raises(TypeError, match="only changes a leaf"):
        adapter.as_parameter()
