"""What the text of a compiled program says: which arrays it writes, and which it sends."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
# What writes nothing.
FREE = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "conditional")
COLLECTIVES = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?$"
)


class Array(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: as XLA calls it.
      shape: its shape.
      in_main_memory: not one that is brought near to where it is computed with.
    """

    dtype: str
    shape: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.size * BYTES.get(self.dtype, 4)


class Instruction(NamedTuple):
    """An instruction: what it does, and what it gives."""

    op: str
    arrays: tuple[Array, ...]
    line: str


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(map(int, filter(None, shape.split(",")))), "S(" not in layout)
        for dtype, shape, layout in re.findall(r"([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", text)
    )


def _computations(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one that is the program."""
    found: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if begin := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{", line):
            name = begin[2]
            found[name] = []
            entry = name if begin[1] else entry
        elif one := re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([a-z][\w\-]*)\(", line):
            found[name].append(Instruction(one[2], _arrays(one[1]), line))
    return found, entry


def instructions(hlo: str) -> Iterator[tuple[Instruction, int]]:
    """Those that are run by themselves, not inside of a fusion, and how often."""
    computations, entry = _computations(hlo)

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for one in computations.get(name, ()):
            yield one, times
            if one.op == "while":
                test, body = (
                    re.search(rf"{part}=%?([\w.\-]+)", one.line)[1]  # type: ignore[index]
                    for part in ("condition", "body")
                )
                yield from walk(body, times * _trips(one.line, computations.get(test, ())))
            elif one.op == "call":
                called = re.search(r"to_apply=%?([\w.\-]+)", one.line)
                yield from walk(called[1] if called else "", times)

    yield from walk(entry, 1)


def _trips(line: str, test: Iterable[Instruction]) -> int:
    """How often a loop runs: as XLA says, or else up to the number that its test compares with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    limits = [re.search(r" constant\((\d+)\)", one.line) for one in test]
    return max((int(limit[1]) for limit in limits if limit), default=1)


def written(hlo: str, counts: Callable[[Array], bool]) -> int:
    """Bytes of the arrays that a program writes, of those that count."""
    return sum(
        times * array.nbytes
        for one, times in instructions(hlo)
        if one.op not in FREE and not one.op.endswith(("-start", "-done"))
        for array in one.arrays
        if array.in_main_memory and counts(array)
    )


def sent(hlo: str) -> int:
    """Bytes that the collectives of a program give, on each chip."""
    total = 0
    for one, times in instructions(hlo):
        if how := COLLECTIVES.match(one.op):
            # What begins one gives its operand too.
            sizes = [array.nbytes for array in one.arrays]
            total += times * (max(sizes, default=0) if how[2] else sum(sizes))
    return total
