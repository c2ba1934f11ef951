"""What the library leans on although nobody promises it.

JAX and Flax may change any of this in any version. So it is read here and nowhere else: each part
with its reason, and with what comes of it where it is gone, which is an error, a refusal, or an
answer that is right and says less. ``tests/test_compat.py`` takes each part away.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import chex
import flax
import flax.core.scope
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx

# --- arrays without a value ---


def is_traced(x: Any) -> bool:
    """Whether an array has no value yet, as inside ``jax.jit``.

    Why: a value that is known is checked, and one that is not cannot be.
    Gone: an array without a value is one that cannot say where it is.
    """
    if tracer := getattr(jax.core, "Tracer", None):
        return isinstance(x, tracer)
    try:
        return isinstance(x, jax.Array) and not x.devices()
    except jax.errors.ConcretizationTypeError:
        return True


def trace_state() -> Any:
    """What is equal at two moments if the same transforms of JAX are under way.

    Why: an array that was made inside of a transform must not be used outside.
    Gone: no two moments are equal.
    """
    state = getattr(jax.extend.core, "get_opaque_trace_state", None)
    return object() if state is None else state(convention="flax")


# --- names of axes of a mesh ---


def spec_of_box(leaf: Any) -> Any:
    """The axes of a mesh that a box of Linen names, as a ``PartitionSpec``; ``None`` without one.

    Why: logical names are made names of a mesh by rules, in a function of ``flax.linen``.
    Gone: boxes say nothing, and their arrays do.
    """
    if isinstance(leaf, nn.LogicallyPartitioned):
        return nn.logical_to_mesh_axes(leaf.names, leaf.rules)  # type: ignore[attr-defined]
    said = getattr(leaf, "get_partition_spec", None)
    return said() if isinstance(leaf, nn.meta.AxisMetadata) and said is not None else None


def mesh_in_force() -> Any:
    """The mesh that ``jax.set_mesh`` has set; ``None`` without one.

    Why: names of axes are of that mesh.
    Gone: the caller says the mesh.
    """
    get_mesh = getattr(jax.sharding, "get_mesh", None)
    mesh = None if get_mesh is None else get_mesh()
    return None if mesh is None or mesh.empty else mesh


# --- a barrier ---


def defined_barrier() -> Callable[[chex.Array], chex.Array]:
    """A ``jax.lax.optimization_barrier`` that is not there under ``jax.vmap``.

    Why: XLA's compiler for CPUs fails one of its checks, and with it the process, on some batched
    matrix products behind a barrier: it leaves an operand in a layout that it has no code for. What
    JAX has in public for another meaning under ``vmap`` cannot be differentiated in reverse.
    Gone: there is no barrier. On CPUs the gradient of ``U`` takes longer, and is the same.

    Example:
      >>> import jax.numpy as jnp
      >>> def has_one(function):
      ...     return "optimization_barrier" in jax.jit(function).lower(jnp.ones((2, 3))).as_text()
      >>> has_one(barrier), has_one(jax.vmap(barrier))
      (True, False)
    """
    try:
        from jax.interpreters import ad, batching, mlir

        p = jax.extend.core.Primitive("lora_jax_barrier")
        p.def_impl(jax.lax.optimization_barrier)
        p.def_abstract_eval(lambda x: x)
        ad.deflinear2(p, lambda cotangent, _: [p.bind(cotangent)])
        batching.primitive_batchers[p] = lambda args, axes: (args[0], axes[0])
        lowering = mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
        mlir.register_lowering(p, lowering)
    except (AttributeError, ImportError, TypeError):
        return lambda x: x
    return p.bind


barrier = defined_barrier()

# --- a product with its own forms for platforms ---


def defined_bilinear(
    product: Callable[..., chex.Array], by_platform: Mapping[str, Callable[..., chex.Array]]
) -> Callable[..., chex.Array]:
    """``product(A, W)``, whose derivatives are products of the same kind.

    Of matrices ``(*batch, q, n)`` and ``(*batch, n, k)`` it makes ``(*batch, q, k)``, in the dtype
    of ``A``; with ``transposed=True`` ``W`` is ``(*batch, k, n)``. It must be linear in each of
    them but for rounding, and is differentiated as if it were ``A W``.

    Why: rounding hides from JAX that a function is linear. What it has in public for a function
    with a transpose of its own cannot be differentiated forwards, or not be mapped.
    Gone: ``A W`` in the dtype of ``A``, the same numbers from a wide copy of ``W``.

    Args:
      product: ``(A, W, transposed)``, on any platform.
      by_platform: the same for platforms that it is another one on.

    Example:
      >>> import jax.numpy as jnp
      >>> product = defined_bilinear(wide_product, {})
      >>> product(jnp.ones((1, 2)), jnp.ones((2, 3), jnp.bfloat16))
      Array([[2., 2., 2.]], dtype=float32)
    """
    try:
        from jax.interpreters import ad, batching, mlir

        p = jax.extend.core.Primitive("lora_jax_product")

        def abstract(A: Any, W: Any, transposed: bool) -> Any:
            return A.update(shape=(*A.shape[:-1], W.shape[-2 if transposed else -1]))

        def batched(args: Any, axes: Any, transposed: bool) -> Any:
            (A, W), (in_A, in_W) = args, axes
            if in_W is None:  # more rows of A
                A = jnp.moveaxis(A, in_A, -3)
                *stack, size, q, n = A.shape
                rows = jnp.reshape(A, (*stack, size * q, n))
                out = p.bind(rows, W, transposed=transposed)
                return jnp.reshape(out, (*A.shape[:-1], out.shape[-1])), out.ndim - 2
            W = jnp.moveaxis(W, in_W, 0)
            if in_A is None:
                A = jnp.broadcast_to(A, (W.shape[0], *A.shape))
            else:
                A = jnp.moveaxis(A, in_A, 0)
            return p.bind(A, W, transposed=transposed), 0

        def of_A(g: Any, A: Any, W: Any, transposed: bool) -> Any:
            return p.bind(g, W, transposed=not transposed)

        def of_W(g: Any, A: Any, W: Any, transposed: bool) -> Any:
            g = wide_product(A.swapaxes(-1, -2), g)
            return (g.swapaxes(-1, -2) if transposed else g).astype(W.aval.dtype)

        p.def_impl(jax.jit(p.bind, static_argnames="transposed"))
        p.def_abstract_eval(abstract)
        ad.defbilinear(p, of_A, of_W)
        batching.primitive_batchers[p] = batched
        mlir.register_lowering(p, mlir.lower_fun(product, multiple_results=False))
        for platform, form in by_platform.items():
            lowering = mlir.lower_fun(form, multiple_results=False)
            mlir.register_lowering(p, lowering, platform=platform)
    except (AttributeError, ImportError, TypeError):
        return wide_product

    def bound(A: chex.Array, W: chex.Array, transposed: bool = False) -> chex.Array:
        # Inside of shard_map types say more than the primitive gives on.
        if jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
            return wide_product(A, W, transposed)
        out: chex.Array = p.bind(A, W, transposed=transposed)
        return out

    return bound


def wide_product(A: chex.Array, W: chex.Array, transposed: bool = False) -> chex.Array:
    """``A W`` at full precision, in the dtype of ``A``."""
    W = W.astype(A.dtype)
    W = W.swapaxes(-1, -2) if transposed else W
    return jnp.matmul(A, W, precision=jax.lax.Precision.HIGHEST)


# --- a linear function whose transpose computes its constants anew ---


def defined_calls_anew() -> Callable[..., list[Any]] | None:
    """``calls_anew(jaxpr, linear, constants)``: what the jaxpr gives for these lists of arrays.

    It is that of a function that is linear in the first if it is differentiated, and computes what
    it needs of the second, such as the kernel that codes stand for. So does its transpose, in the
    backward pass: nothing of it is kept from the forward pass.

    Why: that is what ``jax.checkpoint`` is for. But XLA's compiler for CPUs takes barriers out
    before it looks for what is computed twice, finds all of it, and keeps it for the backward pass;
    and it computes early what depends on parameters only, for all layers. There each call is in a
    branch, which is always taken, and out of which nothing is moved.
    Gone: ``None``, and there is ``jax.checkpoint``: on CPUs more memory, and the same numbers.

    Example:
      >>> codes = jax.numpy.ones((2, 3), "int8")
      >>> def product(linear, constants):
      ...     return linear[0] @ constants[0].astype("float32")
      >>> def loss(x):
      ...     jaxpr = jax.make_jaxpr(product)([x], [codes])
      ...     return calls_anew(jaxpr, [x], [codes])[0].sum()
      >>> jax.grad(loss)(jax.numpy.ones((1, 2)))
      Array([[3., 3.]], dtype=float32)
    """
    try:
        from jax.interpreters import ad, batching, mlir

        zero: Any = ad.Zero
        instantiated: Any = ad.instantiate_zeros
        as_function = jax.extend.core.jaxpr_as_fun
        closed_jaxpr = jax.extend.core.ClosedJaxpr
        p = jax.extend.core.Primitive("lora_jax_calls_anew")
        p.multiple_results = True

        def called(*args: Any, function: Any, count: int, backward: bool) -> list[Any]:
            del backward
            return list(function(list(args[:count]), list(args[count:])))

        def behind_barrier(*args: Any, count: int, backward: bool, **static: Any) -> list[Any]:
            if backward:
                args = tuple(jax.lax.optimization_barrier(args))
            return called(*args, count=count, backward=backward, **static)

        def in_branch(*args: Any, **static: Any) -> list[Any]:
            computed = functools.partial(called, **static)
            never = _above_infinity(args[0])
            return list(jax.lax.cond(never, functools.partial(_zeros, computed), computed, *args))

        def abstract(*args: Any, **static: Any) -> Any:
            given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
            out = jax.eval_shape(functools.partial(called, **static), *given)
            kind = args[0]
            return [kind.update(shape=x.shape, dtype=x.dtype, weak_type=False) for x in out]

        def jvp(primals: Any, tangents: Any, *, count: int, **static: Any) -> Any:
            full = [instantiated(t) for t in tangents]
            if any(type(t) is not zero for t in tangents[count:]):
                call = functools.partial(called, count=count, **static)
                return jax.jvp(call, tuple(primals), tuple(full))
            bound = functools.partial(p.bind, count=count, **static)
            return bound(*primals), bound(*full[:count], *primals[count:])

        def transposed(
            cotangents: Any, *args: Any, function: Any, count: int, backward: Any
        ) -> Any:
            avals, constants = [one.aval for one in args[:count]], args[count:]
            if all(type(c) is zero for c in cotangents):
                return [*map(zero, avals), *[None] * len(constants)]
            given = [instantiated(c) for c in cotangents]
            shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals)
            static = {"function": _Transposed(function, shapes), "count": len(given)}
            out = p.bind(*given, *constants, **static, backward=not backward)
            return [*out, *[None] * len(constants)]

        def batched(args: Any, axes: Any, *, function: Any, count: int, backward: bool) -> Any:
            mapped = _Mapped(function, tuple(axes[:count]), tuple(axes[count:]))
            out = p.bind(*args, function=mapped, count=count, backward=backward)
            return out, [0] * len(out)

        p.def_impl(called)
        p.def_abstract_eval(abstract)
        ad.primitive_jvps[p] = jvp
        ad.primitive_transposes[p] = transposed
        batching.primitive_batchers[p] = batched
        mlir.register_lowering(p, mlir.lower_fun(behind_barrier, multiple_results=True))
        on_cpus = mlir.lower_fun(in_branch, multiple_results=True)
        mlir.register_lowering(p, on_cpus, platform="cpu")
    except (AttributeError, ImportError, TypeError):
        return None

    def bound(jaxpr: Any, linear: Sequence[Any], constants: Sequence[Any]) -> list[Any]:
        # What the function has closed over are constants too: they may be of a trace around.
        count, of_linear = len(constants), len(linear)

        def function(linear: list[Any], constants: list[Any]) -> list[Any]:
            run = as_function(closed_jaxpr(jaxpr.jaxpr, constants[count:]))
            return list(run(*linear, *constants[:count]))

        static = {"function": function, "count": of_linear, "backward": False}
        return list(p.bind(*linear, *constants, *jaxpr.consts, **static))

    return bound


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """The transpose of a linear function."""

    function: Callable[..., Any]
    shapes: tuple[Any, ...]

    def __call__(self, linear: list[Any], constants: list[Any]) -> list[Any]:
        def function(*arrays: Any) -> Any:
            return list(self.function(list(arrays), constants))

        return list(jax.linear_transpose(function, *self.shapes)(linear))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A function under ``jax.vmap``."""

    function: Callable[..., Any]
    linear: tuple[int | None, ...]
    constants: tuple[int | None, ...]

    def __call__(self, linear: list[Any], constants: list[Any]) -> list[Any]:
        axes = (list(self.linear), list(self.constants))
        return list(jax.vmap(self.function, in_axes=axes)(linear, constants))


