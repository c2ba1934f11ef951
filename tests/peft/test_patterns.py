"""Patterns of module names, as PEFT matches them."""

import pytest

from lora_jax.peft.config._patterns import by_pattern, first_match


def test_patterns_are_pefts():
    """The first that matches the end of a name wins, '.' is any character."""
    patterns = {"layers.1.q": 1, "q": 2, r".*\.mlp\..*": 3, "^x.k": 4}
    modules = {"layers.1.q": 1, "a.layers.1.q": 1, "layersx1.q": 1, "a.q": 2, "aq": 0}
    modules |= {"a.mlp.b": 3, "x.k": 4, "y.x.k": 0}
    assert {module: first_match(patterns, module, 0) for module in modules} == modules


@pytest.mark.parametrize(
    ("pattern", "fits", "other"),
    [
        (r"(?:q|v)_proj", "a.0.v_proj", "a.0.k_proj"),
        (r"layers\.\d{1,2}\.q", "x.layers.12.q", "x.layers.123.q"),
        (r"^(?!.*vision).*\.q", "text.0.q", "vision.0.q"),
        (r".*(?<!k_)proj", "a.q_proj", "a.k_proj"),
        (r"[\d]+?\.q", "a.31.q", "a.b.q"),
        (r"(?:up\.)?q", "a.up.q", "a.k"),
    ],
)
def test_patterns_of_any_kind_that_is_safe(pattern, fits, other):
    assert first_match({pattern: 1}, fits, 0) == 1
    assert first_match({pattern: 1}, other, 0) == 0


def test_patterns_that_are_written():
    values = {"q": 1, "a.q": 2, "b.q": 1, "b": 1}
    common, patterns = by_pattern(values)
    assert (common, patterns) == (1, {"a.q": 2})
    values = {"q": 2, "a.q": 1, "b": 1}
    common, patterns = by_pattern(values)
    assert (common, patterns) == (1, {"^q": 2})
    assert {m: first_match(patterns, m, common) for m in values} == values
