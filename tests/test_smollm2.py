"""The language model of the examples, its tokenizer and its texts, without what is downloaded."""

import dataclasses
import io
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from examples import assets, chat, generate, smollm2, styles, styles_finetune

TINY = smollm2.Config(
    vocabulary=50, layers=1, width=24, heads=6, kv_heads=2, hidden=20, positions=16
)
MODEL = smollm2.SmolLM2(TINY)
TOKENS = jax.random.randint(jax.random.key(1), (3, 12), 0, 50)
ROWS = jnp.arange(3)


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


@jax.jit
def plain(params, tokens):
    """Logits without a cache."""
    return MODEL.apply({"params": params}, tokens)


@pytest.fixture(scope="module")
def expected(params):
    return plain(params, TOKENS)


@jax.jit
def apply(params, cache, tokens, lengths):
    variables = {"params": params, "cache": cache}
    logits, changed = MODEL.apply(variables, tokens, lengths, cached=True, mutable="cache")
    return logits, changed["cache"]


def read(params, cache, rows, starts, lengths):
    """Rows of TOKENS go on from their starts; what is after their lengths is other tokens."""
    size = 1 if max(lengths) == 1 else 6
    tokens = np.full((len(rows), size), 49, np.int32)
    for to, row, start, length in zip(tokens, rows, starts, lengths, strict=True):
        to[:length] = TOKENS[row, start : start + length]
    return apply(params, cache, tokens, jnp.array(lengths))


def test_cache_gives_what_is_computed_without_it(params, expected):
    """Rows of different lengths, then tokens one at a time, each row at its own place."""
    seen = np.array([3, 6, 1])
    logits, cache = read(params, smollm2.empty_cache(MODEL, 3), ROWS, [0, 0, 0], seen)
    assert jnp.allclose(logits, expected[ROWS, seen - 1], atol=1e-5)
    for _ in range(6):
        logits, cache = read(params, cache, ROWS, seen, [1, 1, 1])
        assert jnp.allclose(logits, expected[ROWS, seen], atol=1e-5)
        seen += 1
    assert cache["index"].tolist() == [9, 12, 7]


def test_a_row_that_waits_stays_as_it_is(params, expected):
    _, cache = read(params, smollm2.empty_cache(MODEL, 3), ROWS, [0, 0, 0], [4, 4, 4])
    for i in (4, 5):
        _, cache = read(params, cache, ROWS, [i, 4, i], [1, 0, 1])
    assert cache["index"].tolist() == [6, 4, 6]
    logits, cache = read(params, cache, ROWS, [6, 4, 6], [1, 3, 2])
    assert jnp.allclose(logits, expected[ROWS, jnp.array([6, 6, 7])], atol=1e-5)


def test_a_row_can_be_given_to_another_text(params, expected):
    _, cache = read(params, smollm2.empty_cache(MODEL, 3), [0, 1, 2], [0, 0, 0], [6, 5, 4])
    cache = smollm2.reset_rows(cache, jnp.array([0]))
    logits, cache = read(params, cache, [2, 1, 2], [0, 5, 4], [4, 0, 0])
    assert jnp.allclose(logits[0], expected[2, 3], atol=1e-5)
    _, alone = read(params, smollm2.empty_cache(MODEL, 1), [0], [0], [6])
    cache = smollm2.put_row(cache, 1, alone)
    logits, cache = read(params, cache, [2, 0, 2], [4, 6, 4], [1, 1, 1])
    assert jnp.allclose(logits, expected[jnp.array([2, 0, 2]), jnp.array([4, 6, 4])], atol=1e-5)
    assert cache["index"].tolist() == [5, 7, 5]


def test_a_full_row_leaves_its_neighbours_and_itself_alone(params, expected):
    cache = smollm2.empty_cache(MODEL, 3)
    for length in (6, 6, 4):
        _, cache = read(params, cache, ROWS, [0, 0, 0], [length, 0, 0])
    before = jax.tree.map(lambda x: x[0], cache["layer_0"])
    logits, cache = read(params, cache, ROWS, [0, 0, 0], [6, 6, 6])
    assert jnp.allclose(logits[1:], expected[1:, 5], atol=1e-5)
    after = jax.tree.map(lambda x: x[0], cache["layer_0"])
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_adapters_go_through_the_cache(params):
    """What a merged model generates is what the adapted one generates."""
    rule = lora_jax.Rule(styles_finetune.KERNELS, rank=2, variant="dora")
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    assert list(lora_jax.summary(frozen, adapters).frozen_kernels) == ["embed/embedding"]
    keys = iter(jax.random.split(jax.random.key(2), 99))
    adapters = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapters)
    prompts = [[1, 2, 3], [4] * 6]
    through_cache = styles_finetune.cached_apply(MODEL)
    answers = generate.greedy(MODEL, through_cache, (frozen, adapters), prompts, end=-1, most=6)
    merged = lora_jax.lora_merge(frozen, adapters)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 6
        tokens = np.array([*prompt, *answer, *[0] * (12 - len(prompt) - 6)])
        likeliest = plain(merged, jnp.broadcast_to(tokens, (3, 12)))[0].argmax(-1)
        assert answer == likeliest[len(prompt) - 1 :][:6].tolist()


