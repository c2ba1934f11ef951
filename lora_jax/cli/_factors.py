"""The factors of an adapter on disk, in either format and without a model, and their algebra.

``U V`` is never formed: norms, products and singular values come from matrices of ``r`` columns.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.core._adapter import Adapter
from lora_jax.core._rule import scale
from lora_jax.files._bytes import StrPath
from lora_jax.files._format import INDEX
from lora_jax.files._read import read
from lora_jax.peft import _files as peft_files
from lora_jax.peft._config import CONFIG, PeftConfig
from lora_jax.peft._lora_bias import LoraBias
from lora_jax.peft._names import EXPERTS
from lora_jax.peft._torch_layout import to_factors

Array = np.ndarray[Any, Any]

ADDED = " (added)"


@dataclasses.dataclass(frozen=True)
class Factors:
    """One adapted matrix.

    Attributes:
      U: ``(d, r)``.
      V: ``(r, k)``.
      m: ``(k,)``, or ``None`` for LoRA.
      scale: ``s`` of ``W + s U V``.
      how: what else an adapter of ours says of what it computes, by the names of its fields.
    """

    U: Array
    V: Array
    m: Array | None
    scale: float
    how: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rank(self) -> int:
        """``r``."""
        return int(self.U.shape[1])

    @property
    def singular_values(self) -> Array:
        """Those of ``s U V``, the largest first; there are ``r`` at most that are not zero."""
        _, R = np.linalg.qr(self.U.astype(np.float64))
        _, L = np.linalg.qr(self.V.astype(np.float64).T)
        return self.scale * np.linalg.svd(R @ L.T, compute_uv=False)

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of the singular values (Roy and Vetterli 2007)."""
        values = self.singular_values
        share = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
        return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


@dataclasses.dataclass(frozen=True)
class Opened:
    """An adapter on disk.

    Attributes:
      format: ``"lora_jax"`` or ``"PEFT"``.
      factors: by path, or by the name of the module in PyTorch; of stacked kernels each.
      whole: parameters that were fully trained; and what is added to one of the base's, its scale
        multiplied, by a name that says so.
      facts: what else the files say.
    """

    format: str
    factors: Mapping[str, Factors]
    whole: Mapping[str, Array]
    facts: Mapping[str, str]


def is_peft(path: StrPath) -> bool:
    """Whether a folder holds an adapter of PEFT, and not one of ours."""
    return (Path(path) / CONFIG).exists() and not (Path(path) / INDEX).exists()


def open_adapter(path: StrPath) -> Opened:
    """Reads an adapter of any format; whatever is damaged is an error.

    Raises:
      FileNotFoundError: there is none.
      ValueError: files that are damaged or of another kind.
    """
    return opened(peft_files.read(path, tying=True)) if is_peft(path) else _open_own(path)


def _open_own(path: StrPath) -> Opened:
    stored = read(path)
    factors: dict[str, Factors] = {}
    for name, node in stored.adapters.items():
        if isinstance(node, Adapter):
            how = {field: getattr(node, field) for field in ("variant", "materialize", "untied")}
            how |= dataclasses.asdict(node.axes)
            del how["alone"]
            for index in itertools.product(*map(range, node.U.shape[:-2])):
                m = None if node.m is None else node.m[index]
                at = "".join(f"[{i}]" for i in index)
                factors[name + at] = Factors(node.U[index], node.V[index], m, node.scale, how)
    whole = {
        name: np.asarray(getattr(node, "value", node))
        for name, node in stored.adapters.items()
        if not isinstance(node, Adapter | LoraBias)
    }
    for name, node in stored.adapters.items():
        if isinstance(node, LoraBias):
            whole[name + ADDED] = node.scale * node.value
    for name, arrays in stored.collections.items():
        whole |= {f"{name}: {path}": array for path, array in arrays.items()}
    facts = {"written by": f"lora_jax {stored.library}"}
    facts |= {key: str(value) for key, value in stored.metadata.items()}
    facts["hashes of the base"] = str(len(stored.base)) if stored.base else "none"
    return Opened("lora_jax", factors, whole, facts)