def _above_infinity(array: chex.Array) -> chex.Array:
    """Whether the first number is above infinity, which none is, as no compiler finds out."""
    if not (array.size and jnp.issubdtype(array.dtype, jnp.floating)):
        return jnp.bool_(False)
    one = jnp.reshape(jax.lax.slice(array, (0,) * array.ndim, (1,) * array.ndim), ())
    return one > jnp.array(jnp.inf, one.dtype)


def _zeros(function: Callable[..., Any], *args: Any) -> Any:
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


calls_anew = defined_calls_anew()

# --- what jax.make_jaxpr gives ---


@dataclasses.dataclass(frozen=True)
class Branches:
    """One of these functions is called, and what it gives is the result.

    Attributes:
      functions: their jaxprs.
      deciding: how many inputs say which; the others are those of the functions.
    """

    functions: Sequence[Any]
    deciding: int = 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """``(consts of test, consts of body, carry, xs) -> (carry, ys)``.

    Attributes:
      body: a jaxpr, ``(consts, carry, x) -> (carry, y)``.
      consts: how many.
      carry: how many.
      test: a jaxpr, ``(consts, carry) -> goes on``, of a loop that has one.
    """

    body: Any
    consts: int
    carry: int
    test: Any = None


def written(eqn: Any) -> Branches | Loop | None:
    """What an equation of a jaxpr does with the functions in it; ``None`` where that is not known.

    Why: ``kernel_axes`` must see through loops, branches and calls which parameters a model reads.
    How they are written down changes: jax 0.11 did it for ``scan``. Each is known by its name, and
    its functions must take and give just the types that they would if it were as it is known here.
    Gone: ``None``, and every input counts as used (:func:`lora_jax.tracing._liveness.live_inputs`).
    """
    know = _KNOWN.get(eqn.primitive.name)
    return know(eqn) if know else None


