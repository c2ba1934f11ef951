"""Models built like those that people use, with only a config, on a mesh, and in PEFT's files."""

import collections
from functools import partial

import chex
import jax
import jax.numpy as jnp
import nnx_models as models
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import random_like, relative_error
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from nnx_zoo import random_state
from safetensors.numpy import load_file

import lora_jax
from lora_jax import AdapterParam, KernelAxes, LoraConfig, Rule

KEY = jax.random.key(0)
TOKENS = jnp.arange(16).reshape(4, 4)
IMAGES = jax.random.normal(KEY, (4, 8, 8, 3))
IS_IMAGE = jnp.array([[0, 1, 1, 0]] * 4).astype(bool)


class WithCache(nnx.Module):
    """Gives the model that has its cache as an argument an empty one."""

    def __init__(self, rngs, sharded=False):
        self.model = models.Qwen3(rngs, sharded)
        self.spec = P("data", None, "model", None) if sharded else None

    def __call__(self, tokens):
        return self.model(tokens, cache=models.caches(*tokens.shape, self.spec))


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR = {  # a model, its arguments, and how many layers "all-linear" adapts of each name
    "Qwen3": (WithCache, (TOKENS,), dict.fromkeys(PROJECTIONS, 1)),
    "Vit": (
        models.Vit,
        (IMAGES,),
        dict.fromkeys(("query", "key", "value", "out", "linear1", "linear2"), 1),
    ),
    "Gemma3": (
        models.Gemma3,
        (TOKENS, IMAGES, IS_IMAGE),
        {**dict.fromkeys(PROJECTIONS, 2), "q_proj": 3, "k_proj": 3, "v_proj": 3}
        | dict.fromkeys(("out_proj", "fc1", "fc2"), 1),
    ),
    "Scanned": (models.Scanned, (TOKENS,), dict.fromkeys(("query", "out", "up", "down"), 1)),
}
CONFIG = LoraConfig([Rule("all-linear", rank=2, variant="dora")])


def adapted(graphdef, state, *args, config=CONFIG, **kwargs):
    """Frozen parameters, and adapters as they start."""
    axes = lora_jax.kernel_axes(graphdef, state, *args, **kwargs)
    return jax.jit(lambda state: lora_jax.lora_init(KEY, state, config, axes=axes))(state)


@pytest.mark.parametrize("name", LINEAR)
def test_with_only_a_config(name):
    make, args, expected = LINEAR[name]
    graphdef, state = random_state(make)
    frozen, adapters = adapted(graphdef, state, *args)
    assert collections.Counter(path[-2] for path in flatten_dict(adapters)) == expected

    def plain(state):
        return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))(*args)

    def loss(adapters):
        y = lora_jax.lora_apply(graphdef, frozen, adapters, *args)
        return jnp.mean(y**2), y

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    unadapted = jax.jit(plain)(state)
    assert relative_error(gradient(adapters)[1], unadapted) < 5e-6
    trained = random_like(adapters)
    grads, y = gradient(trained)
    base = jax.jit(lambda adapters: plain(lora_jax.lora_merge(frozen, adapters)))
    assert relative_error(y, base(trained)) < 1e-5
    assert relative_error(y, unadapted) > 1e-2
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.abs(leaf).max() > 0, path

    @nnx.jit
    def gradient_of_model(model):
        def loss(model):
            y = model(*args)
            return jnp.mean(y**2), y

        wrt = nnx.DiffState(0, AdapterParam)
        by_variable, y = nnx.grad(loss, argnums=wrt, has_aux=True)(model)
        nnx.update(model, by_variable)
        return y

    model = lora_jax.lora_model(graphdef, frozen, trained)
    assert relative_error(gradient_of_model(model), y) < 1e-5
    in_places = jax.tree.leaves(lora_jax.lora_state(model))
    for got, leaf in zip(in_places, jax.tree.leaves(grads), strict=True):
        assert relative_error(got, leaf) < 1e-4


