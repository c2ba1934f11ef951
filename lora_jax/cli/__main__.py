"""``lora-jax``: looks at adapters, converts, merges, compares, extracts and verifies them."""

from __future__ import annotations

import re
import sys

import jax

from lora_jax._version import __version__


def main() -> None:
    """Runs a command. Exits with 0, with 1 where something differs or is wrong, or with 2."""
    # Files need no accelerator, and must not take one away from a training that runs meanwhile.
    jax.config.update("jax_platforms", "cpu")
    try:
        import tyro

        from lora_jax.cli.commands import COMMANDS
    except ImportError as error:
        sys.exit(f"lora-jax needs {error.name}, which is not installed: pip install rich tyro")
    if sys.argv[1:] == ["--version"]:
        print(f"lora-jax {__version__}")
        return
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            dict(COMMANDS),
            prog="lora-jax",
            description="Looks at adapters, converts, merges, compares, extracts, verifies them. "
            "Each command has a --help with an example; --version says which lora_jax this is.",
        )
    except (ValueError, TypeError, OSError, re.error) as error:
        print(f"lora-jax: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    main()
