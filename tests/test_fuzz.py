"""Ten thousand damaged and hostile files: each is refused, in bounded memory, or read right."""

import contextlib
import hashlib
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_jax
from lora_jax.files._adapter_json import checksum
from lora_jax.files._tensors import Tensors
from lora_jax.peft.config._read import read_config

# What reading may raise. Anything else, or no end, is a failure.
REFUSED = (ValueError, FileNotFoundError)
COUNT = 1_250
BOUND = 64 * 2**20

PARAMS = {
    "a": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
    "b": {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)},
}
VALUES = (
    *(None, True, False, "", "x", [], {}, [1], {"x": 1}, -1, 0, 1, 2, 3.5, -0.5, 1e308),
    *(2**31, 2**63, 2**64, 10**30, "../../x", "\u202e", "a" * 10_000, [[[[]]]], float("nan")),
)


def write_adapter(folder, kind, biases=False):
    options = {} if biases else {"variant": "dora", "detach_norm": True}
    config = lora_jax.LoraConfig([lora_jax.Rule(".*/kernel", rank=2, **options)], trainable=[])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), PARAMS, config)
    for name in adapters if biases else ():
        adapters[name]["bias"] = lora_jax.LoraBias(PARAMS[name]["bias"])
    adapters = random_like(adapters)
    if kind == "own":
        lora_jax.save(folder, adapters)
    else:
        lora_jax.peft.save(folder, frozen, adapters)
    return adapters


def places_in(tree, path=()):
    """The way to every value in a JSON value, but to itself."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places_in(value, (*path, key))


def mutate_json(content, rng):
    """One place in a JSON value is another value, another key, or gone."""
    tree = json.loads(content)
    places = list(places_in(tree))
    *path, last = places[rng.integers(len(places))]
    inside = tree
    for key in path:
        inside = inside[key]
    way = rng.integers(3)
    value = VALUES[rng.integers(len(VALUES))]
    if way == 0:
        inside[last] = value
    elif way == 1:
        del inside[last]
    elif isinstance(inside, dict):
        inside[str(value)] = inside.pop(last)
    else:
        inside.append(value)
    return json.dumps(tree).encode()


def mutate_bytes(content, rng):
    """Bits flipped, bytes cut out, doubled or made anew."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        i, n = int(rng.integers(len(out) + 1)), int(rng.integers(1, 9))
        way = rng.integers(5)
        if way == 0 and i < len(out):
            out[i] ^= 1 << rng.integers(8)
        elif way == 1:
            del out[i : i + n]
        elif way == 2:
            out[i:i] = out[i : i + n]
        elif way == 3:
            out[i : i + n] = rng.bytes(n)
        else:
            del out[i:]
    return bytes(out)


def mutate_header(content, rng):
    """A safetensors file whose header is other JSON, of the right length."""
    (length,) = struct.unpack("<Q", content[:8])
    header = mutate_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


MUTATIONS = {".json": (mutate_json, mutate_bytes), ".safetensors": (mutate_header, mutate_bytes)}


def reseal(folder, file):
    """Makes the checksums of our own format right again, as a stranger can."""
    index = folder / "adapter.json"
    try:
        said = json.loads(index.read_text())
        if file.suffix == ".safetensors":
            said["tensors"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        said["checksum"] = checksum(said)
    except (ValueError, TypeError, KeyError):
        return
    index.write_text(json.dumps(said))


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed"])
@pytest.mark.parametrize("biases", [False, True], ids=["dora", "biases"])
@pytest.mark.parametrize("kind", ["own", "peft"])
def test_mutated_files(tmp_path, kind, biases, sealed):
    """Checksums find damage; who makes them right again gets adapters that fit, or none."""
    adapters = write_adapter(tmp_path, kind, biases)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    names = sorted(files)
    rng = np.random.default_rng(sum(map(ord, kind)) + sealed)
    read = 0
    tracemalloc.start()
    try:
        for _ in range(COUNT):
            file = names[rng.integers(len(names))]
            mutations = MUTATIONS[file.suffix]
            file.write_bytes(mutations[rng.integers(len(mutations))](files[file], rng))
            if sealed and kind == "own":
                reseal(tmp_path, file)
            try:
                if kind == "own":
                    _, loaded = lora_jax.load(tmp_path, PARAMS)
                else:
                    _, loaded = lora_jax.peft.load(tmp_path, PARAMS)
            except REFUSED as error:
                assert str(tmp_path) in str(error) or "params" in str(error), error  # noqa: PT017
            else:
                read += 1
                check_fit(loaded)
                if kind == "own" and not sealed:
                    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
            for name in tmp_path.iterdir():
                assert name in files
            for name, content in files.items():
                name.write_bytes(content)
        assert tracemalloc.get_traced_memory()[1] < BOUND
    finally:
        tracemalloc.stop()
    assert read < COUNT / 2


def check_fit(adapters):
    """What was read has the shapes of this model."""
    for layer, leaves in adapters.items():
        for name, node in leaves.items():
            expected = PARAMS[layer][name].shape
            if isinstance(node, lora_jax.Adapter):
                shapes = node.shapes(expected)
                assert {n: getattr(node, n).shape for n in shapes} == shapes
            else:
                assert getattr(node, "value", node).shape == expected


# --- anything at all, as hypothesis finds it ---

NAMES = ("r", "lora_alpha", "rank_pattern", "use_dora", "target_modules", "modules_to_save", "bias")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inside: (
        st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=4), inside, max_size=4)
    ),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", ""]) | JSON,
        "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON,
    }
)
anything = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def read_or_refuse(read):
    """Errors are those that reading may raise."""
    with contextlib.suppress(REFUSED):
        read()


@anything
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), TENSOR | JSON) | JSON,
    data=st.binary(max_size=40),
)
def test_any_header(tmp_path, header, data):
    content = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content + data)
    read_or_refuse(lambda: dict(Tensors(file)))


@anything
@given(st.binary(max_size=64))
def test_any_bytes(tmp_path, content):
    for name in ("x.safetensors", "adapter.json", "adapter_config.json"):
        (tmp_path / name).write_bytes(content)
    read_or_refuse(lambda: Tensors(tmp_path / "x.safetensors"))
    read_or_refuse(lambda: lora_jax.load(tmp_path, PARAMS))
    read_or_refuse(lambda: lora_jax.peft.load(tmp_path, PARAMS))


@anything
@given(st.dictionaries(st.sampled_from(NAMES), JSON | st.integers(1, 9) | st.just("none")))
def test_any_config(tmp_path, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | said))
    read_or_refuse(lambda: read_config(tmp_path))
