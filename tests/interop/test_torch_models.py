"""Models of Hugging Face and Google as their authors ship them: one rule adapts every matrix.

Small ones with random weights are run; known checkpoints are evaluated abstractly at full size.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import re
import sys
import types
import warnings
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from helpers import random_like, relative_error

import lora_jax
from lora_jax import LoraConfig, Rule

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

KEY = jax.random.key(0)
# Every parameter of two axes and more, by the last part of its path, that is no weight matrix.
NO_KERNELS = "cls_token|mask_token|position_embeddings|final_logits_bias|weight_[vg]|.*_table"
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
VISION = {name: SMALL[name] for name in list(SMALL)[1:5]} | {"image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
}
TOKENS = jnp.arange(14).reshape(2, 7) + 3
IMAGE = jax.random.normal(KEY, (2, 3, 32, 32))


@dataclasses.dataclass
class Model:
    """A model, small; its name at full size with its number of parameters, if it has one."""

    cls: str
    config: str
    small: dict[str, Any]
    args: tuple[Any, ...] = (TOKENS,)
    full: dict[str, Any] | None = None
    parameters: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stopped: str = ""  # the path of what the model keeps from its gradient itself


MODELS = {
    "BERT": Model("FlaxBertModel", "BertConfig", SMALL, full={}, parameters=109_482_240),
    "BERT, tied": Model("FlaxBertForMaskedLM", "BertConfig", SMALL),
    "RoBERTa": Model(
        "FlaxRobertaForSequenceClassification",
        "RobertaConfig",
        SMALL,
        full={"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        parameters=124_647_170,
    ),
    "GPT-2, tied": Model(
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        full={},
        parameters=124_439_808,
    ),
    "GPT-2": Model(
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
        | {"tie_word_embeddings": False},
    ),
    "Llama": Model("FlaxLlamaForCausalLM", "LlamaConfig", SMALL, full={}, parameters=6_738_415_616),
    "Mistral": Model(
        "FlaxMistralForCausalLM",
        "MistralConfig",
        {**SMALL, "num_key_value_heads": 2},
    ),
    "ViT": Model(
        "FlaxViTForImageClassification",
        "ViTConfig",
        VISION,
        (IMAGE,),
        full={"num_labels": 1000},
        parameters=86_567_656,
    ),
    "CLIP": Model(
        "FlaxCLIPModel",
        "CLIPConfig",
        {"text_config": SMALL, "vision_config": VISION, "projection_dim": 16},
        (TOKENS, IMAGE),
        full={},
        parameters=151_277_313,
    ),
    "ResNet": Model(
        "FlaxResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
        (IMAGE,),
        full={"num_labels": 1000},
        parameters=25_557_032,
    ),
    "ALBERT": Model(
        "FlaxAlbertForSequenceClassification", "AlbertConfig", {**SMALL, "embedding_size": 16}
    ),
    "OPT, tied": Model(
        "FlaxOPTForCausalLM",
        "OPTConfig",
        {name: SMALL[name] for name in SMALL if name != "intermediate_size"}
        | {"ffn_dim": 37, "word_embed_proj_dim": 32, "pad_token_id": 1},
    ),
    "BART, tied": Model(
        "FlaxBartForConditionalGeneration",
        "BartConfig",
        {**SEQ2SEQ, "max_position_embeddings": 64},
    ),
    "Whisper, tied": Model(
        "FlaxWhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, "max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        (jax.random.normal(KEY, (2, 8, 40)), TOKENS),
        stopped="['model']['encoder']['embed_positions']",
    ),
    "wav2vec 2": Model(
        "FlaxWav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**{n: SMALL[n] for n in list(SMALL)[1:5]}, "vocab_size": 32, "conv_dim": (16, 16)}
        | {"conv_stride": (4, 4), "conv_kernel": (8, 8), "num_conv_pos_embeddings": 16}
        | {"num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True}
        | {"feat_extract_norm": "layer"},
        (jax.random.normal(KEY, (2, 2000)),),
        options={"input_shape": (1, 2000)},
    ),
}


def variables_of(params):
    """A model with batch statistics has a collection inside what it calls its params."""
    return params if "batch_stats" in params else {"params": params}


def matrices(params):
    return {
        path: leaf
        for path, leaf in flatten_dict(params, sep="/").items()
        if leaf.ndim > 1 and not re.fullmatch(NO_KERNELS, path.rsplit("/", 1)[-1])
    }


def one_rule(axes, **kwargs):
    return LoraConfig([Rule("|".join(axes), tied="materialize", **kwargs)])


def build(name, **options):
    model = MODELS[name]
    config = getattr(transformers, model.config)(**options.pop("config", model.small))
    return getattr(transformers, model.cls)(config, seed=0, **model.options, **options)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_model(name, variant):
    args = MODELS[name].args
    model = build(name)
    variables = random_like(variables_of(model.params), scale=0.02)
    variables = {n: jax.tree.map(jnp.asarray, tree) for n, tree in variables.items()}
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    rest = {n: tree for n, tree in variables.items() if n != "params"}

    axes = lora_jax.kernel_axes(model, variables, *args)
    assert set(axes) == set(matrices(variables["params"]))
    assert bool(axes.tied) == ("tied" in name)
    config = one_rule(axes, rank=2, variant=variant)
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapted = {row.path: row for row in lora_jax.summary(frozen, adapters).rows}
    assert set(adapted) == set(axes)
    assert {path for path, row in adapted.items() if row.materialized} == axes.tied

    def apply(adapters):
        out = lora_jax.lora_apply(model, {"params": frozen, **rest}, adapters, *args)
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def plain(params):
        params = params if not rest else {"params": params, **rest}
        out = model(*args, params=params)
        return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    close = check_close(1e-5)
    close(jax.jit(apply)(adapters), jax.jit(plain)(variables["params"]))
    trained = random_like(adapters, scale=0.05)
    merged = lora_jax.lora_merge(frozen, trained)
    check_close(1e-4)(jax.jit(apply)(trained), jax.jit(plain)(merged))
    check_learns(apply, adapters, MODELS[name].stopped)

    # The same by `model.module.apply`, with the arguments that the model's own call gives it.
    module_args, module_kwargs = arguments_of_module(model, *args)
    by_module = lora_jax.kernel_axes(model.module, variables, *module_args, **module_kwargs)
    assert dict(by_module) == dict(axes)
    assert by_module.tied == axes.tied
    out = lora_jax.lora_apply(
        model.module, {"params": frozen, **rest}, trained, *module_args, **module_kwargs
    )
    close([x for x in jax.tree.leaves(out) if x.dtype == jnp.float32], apply(trained))


def arguments_of_module(model, *args):
    """What `model(*args)` passes to `model.module.apply` besides the variables."""
    recorded, own_apply = [], nn.Module.apply

    def apply(self, variables, *args, **kwargs):
        if self is model.module:
            recorded.append((args, kwargs))
        return own_apply(self, variables, *args, **kwargs)

    with mock.patch.object(nn.Module, "apply", apply):
        model(*args)
    (call,) = recorded
    return call


def check_close(tolerance):
    def close(got, expected):
        for a, b in zip(got, expected, strict=True):
            assert relative_error(a, b) < tolerance

    return close


def check_learns(apply, adapters, stopped=None):
    """At the start all but the partner of the zero factor has a gradient, after a step all has."""

    @jax.jit
    @jax.grad
    def gradient(adapters):
        outs = apply(adapters)
        weights = [
            random_like(np.zeros(out.shape, np.float32), seed=i) for i, out in enumerate(outs)
        ]
        return sum(jnp.vdot(w, out) for w, out in zip(weights, outs, strict=True))

    grads = gradient(adapters)
    start = grads
    tx = optax.sign_sgd(1e-3)
    updates, _ = tx.update(grads, tx.init(adapters))
    grads = gradient(optax.apply_updates(adapters, updates))
    for (path, first), later in zip(
        jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(grads), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if stopped and name.startswith(stopped):
            assert not later.any()
            continue
        assert jnp.abs(later).max() > 0, name
        assert (jnp.abs(first).max() > 0) == (not name.endswith(".V")), name


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].full is not None])
def test_known_checkpoint_at_full_size(name):
    model = build(name, config=MODELS[name].full, _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(KEY, model.input_shape))
    variables = variables_of(shapes)
    params = variables["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == MODELS[name].parameters
    args = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in {
            "FlaxCLIPModel": [((1, 77), "int32"), ((1, 3, 224, 224), "float32")],
            "FlaxViTForImageClassification": [((1, 3, 224, 224), "float32")],
            "FlaxResNetForImageClassification": [((1, 3, 224, 224), "float32")],
        }.get(MODELS[name].cls, [((1, 128), "int32")])
    ]
    axes = lora_jax.kernel_axes(model, variables, *args)
    kernels = matrices(params)
    assert set(axes) == set(kernels)
    config = one_rule(axes, rank=1, variant="dora")
    split = jax.eval_shape(lambda p: lora_jax.lora_init(KEY, p, config, axes=axes), params)
    report = lora_jax.summary(*split, config=config, axes=axes)
    assert not report.frozen_kernels.keys() & kernels.keys()
    expected = 0
    for path, leaf in kernels.items():
        k = 1
        for axis in axes[path].outputs:
            k *= leaf.shape[axis]
        expected += leaf.size // k + 2 * k
    assert report.trained == expected


def test_module_apply_and_model_call_are_the_same():
    model = build("BERT")
    variables = {"params": model.params}
    inputs = {"attention_mask": jnp.ones_like(TOKENS), "position_ids": jnp.arange(7)[None]}
    inputs |= {"token_type_ids": jnp.zeros_like(TOKENS), "head_mask": None}
    by_module = lora_jax.kernel_axes(model.module, variables, TOKENS, **inputs)
    by_call = lora_jax.kernel_axes(model, variables, TOKENS)
    assert dict(by_module) == dict(by_call)
    config = LoraConfig([Rule(".*(query|value)/kernel", 4, dropout=0.5)])
    frozen, adapters = lora_jax.lora_init(KEY, model.params, config, axes=by_call)
    variables, adapters = {"params": frozen}, random_like(adapters)
    module = lora_jax.lora_apply(model.module, variables, adapters, TOKENS, **inputs)
    call = lora_jax.lora_apply(model, variables, adapters, TOKENS)
    assert relative_error(module.last_hidden_state, call.last_hidden_state) < 1e-6

    # Adapter dropout is on where the model's own is, however the model is told.
    key = jax.random.key(7)

    def differs(model, **kwargs):
        y = lora_jax.lora_apply(model, variables, adapters, TOKENS, **kwargs).last_hidden_state
        return relative_error(y, call.last_hidden_state) > 1e-3

    assert differs(model, dropout_rng=key, train=True)
    assert not differs(model, dropout_rng=key)
    assert not differs(model, train=False)
    assert differs(model.module, rngs={"dropout": key}, deterministic=False, **inputs)
    assert not differs(model.module, rngs={"dropout": key}, **inputs)


def test_generation():
    """A method of the model's own: the adapted model generates what the merged one does."""
    model = build("GPT-2")
    axes = lora_jax.kernel_axes(model, {"params": model.params}, TOKENS)
    config = LoraConfig([Rule(".*kernel", 4)])
    frozen, adapters = lora_jax.lora_init(KEY, model.params, config, axes=axes)
    adapters = random_like(adapters)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    got = lora_jax.lora_apply(
        model, {"params": frozen}, adapters, TOKENS, method="generate", **options
    )
    merged = model.generate(TOKENS, params=lora_jax.lora_merge(frozen, adapters), **options)
    assert jnp.array_equal(got.sequences, merged.sequences)
    base = model.generate(TOKENS, **options)
    assert not jnp.array_equal(got.sequences, base.sequences)