@pytest.mark.parametrize("form", ["lora_apply", "lora_model"])
def test_decoding_with_a_cache_of_the_caller(form):
    """It is written into as the model does it, and the adapters stay what they are."""
    graphdef, state = random_state(models.Qwen3)
    cache = models.caches(4, 8)
    frozen, adapters = adapted(graphdef, state, TOKENS, cache=cache)
    assert float(cache[0].now[...]) == 0  # looking at the model is not a call of it
    adapters = random_like(adapters)
    merged = nnx.merge(graphdef, jax.jit(lora_jax.lora_merge)(frozen, adapters))
    model = lora_jax.lora_model(graphdef, frozen, adapters)

    @nnx.jit
    def step(cache, tokens):
        if form == "lora_model":
            return model(tokens, cache=cache)
        return lora_jax.lora_apply(graphdef, frozen, adapters, tokens, cache=cache)

    plain_step = nnx.jit(lambda cache, tokens: merged(tokens, cache=cache))
    ours, theirs = (models.caches(4, 8) for _ in range(2))
    for tokens in (TOKENS, *np.split(TOKENS[:, :2], 2, axis=1)):
        assert relative_error(step(ours, tokens), plain_step(theirs, tokens)) < 1e-5
    assert int(ours[0].now[...]) == 6
    assert relative_error(ours[0].k[...], theirs[0].k[...]) < 1e-5


# --- on several devices ---


def mesh_of(kind):
    if not hasattr(jax, "set_mesh"):
        pytest.skip("in this jax explicit axes are not complete")
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4])


SHARDED = {
    "partition names": (models.Scanned, AxisType.Auto),
    "explicit axes": (WithCache, AxisType.Explicit),
}


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="explicit axes are not complete here")
@pytest.mark.parametrize("variant", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_computes_as_on_one_device(name, variant):
    """Its kernels are where it has put them, and its adapters are on all devices."""
    make, kind = SHARDED[name]
    made = nnx.jit(lambda sharded=False: make(nnx.Rngs(0), sharded), static_argnums=0)
    config = LoraConfig([Rule("all-linear", rank=2, variant=variant)])

    def loss(adapters, graphdef, frozen, tokens):
        y = lora_jax.lora_apply(graphdef, frozen, adapters, tokens)
        return jnp.sum(jnp.sin(y)), y

    def called(model, tokens):
        graphdef, state = nnx.split(model)
        frozen, adapters = adapted(graphdef, state, tokens, config=config)
        step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
        return step(random_like(adapters), graphdef, frozen, tokens)

    expected = called(made(), TOKENS)
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = made(True)
        split = [x for x in jax.tree.leaves(nnx.state(sharded)) if len(x.sharding.device_set) > 1]
        assert sum(not x.sharding.is_fully_replicated for x in split) >= 4
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
        got = called(sharded, tokens)
    for a, b in zip(*(jax.tree.leaves(both) for both in (got, expected)), strict=True):
        assert relative_error(a, b) < 1e-4


# --- PEFT's files ---


def hugging_face_name(path, module):
    """That of the same layer in Qwen3 of transformers."""
    _, layer, part, name, _ = path
    part = {"attn": "self_attn"}.get(part, part)
    return f"base_model.model.model.layers.{layer}.{part}.{name}.{module}.weight"


@pytest.mark.parametrize(("names", "kernel"), [("bonsai", "kernel"), ("tunix", "w")])
def test_files_of_peft_for_the_same_model_of_hugging_face(names, kernel, tmp_path):
    """tunix's Qwen3 is built alike: in its attention a kernel is ``w``."""
    flat = flatten_dict(nnx.to_pure_dict(random_state(partial(models.Qwen3, layers=2))[1]))
    renamed = {
        (*p[:-1], kernel) if "attn" in p and p[-1] == "kernel" else p: a for p, a in flat.items()
    }
    params = unflatten_dict(renamed)
    joined, split = KernelAxes((0, 1), (2,)), KernelAxes((0,), (1, 2))
    axes = {
        "/".join(map(str, p)): joined if p[-2] == "o_proj" else split
        for p in renamed
        if "attn" in p and p[-1] == kernel
    }
    config = LoraConfig([Rule(r"layers/.*_proj/\w+", rank=2, alpha=3.0)])
    frozen, adapters = lora_jax.lora_init(KEY, params, config, axes=axes)
    adapters = random_like(adapters)
    lora_jax.peft.save(tmp_path, frozen, adapters, names=names, axes=axes)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged = flatten_dict(lora_jax.lora_merge(frozen, adapters))
    for path in flatten_dict(adapters):
        A, B = (tensors.pop(hugging_face_name(path, m)) for m in ("lora_A", "lora_B"))
        delta = np.asarray(merged[path] - renamed[path])
        inputs = 2 if path[-2] == "o_proj" else 1
        d = int(np.prod(delta.shape[:inputs]))
        assert relative_error(1.5 * B @ A, delta.reshape(d, -1).T) < 1e-5, path
    assert not tensors
    _, back = lora_jax.peft.load(tmp_path, params, names=names, axes=axes)
    chex.assert_trees_all_close(back, adapters, rtol=1e-6)
