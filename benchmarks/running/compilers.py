"""Compilers of accelerators that are not there: what XLA makes of a program on them.

The compilers are in packages that are installed anywhere: `libtpu`, and the two of JAX for CUDA.
They say which arrays a program writes, what memory it needs and, for TPUs, which bytes it moves.
They say nothing of time. For a GPU nothing is tried out as on a real one, where products may be
calls of cuBLAS.
"""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What XLA wants to know of a GPU: https://developer.nvidia.com/h100 and its data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def has(accelerator: str) -> bool:
    """Whether the compiler of an accelerator is installed: ``"h100"``, or a topology of TPUs.

    That of a CPU, ``"cpu"``, always is.
    """
    if accelerator == "cpu":
        return True
    packages = ("jax_cuda12_plugin", "jax_cuda13_plugin") if accelerator == "h100" else ("libtpu",)
    return any(importlib.util.find_spec(package) for package in packages)


@functools.cache
def devices(accelerator: str) -> np.ndarray:
    """The devices of an accelerator, such as ``"v5e:2x2"`` or ``"h100"``."""
    if accelerator == "cpu":
        return np.array(jax.devices("cpu"))
    if accelerator == "h100":
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=accelerator)
    return np.array(found.devices)


def one_device(accelerator: str) -> NamedSharding:
    """Where arrays are that are on one of its devices."""
    return NamedSharding(Mesh(devices(accelerator)[:1], ("x",)), PartitionSpec())


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """The shapes of a tree, on these devices."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, tree)