# --- gemma ---


class _Stub(types.ModuleType):
    """A module of which gemma only needs names."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock() if self.__name__ == "gemma.gm.ckpts" else type(name, (), {})
        setattr(self, name, value)
        return value


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """TensorFlow, for type annotations; and the checkpoints, which want another kauldron."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow" or name == "gemma.gm.ckpts":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def gemma():
    pytest.importorskip("gemma")
    finder = _Stubs()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from gemma.gm.nn import _gemma, _modules
        yield types.SimpleNamespace(models=_gemma, modules=_modules)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorflow"]:
            del sys.modules[name]


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gemma(gemma, variant):
    full = gemma.models.Gemma3_270M()
    config = dataclasses.replace(
        full.config,
        num_embed=99,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        attention_types=full.config.attention_types[:3],
    )
    model = type(full)(config=config, dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, KEY, TOKENS)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    variables = random_like(zeros, scale=0.2)
    axes = lora_jax.kernel_axes(model, variables, TOKENS)
    assert set(axes) == set(matrices(variables["params"]))
    assert not axes.tied
    frozen, adapters = lora_jax.lora_init(
        KEY, variables["params"], one_rule(axes, rank=2, variant=variant), axes=axes
    )
    assert {row.path for row in lora_jax.summary(frozen, adapters).rows} == set(axes)

    def apply(adapters):
        return [lora_jax.lora_apply(model, {"params": frozen}, adapters, TOKENS).logits]

    def plain(params):
        return [model.apply({"params": params}, TOKENS).logits]

    check_close(1e-5)(jax.jit(apply)(adapters), jax.jit(plain)(variables["params"]))
    trained = random_like(adapters, scale=0.05)
    merged = lora_jax.lora_merge(frozen, trained)
    check_close(1e-4)(jax.jit(apply)(trained), jax.jit(plain)(merged))
    check_learns(apply, adapters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Gemma3_270M", 268_098_176), ("Gemma3_1B", 999_885_952), ("Gemma2_2B", 2_614_636_800)],
)
def test_gemma_at_full_size(gemma, name, parameters):
    model = getattr(gemma.models, name)()
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    variables = jax.eval_shape(model.init, KEY, tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    axes = lora_jax.kernel_axes(model, variables, tokens)
    assert set(axes) == set(matrices(variables["params"]))
    split = jax.eval_shape(
        lambda p: lora_jax.lora_init(KEY, p, one_rule(axes, rank=1), axes=axes), variables["params"]
    )
    assert not lora_jax.summary(*split, axes=axes).frozen_kernels


def test_gemma_keys_and_values_apart(gemma):
    """Its kv_einsum holds keys and values in one kernel: only the values are adapted here."""
    model = gemma.modules._layers.Einsum((2, 2, 8, 4))
    x = jax.random.normal(KEY, (1, 5, 8))
    equation = "BSD,CKDH->CBSKH"
    variables = model.init(KEY, equation, x)
    axes = lora_jax.kernel_axes(model, variables, equation, x)
    config = LoraConfig([Rule("w", 2, fused=2, parts=(1,))])
    frozen, adapters = lora_jax.lora_init(KEY, variables["params"], config, axes=axes)
    adapters = random_like(adapters)
    y = lora_jax.lora_apply(model, {"params": frozen}, adapters, equation, x)
    before = model.apply(variables, equation, x)
    assert jnp.array_equal(y[0], before[0])
    assert relative_error(y[1], before[1]) > 1e-2


def test_linen_module_is_what_these_models_are(gemma):
    assert issubclass(gemma.modules.Block, nn.Module)
    assert isinstance(build("BERT").module, nn.Module)