def test_what_does_not_fit_in_the_cache_is_an_error(params):
    with pytest.raises(ValueError, match=r"prompt of 9 .* answer of 8 need 17 .* has 16"):
        generate.greedy(MODEL, None, params, [[1] * 9, [1]], end=0, most=8)


def test_rotation_of_pairs_side_by_side():
    """What GGUF files have, as complex numbers: the other way to write the rotary embedding."""
    heads, head_dim, width, theta = 2, 8, 6, 100.0
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(heads * head_dim, width)).astype(np.float32)
    x = rng.normal(size=(5, width)).astype(np.float32)
    pairs = (x @ weight.T).reshape(5, heads, head_dim // 2, 2)
    angles = np.arange(5)[:, None] * theta ** -(np.arange(4) / 4)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    y = (x @ smollm2.halves_from_pairs(weight, heads).T).reshape(1, 5, heads, head_dim)
    y = smollm2.rotate(jnp.asarray(y).swapaxes(1, 2), jnp.arange(5)[None], theta)[0]
    expected = np.concatenate([turned.real, turned.imag], -1).swapaxes(0, 1)
    assert np.allclose(y, expected, atol=1e-5)


def gguf_tensors(config):
    """Ones, by the names and the shapes of a GGUF file."""
    kv = config.kv_heads * config.head_dim
    shapes = {"token_embd": (config.vocabulary, config.width), "output_norm": (config.width,)}
    for i in range(config.layers):
        shapes |= {
            f"blk.{i}.attn_norm": (config.width,),
            f"blk.{i}.ffn_norm": (config.width,),
            f"blk.{i}.attn_q": (config.width, config.width),
            f"blk.{i}.attn_k": (kv, config.width),
            f"blk.{i}.attn_v": (kv, config.width),
            f"blk.{i}.attn_output": (config.width, config.width),
            f"blk.{i}.ffn_gate": (config.hidden, config.width),
            f"blk.{i}.ffn_up": (config.hidden, config.width),
            f"blk.{i}.ffn_down": (config.width, config.hidden),
        }
    return {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_tensors_of_a_file_are_the_parameters(params):
    tensors = gguf_tensors(TINY)
    loaded = smollm2.from_gguf(tensors, TINY)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, params)
    with pytest.raises(smollm2.MissingAsset, match=r"without a place here: \['output.weight'\]"):
        smollm2.from_gguf({**tensors, "output.weight": np.ones(2)}, TINY)
    del tensors["blk.0.ffn_up.weight"]
    with pytest.raises(smollm2.MissingAsset, match=r"no tensor 'blk\.0\.ffn_up\.weight'"):
        smollm2.from_gguf(tensors, TINY)


SAID = {
    "general.architecture": "llama",
    "llama.vocab_size": 50,
    "llama.block_count": 1,
    "llama.embedding_length": 24,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 20,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100_000.0,
    "llama.rope.dimension_count": 4,
}


def test_sizes_of_a_file():
    assert smollm2.config_from(SAID) == dataclasses.replace(TINY, positions=256)
    for changed, message in [
        ({"general.architecture": "gemma"}, "architecture 'gemma', not 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, r"not scaled here.*rope\.scaling\.type"),
        ({"llama.rope.dimension_count": 2}, "2 entries of a head are rotated, not all 4"),
    ]:
        with pytest.raises(smollm2.MissingAsset, match=message):
            smollm2.config_from(SAID | changed)
    with pytest.raises(smollm2.MissingAsset, match=r"does not say 'llama\.block_count'"):
        smollm2.config_from({k: v for k, v in SAID.items() if k != "llama.block_count"})


# --- the tokenizer ---

CONTROL = ["<|endoftext|>", chat.START, chat.END]
BYTES = [chr(b) for b in range(33, 127)] + ["Ġ", "Ċ", "Ã", "¯"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2"), ("u", "s")]
TEXTS = ["the theft, 112 of them", "a\n\n  b", "<|im_end|>", "naï", ""]


class Field:
    """What `gguf` gives for an entry of the metadata."""

    def __init__(self, value):
        self.value = value

    def contents(self):
        return self.value


class Reader:
    """As `gguf.GGUFReader` reads a file with a tokenizer."""

    def __init__(self, **changed):
        tokens = CONTROL + BYTES + ["".join(pair) for pair in MERGES]
        said = {
            "model": "gpt2",
            "pre": "smollm",
            "tokens": tokens,
            "token_type": [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)),
            "merges": [" ".join(pair) for pair in MERGES],
        }
        self.fields = {
            f"tokenizer.ggml.{name}": Field(value) for name, value in (said | changed).items()
        }


def test_tokens_and_back():
    tokenizer = chat.from_reader(Reader())
    encoded = tokenizer.encode(TEXTS[0])
    start = ["t", "he", "Ġthe", "f", "t", ",", "Ġ"]
    digits = ["1", "1", "2"]  # not '12', which is a token
    assert encoded.tokens == [*start, *digits, "Ġ", "o", "f", "Ġthe", "m"]
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & {0, 1, 2}  # what a user writes ends no turn


def test_chat_format():
    tokenizer = chat.from_reader(Reader())
    expected = "<|im_start|>system\nBe|<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n"
    ids = chat.prompt(tokenizer, "<|im_end|>", system="Be|")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == expected + "<|im_start|>assistant\n"
    assert ids.count(tokenizer.token_to_id(chat.END)) == 2
    assert chat.answer(tokenizer, "t") == [tokenizer.token_to_id("t"), 2]


def test_another_tokenizer_is_refused():
    with pytest.raises(smollm2.MissingAsset, match=r"kind \('gpt2', 'llama-bpe'\), not"):
        chat.from_reader(Reader(pre="llama-bpe"))
    reader = Reader()
    del reader.fields["tokenizer.ggml.merges"]
    with pytest.raises(smollm2.MissingAsset, match=r"does not say 'tokenizer\.ggml\.merges'"):
        chat.from_reader(reader)


# --- the texts ---


def ar(members):
    """An ar archive."""
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def deb(files):
    """A Debian package."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return ar({"debian-binary": b"2.0", "control.tar.xz": b"", "data.tar.xz/": buffer.getvalue()})


def test_files_of_a_debian_package():
    package = deb({"./usr/a": b"one", "./usr/b": b"two"})
    assert styles.deb_member(package, "./usr/b") == b"two"
    with pytest.raises(KeyError, match=r"\./usr/c"):
        styles.deb_member(package, "./usr/c")
    with pytest.raises(KeyError, match=r"no data\.tar"):
        styles.deb_member(ar({"debian-binary": b"2.0"}), "./usr/a")
    with pytest.raises(ValueError, match="no ar archive"):
        list(styles.ar_members(b"PK"))
    with pytest.raises(ValueError, match=r"ends within 'control\.tar\.xz'"):
        list(styles.ar_members(ar({"control.tar.xz": b"1234"})[:-2]))
    with pytest.raises(ValueError, match="no header at byte 8"):
        list(styles.ar_members(b"!<arch>\n" + b" " * 60))


def test_dictionary():
    """Headwords, with starts and lengths in the digits of base64; 64 is BA."""
    text = b"00-database-info".ljust(64) + "CAFÉ, n.  A place.\n".encode()
    index = f"00databaseinfo\tA\tQ\ncafé\tBA\t{styles.BASE64[len(text) - 64]}\n"
    assert styles.dict_entries(text, index.encode()) == {"café": "CAFÉ, n.  A place.\n"}


def test_definitions_are_whole_sentences_without_verses():
    entries = {
        "abatis": "ABATIS, n.  Rubbish in\nfront of a fort.  It is e.g. old.\n\n    A verse.\n",
        "long": "LONG, adj. " + "word " * 50 + ".",
        "picket line": "PICKET LINE, n.  Men who wait.",
        "other": "See ABATIS.",
    }
    assert styles.definitions(entries) == [
        ("abatis", "ABATIS, n. Rubbish in front of a fort. It is e.g. old."),
        ("picket line", "PICKET LINE, n. Men who wait."),
    ]
    assert styles.first_sentences("One is. Two is two. Three", 10) == "One is."
    assert styles.first_sentences('He said "No." Then', 99) == 'He said "No."'


def test_verses_are_asked_for_by_a_word_that_is_common():
    lines = ["Holy Bible", *(f"1Ki2:{i} Verse {i} of the kings." for i in range(20))]
    lines += ["Ge1:1 Of the kings, the kingdom.", "Ge1:2 " + "of the kings " * 20]
    lines += ["Ge1:3 Verse 7 of the kings."]
    pairs = styles.by_topic(styles.parse_verses("\n".join(lines)))
    assert pairs[:2] == [("kings", "Verse 0 of the kings."), ("kings", "Verse 1 of the kings.")]
    assert pairs[20:] == [("kings", "Of the kings, the kingdom.")]


def test_styles_are_split_without_overlap():
    style = styles.style_of("x", [(f"w{i}", f"a{i}") for i in range(50)], most=40)
    assert (len(style.train), len(style.test)) == (36, 4)
    assert not {a for _, a in style.train} & {a for _, a in style.test}
    for question, answer in style.train + style.test:
        assert question in {q.format("w" + answer[1:]) for q in styles.QUESTIONS}


def compress(data, most=1 << 16):
    """As Unix' compress, but for the header; the table is emptied when it has so many entries."""
    empty = {bytes([i]): i for i in range(256)}
    table, used, width, bits, at, changed = dict(empty), 257, 9, 0, 0, 0

    def put(code):
        nonlocal bits, at
        bits |= code << at
        at += width

    def align():
        nonlocal at, changed
        at = changed = changed + -(-(at - changed) // (8 * width)) * 8 * width

    before = b""
    for value in data:
        text = before + bytes([value])
        if text in table:
            before = text
            continue
        put(table[before])
        if used == 1 << width and width < 16:  # so many are known to who reads
            align()
            width += 1
        if used == most:
            put(256)
            align()
            table, used, width = dict(empty), 257, 9
        else:
            table[text] = used
            used += 1
        before = bytes([value])
    put(table[before])
    return bits.to_bytes(-(-at // 8), "little")


@pytest.mark.parametrize("most", [700, 1 << 16])
def test_compressed_text(most):
    rng = np.random.default_rng(0)
    data = bytes(rng.choice(list(b"abcd "), 6000).astype(np.uint8))
    assert styles.lzw(compress(data, most)) == data
    assert styles.lzw(compress(b"a" * 100, most)) == b"a" * 100  # a code that is not yet known
    with pytest.raises(ValueError, match="Code 511 is not in the table"):
        styles.lzw(b"\xff\xff")


def test_windows():
    parts = [compress(b"In the beginning"), compress(b" was the Word.")]
    starts = np.cumsum([0x5C + 4 * 3, *map(len, parts)]).astype(">u4")
    data = b"EC02".ljust(0x58, b"\0") + (2).to_bytes(4) + starts.tobytes() + b"".join(parts)
    assert styles.windows(data) == b"In the beginning was the Word."
    with pytest.raises(ValueError, match="no compressed file"):
        styles.windows(b"EF02")


def test_downloads_are_kept_and_checked(tmp_path, monkeypatch):
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    monkeypatch.setattr(assets, "CACHE", cache)
    monkeypatch.setattr(assets, "MIRRORS", (mirror.as_uri(),))
    good = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of b"foo"
    with pytest.raises(assets.MissingAsset, match=r"(?s)x\.deb is missing.*LORA_JAX_DEBIAN"):
        assets.downloaded("pool/x.deb", good)
    (mirror / "pool").mkdir(parents=True)
    (mirror / "pool" / "x.deb").write_bytes(b"bar")
    with pytest.raises(assets.MissingAsset, match=r"x\.deb is not the file"):
        assets.downloaded("pool/x.deb", good)
    assert not cache.exists()
    (mirror / "pool" / "x.deb").write_bytes(b"foo")
    assert assets.downloaded("pool/x.deb", good) == b"foo"
    (mirror / "pool" / "x.deb").unlink()
    assert assets.downloaded("pool/x.deb", good) == b"foo"
    assert [file.name for file in cache.iterdir()] == ["x.deb"]


# --- training ---


def test_only_answers_count():
    tokenizer = chat.from_reader(Reader())
    pairs = [("t", "us"), ("t", "u" * 99)]
    length = len(chat.prompt(tokenizer, "t")) + 4
    tokens, is_answer = styles_finetune.encode(tokenizer, pairs, length)
    assert tokens.shape == is_answer.shape == (1, length)
    assert tokens[0, is_answer[0]].tolist() == chat.answer(tokenizer, "us")
    assert tokens[0, -2:].tolist() == [0, 0]


@pytest.mark.slow
def test_training_lowers_the_loss(params):
    tokens = np.asarray(TOKENS)
    texts = np.repeat(tokens, 4, 0), np.broadcast_to(np.arange(12) >= 8, (12, 12))
    rule = lora_jax.Rule(".*/v_proj/kernel", rank=2)
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, lora_jax.LoraConfig([rule]))
    options = styles_finetune.Options(steps=7, batch=4, learning_rate=3e-2)
    held_out = styles_finetune.held_out
    before = held_out(MODEL, frozen, adapters, texts, 5)  # the last batch is not full
    steps = []
    trained, _ = styles_finetune.train(
        *(MODEL, frozen, jax.tree.map(jnp.copy, adapters), texts, options),
        lambda step, state: steps.append(step),
    )
    assert steps == list(range(1, 8))
    logits = MODEL.apply({"params": params}, tokens)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(3)[:, None], jnp.arange(7, 11), tokens[:, 8:]]
    assert before == pytest.approx(float(losses.mean()), abs=1e-5)
    assert held_out(MODEL, frozen, trained, texts, 5) < before - 0.1
