"""A program of JAX: when it is traced and compiled, and what it costs."""

import time
from typing import Any

import jax


class Program:
    """A jitted function for arguments of these shapes: traced at once, compiled by `compile`."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], facts: dict[str, Any]) -> None:
        begin = time.perf_counter()
        traced = function.trace(*arguments)
        middle = time.perf_counter()
        self._lowered, self._facts, self._compiled = traced.lower(), facts, None
        facts["trace_seconds"] = middle - begin
        facts["lower_seconds"] = time.perf_counter() - middle

    def compile(self) -> None:
        """Compiles, and notes how long it takes, and what the program costs."""
        hits: list[str] = []

        def listen(event: str, **_: Any) -> None:
            if event == "/jax/compilation_cache/cache_hits":
                hits.append(event)

        jax.monitoring.register_event_listener(listen)
        begin = time.perf_counter()
        self._compiled = self._lowered.compile()
        self._facts["compile_seconds"] = time.perf_counter() - begin
        self._facts["compiled_before"] = bool(hits)
        self._facts |= costs(self._compiled, self._lowered)

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        assert self._compiled is not None
        return self._compiled(*args)


def device_facts() -> dict[str, Any]:
    """What computes."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind}


def device_memory() -> dict[str, int]:
    """Bytes of the device at most since the process began; none where it does not count them."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_device": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def costs(compiled: Any, lowered: Any) -> dict[str, Any]:
    """What XLA says about a program: bytes that it holds, arithmetic, bytes that it moves."""
    memory = compiled.memory_analysis()
    before, after = lowered.cost_analysis() or {}, compiled.cost_analysis() or {}
    sizes = ("temp", "argument", "output", "alias")
    return {
        **{f"{size}_bytes": getattr(memory, f"{size}_size_in_bytes", None) for size in sizes},
        "flops": after.get("flops"),
        "bytes_accessed": after.get("bytes accessed"),
        "traced_flops": before.get("flops"),
    }
