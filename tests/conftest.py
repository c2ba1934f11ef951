"""Several devices, so that sharding can be tested on one CPU. Must run before JAX starts."""

import importlib.metadata
import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Each program is run once or twice: what is spent on compiling it well is lost.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# The emitters of fusions take a third of that. Those before them compute the same, and are there
# in this jaxlib still; the ends, `make test-oldest` and `make test-newest`, use their own.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# They have no doctests, and there is one in several folders.
collect_ignore_glob = ["*conftest.py"]


def pytest_report_header():
    """Which end it is that is tested."""
    packages = ("jax", "flax", "optax")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
