"""Installs the package as a user does, and runs the front page's recipe and the command there.

A wheel first, then straight from git, each into an environment without anything of the other, and
in an empty folder: nothing of this repository is there but what was installed.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON_BLOCK = re.compile(
    r"^(?:<!--- invisible-code-block: python|```python)\n(.*?)^(?:--->|```)$", re.M | re.S
)


def run(*command: object, cwd: Path) -> str:
    """What a command prints. Where it fails, this ends with it."""
    done = subprocess.run([*map(str, command)], cwd=cwd, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}error: {' '.join(map(str, command))} failed, see above.")
    return done.stdout


def sources() -> list[str]:
    """The files here that are in git, or would be."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def check_content(wheel: Path) -> None:
    """The wheel has every file of the package with its licence, and no other."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    facts = {name for name in names if ".dist-info/" in name}
    found = names - facts
    expected = {name for name in sources() if name.startswith("lora_jax/")}
    assert "lora_jax/py.typed" in expected
    if found != expected:
        sys.exit(
            f"error: {wheel.name} lacks {sorted(expected - found)} and has "
            f"{sorted(found - expected)}: see tool.setuptools in pyproject.toml."
        )
    if not any(name.endswith("/licenses/LICENSE") for name in facts):
        sys.exit(f"error: {wheel.name} has no LICENSE: see license-files in pyproject.toml.")


def check_installed(python: Path, empty: Path) -> None:
    """The front page's recipe runs, and the command."""
    recipe = "\n".join(PYTHON_BLOCK.findall((ROOT / "README.md").read_text()))
    recipe += "\nprint(lora_jax.__file__, int(state.step))\n"
    file, steps = run(python, "-I", "-c", recipe, cwd=empty).split()
    assert Path(file).is_relative_to(python.parent.parent), file
    assert steps == "3", steps
    command = python.parent / "lora-jax"
    version = re.search(r'= "(.+)"', (ROOT / "lora_jax" / "_version.py").read_text())[1]
    said = run(command, "--version", cwd=empty)
    assert said == f"lora-jax {version}\n", said
    assert "merge" in run(command, "--help", cwd=empty)


def main() -> None:
    """Both ways to install."""
    with tempfile.TemporaryDirectory() as scratch:
        tree, empty = Path(scratch) / "tree", Path(scratch) / "empty"
        empty.mkdir()
        for name in sources():  # a copy: what was once built here is not taken along
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        # The pip of Python 3.11 does not yet know "lora_jax @ git+file://".
        venv.create(Path(scratch) / "venv", with_pip=True, upgrade_deps=True)
        python = Path(scratch) / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
        install = (*pip, "install", "--no-compile")  # most of it is never imported

        run(*pip, "wheel", "--no-deps", "--wheel-dir", scratch, tree, cwd=empty)
        (wheel,) = Path(scratch).glob("*.whl")
        check_content(wheel)
        run(*install, f"lora_jax[cli] @ {wheel.as_uri()}", cwd=empty)
        run(*pip, "check", cwd=empty)
        check_installed(python, empty)
        print(f"{wheel.name}: installed, the recipe of README.md and the command run")

        run(*pip, "uninstall", "--yes", "lora_jax", cwd=empty)
        source = f"git+{ROOT.resolve().as_uri()}"
        run(*install, "--no-deps", f"lora_jax @ {source}", cwd=empty)
        check_installed(python, empty)
        print("git: installed (the last commit), the recipe of README.md and the command run")


if __name__ == "__main__":
    main()
