"""What jax and flax are about to take away is heard of while it is still there."""

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["jax.numpy", "flax.linen", "lora_jax.linen._apply"])
def test_a_deprecation_fails_the_test_that_meets_it(module, category):
    """Also where Python alone is silent of it, as in packages."""
    with pytest.raises(category, match="will be removed"):
        warnings.warn_explicit("It will be removed.", category, f"{module}.py", 1, module)
