"""Several devices, so that sharding can be tested on one CPU. Must run before JAX starts."""

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