def is_jit(eqn: Any) -> bool:
    """Whether an equation of a jaxpr is a function under ``jax.jit``.

    Why: a layer that ``nn.jit`` has in its cache is not called again, and its use is seen there.
    Gone: only what the result depends on counts as used.
    """
    return eqn.primitive.name in ("jit", "pjit")


def mark_of(eqn: Any) -> str | None:
    """The name that ``jax.ad_checkpoint.checkpoint_name`` has given what an equation computes.

    Why: what goes into a product is found by it, also in loops, to know which layers are last.
    Gone: ``None``, and it is not known which layers are output heads.
    """
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return name if isinstance(name, str) else None


# What gives its first operand, or a slice of it.
_PASS_ON = {
    *("broadcast_in_dim", "dynamic_slice", "gather", "reshape", "slice", "squeeze", "transpose"),
    *("convert_element_type", "copy", "copy_p", "name"),
    *("device_put", "mesh_cast", "pcast", "pvary", "reshard", "sharding_constraint"),
}


def passed_on(eqn: Any, given: Sequence[Any]) -> list[Any]:
    """What of each operand comes out of an equation as it is, or as a slice; else ``None``.

    Why: transforms slice parameters on their way to a layer, and the model may change them.
    Gone: a parameter counts as changed, and its layer is refused.

    Args:
      eqn: the equation.
      given: something for each operand.
    """
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return list(given)
    passes_on = name in _PASS_ON
    if passes_on and name == "transpose":  # a matrix is not another one's transpose
        passes_on = len(eqn.outvars[0].aval.shape) > 2
    if passes_on and name == "reshape":
        before, after = (
            [n for n in v.aval.shape if n != 1] for v in (eqn.invars[0], eqn.outvars[0])
        )
        passes_on = before == after
    return [given[0] if passes_on else None] * len(eqn.outvars)