def opened(files: peft_files.PeftFiles) -> Opened:
    """The factors of an adapter of PEFT."""
    factors, whole = {}, {}
    for module, keys in files.modules.items():
        arrays = {role: files.tensors[key] for role, key in keys.items() if role != "bias"}
        A, B = arrays["A"], arrays["B"]
        alone = _parameters(files.config, module)
        pairs = {(files.config.rank_of(n), files.config.alpha_of(n)) for n in alone or [module]}
        if len(pairs) > 1:
            raise ValueError(
                f"{files.tensors.path}: {module!r} is for one of {', '.join(alone)}, of different "
                f"ranks or alphas, and only the model says which: load it with lora_jax.peft.load."
            )
        ((r, alpha),) = pairs
        s = scale(r, alpha, files.config.rslora)
        if alone and A.ndim == 2 and A.shape[0] > r and A.shape[0] % r == 0:
            experts = A.shape[0] // r
            both = to_factors(EXPERTS[0], arrays, (A.shape[1], B.shape[0]), r, experts)
            for e in range(experts):
                factors[f"{module}[{e}]"] = Factors(both["U"][e], both["V"][e], None, s)
            continue
        matrix = (A.size // A.shape[0], B.shape[0])
        if A.shape[0] != r or B.size != r * B.shape[0]:
            raise ValueError(
                f"{files.tensors.path}: {module!r} has A {A.shape} and B {B.shape}, which is not "
                f"of rank {r}, as {CONFIG} says."
            )
        if "m" in arrays and arrays["m"].size != B.shape[0]:
            raise ValueError(
                f"{files.tensors.path}: {module!r} has m {arrays['m'].shape}, but {B.shape[0]} "
                f"outputs."
            )
        both = to_factors("conv" if A.ndim > 2 else "linear", arrays, matrix, r, 1)
        factors[module] = Factors(both["U"], both["V"], both.get("m"), s)
        if "bias" in keys:
            added = files.tensors[keys["bias"]].astype(np.float32)
            whole[f"{module}.bias{ADDED}"] = files.scale(module) * added
    whole |= {name: files.tensors[key] for name, key in files.whole.items()}
    config = files.config
    facts = {"r": str(config.r), "lora_alpha": f"{config.alpha:g}"}
    facts |= {n: str(getattr(config, n)) for n in ("rslora", "dora") if getattr(config, n)}
    return Opened("PEFT", factors, whole, facts)


def _parameters(config: PeftConfig, module: str) -> list[str]:
    """The parameters of a module that may be adapted by themselves, by their names."""
    name = module.split(".base_layer")[0]
    parts = (target.rpartition(".") for target in config.target_parameters)
    return [f"{name}.{last}" for above, _, last in parts if f".{name}".endswith(f".{above}")]


def difference(a: Factors, b: Factors) -> tuple[float, float]:
    """How far ``s U V`` of two adapters of one matrix are apart.

    Returns:
      ``||A - B|| / ||A||`` in the Frobenius norm, and the cosine of the angle between them.
    """
    aa, bb, ab = _inner(a, a), _inner(b, b), _inner(a, b)
    apart = Factors(
        np.concatenate(
            [a.scale * a.U.astype(np.float64), -b.scale * b.U.astype(np.float64)], axis=1
        ),
        np.concatenate([a.V.astype(np.float64), b.V.astype(np.float64)]),
        None,
        1.0,
    )
    norm = float(np.linalg.norm(apart.singular_values))
    relative = norm / np.sqrt(aa) if aa > 0 else (0.0 if norm == 0 else float("inf"))
    return float(relative), float(ab / np.sqrt(aa * bb)) if aa * bb > 0 else float("nan")


def _inner(a: Factors, b: Factors) -> float:
    """The inner product of ``s U V`` of two adapters."""
    left = a.U.astype(np.float64).T @ b.U.astype(np.float64)
    right = a.V.astype(np.float64) @ b.V.astype(np.float64).T
    return float(a.scale * b.scale * (left * right).sum())
