"""The encoder of the examples is all-MiniLM-L6-v2, as transformers reads the same weights."""

import numpy as np
import pytest
from helpers import relative_error

from examples import minilm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

SENTENCES = [
    "Effective but too tepid biopic",
    "If you sometimes like to go to the movies to have fun, Wasabi is a good place to start.",
    "Touché!",
    "...a pretentious mess...",
    "A charmer from Belgium.",
    "One of the worst movies of the year. ... Watching it was painful.",
    "Absorbing character study by André Turpin.",
    "(Leigh) has a true talent for conveying the way tiny acts of kindness make life survivable.",
    "It has a way of seeping into your consciousness, with lingering questions about what it is.",
    "A word.",
    "",
    "An issue movie that's so honest and keenly observed that it doesn't feel like one. " * 4,
]


@pytest.mark.parametrize("length", [16, 64])
def test_tokens(length):
    tokenizer = transformers.BertTokenizerFast(str(minilm.folder() / "vocab.txt"))
    expected = tokenizer(SENTENCES, max_length=length, truncation=True, padding="max_length")
    ids, mask = minilm.tokenize(SENTENCES, length)
    assert np.array_equal(ids, expected["input_ids"])
    assert np.array_equal(mask, expected["attention_mask"])


def test_states_and_embeddings():
    """Every layer's states within 1e-5, embeddings (of length 1) within 1e-6, of PyTorch's."""
    config, params = minilm.load_pretrained()
    encoder = minilm.Encoder(config)
    ids, mask = minilm.tokenize(SENTENCES, 48)
    model = transformers.BertModel.from_pretrained(minilm.folder()).eval()
    with torch.no_grad():
        out = model(torch.tensor(ids), torch.tensor(mask), output_hidden_states=True)
    ours, kept = encoder.apply(
        {"params": params},
        ids,
        mask,
        capture_intermediates=lambda module, _: isinstance(module, minilm.Layer),
        mutable="intermediates",
    )
    layers = [kept["intermediates"][f"layer_{i}"]["__call__"][0] for i in range(config.layers)]
    assert np.array_equal(layers[-1], ours)
    real = mask[..., None] == 1
    for states, expected in zip(layers, out.hidden_states[1:], strict=True):
        assert relative_error(np.asarray(states) * real, expected.numpy() * real) < 1e-5
    weights = torch.tensor(mask)[..., None]
    pooled = (out.last_hidden_state * weights).sum(1) / weights.sum(1)
    expected = torch.nn.functional.normalize(pooled)
    got = minilm.embed(encoder, params, ids, mask)
    assert np.abs(np.asarray(got) - expected.numpy()).max() < 1e-6