def is_literal(v: Any) -> bool:
    """Whether an input in a jaxpr is a number that is written there."""
    return isinstance(v, jax.extend.core.Literal)


def only_converts(function: Callable[..., Any], *operands: Any) -> bool:
    """Whether a function of arrays does nothing to them but convert their dtypes.

    Why: a layer's own ``promote_dtype`` may compute with something else than the kernel.
    Gone: ``False``, and the kernel is refused.
    """
    eqns = jax.make_jaxpr(function)(*operands).jaxpr.eqns
    return all(eqn.primitive.name == "convert_element_type" for eqn in eqns)


def _call(eqn: Any) -> Branches | None:
    """One function, of all inputs, that gives all outputs."""
    called = _functions(eqn.params.values())
    # No types, as those inside shard_map are of one device.
    return Branches(called) if len(called) == 1 and _sizes(called[0]) == _sizes(eqn) else None


def _cond(eqn: Any) -> Branches | None:
    """``index, operands -> results``, each branch from the operands to the results."""
    branches = _functions(eqn.params.get("branches") or ())
    takes, gives = _types(eqn.invars[1:]), _types(eqn.outvars)
    fit = branches and all(_runs(branch, takes, gives) for branch in branches)
    return Branches(branches, deciding=1) if fit else None


def _scan(eqn: Any) -> Loop | None:
    """``consts, carry, xs -> carry, ys``: the body has an axis less of ``xs`` and of ``ys``."""
    called = _functions(eqn.params.values())
    if len(called) != 1 or _sizes(called[0]) != _sizes(eqn):
        return None
    body = called[0]
    carry = _alike(_types(body.outvars), _types(eqn.outvars))
    kept = _alike(_types(body.invars), _types(eqn.invars))
    consts = kept - carry
    takes = _types(eqn.invars[:kept]) + _sliced(eqn.invars[kept:])
    gives = _types(eqn.outvars[:carry]) + _sliced(eqn.outvars[carry:])
    if consts < 0 or not _runs(body, takes, gives) or takes[consts:kept] != gives[:carry]:
        return None
    return Loop(body, consts, carry)


