"""The encoder of the examples is all-MiniLM-L6-v2, as transformers reads the same weights."""

import numpy as np
import pytest
from helpers import relative_error

from examples import minilm

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SENTENCES = [
    "Effective but too tepid biopic",
    "If you sometimes like to go to the movies to have fun, Wasabi is a good place to start.",
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
    """States within 1e-5 of the largest, embeddings (of length 1) within 1e-6, of PyTorch's."""
    config, params = minilm.load_pretrained()
    encoder = minilm.Encoder(config)
    ids, mask = minilm.tokenize(SENTENCES, 48)
    model = transformers.BertModel.from_pretrained(minilm.folder()).eval()
    with torch.no_grad():
        states = model(torch.tensor(ids), torch.tensor(mask)).last_hidden_state
    ours = encoder.apply({"params": params}, ids, mask)
    real = mask[..., None] == 1
    assert relative_error(np.asarray(ours) * real, states.numpy() * real) < 1e-5
    weights = torch.tensor(mask)[..., None]
    expected = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1))
    got = minilm.embed(encoder, params, ids, mask)
    assert np.abs(np.asarray(got) - expected.numpy()).max() < 1e-6
