"""tunix's trainer trains the adapters of `lora_model` as it is: it looks for `nnx.LoRAParam`."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages that it needs
    sft = pytest.importorskip("tunix.sft.peft_trainer")
    from orbax.checkpoint import CheckpointManagerOptions
    from tunix.sft import utils

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

VOCABULARY, WIDTH, HEADS = 32, 32, 4
TOKENS = jnp.ones((2, 8), int)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.silu(self.up(self.norms[1](x))))


class Decoder(nnx.Module):
    """Called as tunix calls its models."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, positions, cache, attention_mask):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, attention_mask[:, None])
        return self.head(x), cache


def inputs(batch):
    """What tunix's own loss gives to the model."""
    mask = batch.input_mask
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def data(count):
    """Tokens that go up by three."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = (rng.integers(0, VOCABULARY, (8, 1)) + 3 * np.arange(16)) % VOCABULARY
        yield sft.TrainingInput(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def split(variant):
    model = Decoder(nnx.Rngs(0))
    mask = utils.make_causal_attn_mask(jnp.ones_like(TOKENS, bool))
    config = lora_jax.LoraConfig(
        [lora_jax.Rule("all-linear", rank=4, alpha=8.0, variant=variant)], trainable=["head/.*"]
    )
    example = TOKENS, jnp.zeros_like(TOKENS), None, mask
    frozen, adapters = lora_jax.lora_init_model(
        jax.random.key(1), model, nnx.state(model), config, *example
    )
    return model, frozen, adapters, example


def trainer(model, folder, steps):
    config = sft.TrainingConfig(
        eval_every_n_steps=1000,
        max_steps=steps,
        checkpoint_root_directory=str(folder),
        checkpointing_options=CheckpointManagerOptions(save_interval_steps=5),
    )
    return sft.PeftTrainer(model, optax.adam(1e-2), config).with_gen_model_input_fn(inputs)


def loss(model):
    """Of one batch."""
    given = inputs(next(data(1)))
    tokens = given.pop("input_tokens")
    logits, _ = model(tokens, given["positions"], None, given["attention_mask"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return float(losses.mean())


def arrays(model, wrt):
    state = nnx.to_flat_state(nnx.state(model, wrt))
    return {path: np.asarray(variable[...]) for path, variable in state}


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_trainer(variant, tmp_path):
    model, frozen, adapters, example = split(variant)
    adapted = lora_jax.lora_model(model, frozen, adapters)
    others, ours = nnx.Not(lora_jax.AdapterParam), lora_jax.AdapterParam
    base, start, before = arrays(adapted, others), arrays(adapted, ours), loss(adapted)

    first = trainer(adapted, tmp_path, steps=20)
    first.train(data(20))
    first.close()
    assert loss(adapted) < 0.5 * before
    for path, array in arrays(adapted, others).items():
        np.testing.assert_array_equal(array, base[path], err_msg=str(path))
    end = arrays(adapted, ours)
    assert len(end) == len(jax.tree.leaves(adapters))
    assert all((end[path] != array).any() for path, array in start.items())

    again = lora_jax.lora_model(model, frozen, adapters)
    second = trainer(again, tmp_path, steps=25)
    assert second.train_steps == 20
    for path, array in arrays(again, ours).items():
        np.testing.assert_array_equal(array, end[path], err_msg=str(path))
    second.train(data(25))
    second.close()
    assert second.train_steps == 25

    trained = lora_jax.lora_state(again)
    merged = nnx.merge(nnx.graphdef(model), lora_jax.lora_merge(frozen, trained))
    expected = again(*example)[0]
    np.testing.assert_allclose(merged(*example)[0], expected, atol=1e-4)
    y, _ = lora_jax.lora_apply(model, frozen, trained, *example)
    np.testing.assert_allclose(y, expected, atol=1e-4)