def _while(eqn: Any) -> Loop | None:
    """``consts of the condition, consts of the body, carry -> carry``."""
    called = _functions(eqn.params.get(name) for name in ("cond_jaxpr", "body_jaxpr"))
    if len(called) != 2:
        return None
    cond, body = called
    carry = _types(eqn.outvars)
    of_cond, of_body = (len(one.invars) - len(carry) for one in called)
    if (
        min(of_cond, of_body) < 0
        or _types(cond.invars) != _types(eqn.invars[:of_cond]) + carry
        or not _runs(body, _types(eqn.invars[of_cond:]), carry)
    ):
        return None
    return Loop(body, of_body, len(carry), test=cond)


# What only calls a function, in any version of jax that is supported.
_CALLS = (
    "jit pjit call closed_call core_call remat remat2 checkpoint compute_on xla_metadata_call "
    "custom_jvp_call custom_vjp_call custom_vmap_call custom_dce_call shard_map"
)
_KNOWN: dict[str, Callable[[Any], Branches | Loop | None]] = {
    **dict.fromkeys(_CALLS.split(), _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}


def _functions(values: Iterable[Any]) -> list[Any]:
    """The jaxprs in parameters of an equation."""
    # With constants, which a closed one has, or without.
    return [one for value in values if hasattr(one := getattr(value, "jaxpr", value), "eqns")]


def _runs(function: Any, takes: list[Any], gives: list[Any]) -> bool:
    return (_types(function.invars), _types(function.outvars)) == (takes, gives)


def _sizes(eqn: Any) -> tuple[int, int]:
    return len(eqn.invars), len(eqn.outvars)


def _types(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    avals = (v.aval for v in variables)
    return [(getattr(aval, "shape", None), getattr(aval, "dtype", None)) for aval in avals]


def _sliced(variables: Iterable[Any]) -> list[tuple[Any, Any]]:
    return [(shape[1:] if shape else None, dtype) for shape, dtype in _types(variables)]


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))


# --- Flax's scopes ---


