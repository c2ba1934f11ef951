"""One rule, and what is said where it cannot be meant so."""

import pytest

import lora_jax


def test_scale():
    assert lora_jax.Rule("x", 8).scale == 1.0
    assert lora_jax.Rule("x", 8, alpha=16).scale == 2.0
    assert lora_jax.Rule("x", 16, alpha=8, rslora=True).scale == 2.0
    assert lora_jax.Rule("x", 16, rslora=True).scale == 4.0


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"pattern": "(", "rank": 2}, ValueError, r"'\(' is not a valid regular expression"),
        ({"pattern": 3, "rank": 2}, TypeError, "pattern must be a string, got 3"),
        ({"rank": 0}, ValueError, r"Rule\('p'\): rank must be at least 1, got 0"),
        ({"rank": -1}, ValueError, "rank must be at least 1, got -1"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
        ({"rank": True}, TypeError, "rank must be an int"),
        ({"alpha": 0}, ValueError, "alpha must be positive and finite, got 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be positive and finite"),
        ({"alpha": "16"}, TypeError, r"Rule\('p'\): alpha must be a number, got '16'"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got '0.1'"),
        ({"std": -1.0}, ValueError, "std must be positive and finite, got -1"),
        ({"variant": "dorra"}, ValueError, r"no variant 'dorra'; there are \['dora', 'lora'"),
        ({"zero": "A"}, ValueError, "zero must be 'U' or 'V', got 'A'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"variant": lora_jax.DoRA}, TypeError, r"must be an instance: variant=DoRA\(\)"),
        ({"variant": lora_jax.DoRA(), "detach_norm": True}, ValueError, "has its own settings"),
        ({"detach_norm": True}, ValueError, "detach_norm is for variant='dora'"),
        ({"fused": 3, "parts": (0, 0)}, ValueError, "each once, as fused is 3"),
        ({"fused": 3, "parts": (3,)}, ValueError, "some of 0 to 2"),
        ({"fused": 3, "parts": ()}, ValueError, "some of 0 to 2"),
        ({"fused": 0}, ValueError, "fused must be at least 1"),
        ({"input_axes": 0}, TypeError, "input_axes must be a tuple of ints"),
        ({"materialize": "no"}, TypeError, "materialize must be a bool, got 'no'"),
        ({"materialize": True, "dropout": 0.1}, ValueError, "materialize=True has no dropout"),
        ({"materialize": True, "tied": "untie"}, ValueError, "one use of a parameter"),
        ({"tied": "materialize", "dropout": 0.1}, ValueError, "rule of their own"),
        ({"tied": True}, ValueError, "tied must be 'materialize', 'untie' or None"),
        ({"dropout": None}, TypeError, "dropout must be a number, got None"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True"),
        ({"batch_axes": 0}, TypeError, "batch_axes must be a tuple of ints, got 0"),
        ({"batch_axes": ("layers",)}, TypeError, "batch_axes must be a tuple of ints"),
    ],
)
def test_bad_rules(arguments, error, match):
    with pytest.raises(error, match=match):
        lora_jax.Rule(**{"pattern": "p", "rank": 2, **arguments})
