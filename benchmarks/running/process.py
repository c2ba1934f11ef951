"""A contender in a process of its own, as the parent sees it; the child is the worker."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.cases import Case


class Worker:
    """A contender's process, as its parent sees it.

    Attributes:
      contender: its name.
      log: the file of what it prints.
      built: its first answer.
      ready: its answer to `compile`.
    """

    def __init__(
        self, contender: str, case: Case, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.contender, self.log = contender, log
        self.built: dict[str, Any] = {}
        self.ready: dict[str, Any] = {}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.running.worker", contender, case.dumps()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                # Else transformers imports JAX, in whose memory PEFT has no part.
                env={"USE_FLAX": "0", **os.environ, **(env or {})},
            )

    def compile(self, deadline: float | None = None) -> None:
        """Waits until it is built, has it compiled, and waits for that."""
        self.wait_built(deadline)
        if "error" not in self.built:
            self.send("compile")
            self.wait_ready(deadline)

    def wait_built(self, deadline: float | None = None) -> None:
        """Waits for the first answer."""
        self.built = self.answer(deadline)
        if "error" in self.built:
            self.ready = self.built

    def wait_ready(self, deadline: float | None = None) -> None:
        """Waits for the answer to `compile`."""
        self.ready = self.answer(deadline)

    def ask(self, line: str, deadline: float | None = None) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        self.send(line)
        return self.answer(deadline)

    def send(self, line: str) -> None:
        """Sends a command."""
        assert self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:  # it died, which its answer says
            return

    def answer(self, deadline: float | None = None) -> dict[str, Any]:
        """The next answer; a process that died has one too, and one that is late.

        Args:
          deadline: of `time.monotonic`, after which the process is ended.
        """
        stream = self._process.stdout
        assert stream
        # There is one answer for each command, so that none waits in the buffer.
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([stream], [], [], left)[0]:
            self.stop()
            return {"error": "cut: it was not ready in time"}
        line = stream.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        return {"error": f"died with exit status {code}: {self.last_line()}"}

    def last_line(self) -> str:
        """The last line that it wrote."""
        lines = self.written().splitlines()
        return lines[-1][:300] if lines else "it wrote nothing"

    def written(self, size: int = 4000) -> str:
        """The end of what it wrote."""
        return self.log.read_text(errors="replace").strip()[-size:]

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
