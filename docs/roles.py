"""For the reference: Sphinx's roles in docstrings, ``:func:`lora_jax.load` ``, become links.

A role for a public name links to it; one for a private name is shown as code. Where ``lora_jax.``
is before a public name that does not exist, `mkdocs build --strict` stops at the link. What is
below ``Example:`` is an example, also where there is one only.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package when all of it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Looks at every docstring of the package."""
        public = {
            f"{module.path}.{name}"
            for module in (pkg, *pkg.modules.values())
            for name in module.exports or ()
        }
        self._rewrite(pkg, public)

    def _rewrite(self, here: griffe.Object, public: set[str]) -> None:
        if here.docstring is not None:

            def link(found: re.Match[str]) -> str:
                target = _identifier(found[1], here, public)
                return f"`{found[1]}`" if target is None else f"[`{found[1]}`][{target}]"

            text = _ROLE.sub(link, here.docstring.value)
            here.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)
        for member in here.members.values():
            if not member.is_alias:
                self._rewrite(member, public)


def _identifier(name: str, here: griffe.Object, public: set[str]) -> str | None:
    """The public identifier that a name in a docstring means, if it means one."""
    if name.startswith("lora_jax."):
        return None if "._" in name else name
    cls = here if here.is_class else here.parent
    if cls is not None and cls.is_class and name in cls.members:
        own = [path for path in sorted(public) if path.rpartition(".")[2] == cls.name]
        return f"{own[0]}.{name}" if own else None
    street = ".".join(here.path.split(".")[:2])
    first = name.partition(".")[0]
    for module in (street, "lora_jax"):
        if f"{module}.{first}" in public:
            return f"{module}.{name}"
    return None