class Maps:
    """Whether ``nn.map_variables`` is around a module, in one call of a model.

    Why: it would map adapters as it maps kernels. Flax says what is around a scope in its
    ``debug_path`` only, as in ``("block", "map_variables(dense)")``.
    Gone: it may be around everything, where Flax does not say it of a probe that has it around.
    """

    @functools.cached_property
    def _is_reported(self) -> bool:
        inside: list[nn.Module] = []
        _MAPPED_PROBE(inside.append, parent=None).apply({})
        return any(map(_says_mapped, inside))

    def may_be_of_params(self, module: nn.Module) -> bool:
        """Whether the parameters that a module sees may have gone through it.

        Which collections are mapped stands nowhere but in Flax's own call of the map, further up.
        Gone: every map is one of parameters.
        """
        is_around = not self._is_reported or _says_mapped(module)
        return is_around and not _maps_others_only()


_MAPPED = "mapped_collections"  # what nn.map_variables calls them inside


def _maps_others_only() -> bool:
    found = []
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "flax.core.lift":
            found.append(frame.f_locals.get(_MAPPED))
        frame = frame.f_back
    maps = [collections for collections in found if collections is not None]
    return bool(maps) and not any(flax.core.scope.in_filter(one, "params") for one in maps)


class Probe(nn.Module):
    """Tells what it is while it is called, which is not a call of the model."""

    tell: Callable[[nn.Module], None]

    def __call__(self) -> None:
        """Tells."""
        self.tell(self)


_MAPPED_PROBE: Any = nn.map_variables(Probe, "params", lambda tree: tree)


def _says_mapped(module: nn.Module) -> bool:
    path = getattr(module.scope, "debug_path", None) or ()
    return any("map_variables(" in str(part) for part in path)


def is_intercepted_inside(
    next_fun: Callable[..., Any], context: nn.module.InterceptorContext
) -> bool:
    """Whether a method is intercepted once more, by the model itself, inside of our interceptor.

    Why: a handler computes in the place of the method, and would skip what the model does there.
    Flax gives an interceptor the method as it is where there is none.
    Gone: every method counts as intercepted, and its layer is refused.
    """
    return next_fun is not context.orig_method


def is_module(value: Any) -> bool:
    """Whether something is a module of Flax, for streets that know none."""
    return isinstance(value, nn.Module | nnx.Module)


def is_nnx_in_linen(module: nn.Module) -> bool:
    """Whether a module of Flax Linen is one of NNX inside."""
    return isinstance(module, nnx.bridge.ToLinen)


def is_module_class(value: Any) -> bool:
    """Whether something is a class of such modules."""
    return isinstance(value, type) and issubclass(value, nn.Module | nnx.Module)


def key_aside(module: nn.Module, stream: str) -> chex.PRNGKey:
    """A key of a module's own stream, which then goes on as if it had not been asked.

    Why: with adapter dropout the model's own must drop what it dropped without.
    Gone: an error.
    """
    counters = getattr(module.scope, "rng_counters", {})
    before = counters.get(stream)
    key = module.make_rng(stream)
    if before is None or counters.get(stream) != before + 1:
        _refuse("Scope.rng_counters", "the dropout of adapters would change that of the model")
    counters[stream] = before
    return key


def _refuse(what: str, so: str) -> NoReturn:
    raise RuntimeError(
        f"Flax {flax.__version__} has no {what} as lora_jax knows it, so that {so}. Use a version "
        f"of Flax that this version of lora_jax is tested with."
    )


# --- layers of packages, which are not imported ---

# Why: a layer is known by its function, and theirs by its name, so that they need not be there.
# Gone: the layer is unknown, and its adapter an error that names its class.
GPT2_CONV1D = "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D.__call__"
GEMMA_EINSUM = "gemma.gm.nn._layers.Einsum.__call__"
GEMMA_ENCODE = "gemma.gm.nn._modules.Embedder.encode"
GEMMA_DECODE = "gemma.gm.nn._modules.Embedder.decode"
TUNIX_EINSUM = tuple(
    f"tunix.models.{model}.model.Einsum.__call__"
    for model in ("gemma", "gemma3", "llama3", "qwen2", "qwen3")
)


# --- NNX ---


def nnx_class_options(cls: type[Any]) -> dict[str, Any]:
    """What a subclass must say to be of the same kind: whether its objects are pytrees.

    Why: Flax asks for it anew in each subclass, and says of a class in a private attribute only.
    Gone: a subclass is what Flax makes by default, and a class that says otherwise is an error of
    Flax.
    """
    return {} if getattr(cls, "_pytree__is_pytree", True) else {"pytree": False}
