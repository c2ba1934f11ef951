"""Old names, which work for one version more, with a warning that says the new one."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that a name is an old one.

    Args:
      old: what was written.
      new: what to write.
      stacklevel: of the caller's caller, as for ``warnings.warn``.
    """
    warnings.warn(
        f"{old} is now {new}; the old name will be gone in the next version.",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def warn_removed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that something has no effect any more.

    Args:
      old: what was written.
      new: what to write instead.
      stacklevel: as for :func:`warn`.
    """
    warnings.warn(
        f"{old} has no effect any more: write {new}. It will be an error in the next version.",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_arguments(
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    fields: frozenset[str] | None = None,
    /,
    **names: str,
) -> Callable[[F], F]:
    """A decorator for a function whose keyword arguments, or their values, had other names.

    Args:
      values: for each argument ``{old value: new value}``.
      fields: of a dataclass whose ``__init__`` it is, all. ``dataclasses.replace`` passes every
        one of them beside what it is to replace; so where all are there, the old name wins.
      **names: ``old="new"``.

    Example:
      >>> @renamed_arguments(old="new")
      ... def f(new: int) -> int:
      ...     return new
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     f(old=1)
      1
    """

    def decorate(function: F) -> F:
        where = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            is_replace = fields is not None and fields <= kwargs.keys()
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs and not is_replace:
                    raise TypeError(f"{where}: {old}= is the old name of {new}=: pass one of them.")
                warn(f"{where}({old}=...)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            for name, new_values in (values or {}).items():
                value = kwargs.get(name)
                if isinstance(value, str) and value in new_values:
                    new = new_values[value]
                    warn(f"{where}({name}={value!r})", f"{name}={new!r}")
                    kwargs[name] = new
            return function(*args, **kwargs)

        return cast(F, renamed)

    return decorate


def renamed_fields(
    values: Mapping[str, Mapping[Any, Any]] | None = None, /, **names: str
) -> Callable[[type[T]], type[T]]:
    """A class decorator, for fields that had other names: as arguments, and as attributes.

    Args:
      values: as for :func:`renamed_arguments`.
      **names: likewise.

    Example:
      >>> import dataclasses
      >>> @renamed_fields(old="new")
      ... @dataclasses.dataclass
      ... class Point:
      ...     new: int
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     Point(old=1).old
      1
    """

    def decorate(cls: type[T]) -> type[T]:
        fields = frozenset(field.name for field in dataclasses.fields(cls) if field.init)  # type: ignore[arg-type]
        setattr(cls, "__init__", renamed_arguments(values, fields, **names)(cls.__init__))  # noqa: B010
        for old, new in names.items():
            setattr(cls, old, _renamed_attribute(cls.__name__, old, new))
        return cls

    return decorate


def removed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """A class decorator, for fields that have no effect any more: as arguments.

    Args:
      **names: ``old="what to write instead"``.

    Example:
      >>> @removed_fields(old="f(old=...)")
      ... class Point:
      ...     pass
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore")
      ...     point = Point(old=1)
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def without(*args: Any, **kwargs: Any) -> None:
            for name in names.keys() & kwargs.keys():
                warn_removed(f"{cls.__name__}({name}=...)", names[name])
                del kwargs[name]
            init(*args, **kwargs)

        setattr(cls, "__init__", without)  # noqa: B010
        return cls

    return decorate


def _renamed_attribute(cls: str, old: str, new: str) -> property:
    def get(self: Any) -> Any:
        warn(f"{cls}.{old}", new)
        return getattr(self, new)

    return property(get, doc=f"The old name of ``{new}``.")


def renamed_names(module: str, names: Mapping[str, Any]) -> Callable[[str], Any]:
    """A ``__getattr__`` of a module, some of whose names were others.

    Args:
      module: its name.
      names: for each old name what it is now.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", f"{module}.{names[name].__name__}")
        return names[name]

    return get
