"""PEFT in a process of its own, as the parent sees it; the child is `benchmarks.many.peft`."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.models.cases import Case


class PeftProcess:
    """The process, and what can be timed in it.

    Raises:
      RuntimeError: if the process ends, as where PyTorch or PEFT is not installed.
    """

    def __init__(self, case: Case, counts: tuple[int, ...]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.many.peft", case.dumps(), json.dumps(counts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(
                f"The process of PEFT ended with exit status {self._process.returncode}; what it "
                f"wrote is above. --no-torch leaves PEFT out."
            )
        return json.loads(line)

    def _ask(self, name: str) -> float:
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        return float(self._answer())

    def jobs(self, prefix: str) -> dict[str, Callable[[], float]]:
        """Those whose names begin with the prefix."""
        return {n: functools.partial(self._ask, n) for n in self.names if n.startswith(prefix)}

    def quit(self) -> None:
        """Ends the process."""
        self._process.communicate("quit\n")
