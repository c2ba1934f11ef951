"""What is wrong is wrong everywhere: every function that takes trees, against every wrong tree.

A cell is an error that names the leaf, or right, which is said in ``RIGHT`` with the value.
"""

import re

import flax.core
import flax.linen as nn
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from lora_jax import Adapter, FullyTrained, LoraBias
from lora_jax.cli.__main__ import main
from lora_jax.core._boxes import unbox
from lora_jax.files._checkpoint import Checkpoint
from lora_jax.files._tensors import Tensors


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(4, name="dense")(x))


MODEL, X = Net(), np.ones((2, 3), np.float32)
NAMES = [
    lora_jax.peft.KeyMapping("{layer}/kernel", "m.{layer}.weight"),
    lora_jax.peft.KeyMapping("{layer}/bias", "m.{layer}.bias", kind="plain"),
]


def array(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PARAMS = {
    "dense": {"kernel": array(3, 4), "bias": array(4, seed=1)},
    "head": {"kernel": array(4, 2, seed=2), "bias": array(2, seed=3)},
}
LORA = Adapter(array(3, 2, seed=4), array(2, 4, seed=5), rank=2, alpha=3.0)
DORA = LORA.replace(variant="dora", m=1 + np.abs(array(4, seed=6)))
CODES = np.arange(12).reshape(3, 4) % 5


def changed(tree, **leaves):
    """The tree with other leaves, by paths with ``_`` for ``/``; ``None`` takes one out."""
    flat = flatten_dict(tree, sep="/", is_leaf=lambda _, x: not isinstance(x, dict))
    flat |= {path.replace("_", "/"): leaf for path, leaf in leaves.items()}
    tree = {}
    for path, leaf in flat.items():
        if leaf is not None:
            layer, name = path.split("/", 1)
            tree.setdefault(layer, {})[name] = leaf
    return tree


FROZEN = {"dense": PARAMS["dense"]}
HEAD = {"kernel": array(4, 2, seed=7), "bias": array(2, seed=8)}
TREES = {
    "lora": {"dense": {"kernel": LORA}, "head": HEAD},
    "dora": {"dense": {"kernel": DORA}, "head": HEAD},
}


class Case:
    """A base, the parameters, and adapters."""

    def __init__(self, frozen=FROZEN, params=PARAMS, adapters=TREES["lora"], good=TREES["lora"]):
        self.frozen, self.params, self.adapters, self.good = frozen, params, adapters, good


# --- the entry points ---


def apply(case, tmp):
    return lora_jax.lora_apply(MODEL, {"params": case.frozen}, case.adapters, X)


def apply_ids(case, tmp):
    stacked = jax.tree.map(lambda x: np.stack([x, x]), case.adapters)
    ids = jnp.array([0, 1])
    return lora_jax.lora_apply(MODEL, {"params": case.params}, stacked, X, adapter_ids=ids)


def init(case, tmp):
    config = lora_jax.LoraConfig([lora_jax.Rule("dense/kernel", 2)], trainable=["head/.*"])
    return lora_jax.lora_init(jax.random.key(0), case.params, config)


def export(case, tmp):
    lora_jax.export(tmp / "m.safetensors", case.frozen, case.adapters)
    return dict(Tensors(tmp / "m.safetensors"))


def save(case, tmp):
    lora_jax.save(tmp / "a", case.adapters, frozen=case.frozen)
    return lora_jax.load(tmp / "a", case.params, verify=True)


def save_alone(case, tmp):
    lora_jax.save(tmp / "a", case.adapters)
    return lora_jax.files._read_folder.read(tmp / "a").adapters


def load(case, tmp):
    lora_jax.save(tmp / "a", case.good)
    return lora_jax.load(tmp / "a", case.params)


def peft_save(case, tmp):
    lora_jax.peft.save(tmp / "p", case.frozen, case.adapters, names=NAMES)
    return lora_jax.peft.load(tmp / "p", PARAMS, names=NAMES)[1]


def peft_load(case, tmp):
    lora_jax.peft.save(tmp / "p", FROZEN, case.good, names=NAMES)
    return lora_jax.peft.load(tmp / "p", case.params, names=NAMES)


def pool(case, tmp):
    held = lora_jax.AdapterPool(case.params, case.adapters, slots=1)
    held.put("x", case.adapters)
    return held.stacked


def put(case, tmp):
    held = lora_jax.AdapterPool(PARAMS, case.good, slots=1)
    held.put("x", case.adapters)
    return held.stacked


def each(case, tmp):
    return lora_jax.per_adapter(optax.trace(0.9)).init(case.adapters)


ADAPTERS = {  # which take adapters, and a base
    "lora_apply": apply,
    "lora_apply, ids": apply_ids,
    "lora_merge": lambda case, tmp: lora_jax.lora_merge(case.frozen, case.adapters),
    "summary": lambda case, tmp: lora_jax.summary(case.frozen, case.adapters),
    "rounding": lambda case, tmp: lora_jax.rounding(case.frozen, case.adapters),
    "save": save,
    "export": export,
    "stack": lambda case, tmp: lora_jax.stack([case.adapters, case.good], case.params),
    "combine": lambda case, tmp: lora_jax.combine([case.adapters], [1.0], params=case.params)[0],
    "compress": lambda case, tmp: lora_jax.compress(case.adapters, rank=2, params=case.params)[0],
    "cache_norm": lambda case, tmp: lora_jax.cache_norm(case.frozen, case.adapters),
    "AdapterPool": pool,
    "AdapterPool.put": put,
    "peft.save": peft_save,
}
ALONE = {  # which take adapters without a base
    "save, no base": save_alone,
    "stack, no base": lambda case, tmp: lora_jax.stack([case.adapters]),
    "combine, no base": lambda case, tmp: lora_jax.combine([case.adapters], [1.0])[0],
    "compress, no base": lambda case, tmp: lora_jax.compress(case.adapters, rank=2)[0],
}
BASES = {  # which take a base, and no adapters
    "lora_init": init,
    "kernel_axes": lambda case, tmp: lora_jax.kernel_axes(MODEL, {"params": case.params}, X),
    "load": load,
    "peft.load": peft_load,
    "quantize": lambda case, tmp: lora_jax.quantize(case.params, {"dense/kernel": "int8"}),
}


# --- what is wrong ---


def base(**leaves):
    return Case(changed(FROZEN, **leaves), changed(PARAMS, **leaves))


def nodes(variant="lora", **leaves):
    return Case(adapters=changed(TREES[variant], **leaves), good=TREES[variant])


def head_of(dtype):
    leaf = np.ones((4, 2), dtype)
    return Case(params=changed(PARAMS, head_kernel=leaf))


@flax.struct.dataclass
class Codes:
    """Codes and a scale, as quantizers have them."""

    codes: np.ndarray
    scale: np.ndarray


def restored(tree):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(tree))


# Name: the case, and what every message says.
WRONG_BASES = {
    "int8": (base(dense_kernel=CODES.astype(np.int8)), ["int8", "'dense/kernel'", "dequantize"]),
    "uint8": (base(dense_kernel=CODES.astype(np.uint8)), ["uint8", "'dense/kernel'", "dequantize"]),
    "int4": (base(dense_kernel=jnp.asarray(CODES, jnp.int4)), ["int4", "'dense/kernel'"]),
    "boxed int8": (
        base(dense_kernel=nn.Partitioned(CODES.astype(np.int8), (None, "x"))),
        ["int8", "'dense/kernel'", "dequantize"],
    ),
    "codes and a scale": (
        base(dense_kernel=Codes(CODES.astype(np.int8), np.ones(4, np.float32))),
        ["Codes", "'dense/kernel'", "dequantize"],
    ),
}
FILE = ["file has arrays only: load it into the tree that lora_init gives"]
WRONG_ADAPTERS = {
    "fully trained in int8": (
        nodes(head_kernel=FullyTrained(HEAD["kernel"], "int8")),
        ["'head/kernel'", "int8"],
    ),
    "fully trained integers": (
        nodes(head_kernel=np.ones((4, 2), np.int32)),
        ["'head/kernel'", "int32"],
    ),
    "factors in int8": (
        nodes(dense_kernel=LORA.replace(U=np.ones((3, 2), np.int8))),
        ["'dense/kernel.U'", "int8"],
    ),
    "restored": (Case(adapters=restored(TREES["lora"])), ["'dense/kernel", *FILE]),
    "restored, DoRA": (Case(adapters=restored(TREES["dora"])), ["'dense/kernel", *FILE]),
    "restored head": (
        Case(adapters={"head": restored({"kernel": FullyTrained(HEAD["kernel"], "bfloat16")})}),
        ["'head/kernel", *FILE],
    ),
    "restored FrozenDict": (
        Case(adapters=flax.core.freeze(restored(TREES["lora"]))),
        ["'dense/kernel", *FILE],
    ),
    "no m": (nodes(dense_kernel=DORA.replace(m=None)), ["'dense/kernel' is of variant", "no m"]),
    "an m": (
        nodes(dense_kernel=LORA.replace(m=array(4))),
        ["'dense/kernel' is of variant", "also has .m."],
    ),
    "no array": (nodes(head_kernel="W"), ["'head/kernel'"]),
}
OF_ANOTHER = {
    "other paths": (nodes(dense_kernel=None, other_kernel=LORA), ["'other/kernel'", "[Nn]earest"]),
    "other shapes": (
        nodes(dense_kernel=LORA.replace(U=array(5, 2))),
        ["'dense/kernel'", "another model|for one model"],
    ),
    "a LoRA bias of another": (nodes(dense_bias=LoraBias(array(5))), ["'dense/bias'"]),
    "above the base": (
        Case(adapters={"dense": array(3, 4), "head": HEAD}),
        ["'dense' as a leaf", "another model"],
    ),
}
ERROR = {
    (entry, wrong): case
    for entries, table in [
        ({**ADAPTERS, **BASES}, WRONG_BASES),
        ({**ADAPTERS, **ALONE}, WRONG_ADAPTERS),
        (ADAPTERS, OF_ANOTHER),
    ]
    for entry in entries
    for wrong, case in table.items()
}
for wrong in WRONG_BASES:
    # It asks for axes only, and a pool has a base of its own.
    del ERROR["kernel_axes", wrong], ERROR["AdapterPool.put", wrong]
del ERROR["peft.load", "codes and a scale"]  # of which names know no shape
ENTRIES = {**ADAPTERS, **ALONE, **BASES, "per_adapter": each}


@pytest.mark.parametrize("wrong", dict.fromkeys(wrong for _, wrong in ERROR))
def test_wrong_trees_are_refused_alike(wrong, tmp_path):
    failed = []
    for entry in (entry for entry, one in ERROR if one == wrong):
        case, message = ERROR[entry, wrong]
        failed += [refusal(entry, case, message, tmp_path / entry)]
    assert not [line for line in failed if line]


def refusal(entry, case, message, folder):
    """What is wrong with how an entry point refuses a case."""
    folder.mkdir()
    try:
        got = ENTRIES[entry](case, folder)
    except (TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        lacks = [part for part in message if not re.search(part, said)]
        return f"{entry} does not say {lacks}: {said[:300]}" if lacks else None
    return f"{entry} gave {got}"


# --- what only some can take ---

STACKED = jax.tree.map(lambda x: np.stack([x, 2 * x]), TREES["lora"])
SCALED = lora_jax.cache_norm(FROZEN, TREES["dora"])
UNTIED = {"dense": {"kernel": LORA.replace(untied=True)}, "head": HEAD}
NAN = changed(TREES["lora"], dense_kernel=LORA.replace(V=array(2, 4) * np.nan))
ON_DISK = {"save", "save, no base", "export", "peft.save"}
NEED_W = {"combine, no base", "compress, no base"}
QUANTIZED = lora_jax.quantize(PARAMS, {"dense/kernel": "int8"})["dense"]["kernel"]
# Name: the case, what is said where it is refused, and who takes it.
SOME = {
    "good": (Case(), [], {*ADAPTERS, *ALONE}),
    "DoRA": (
        Case(adapters=TREES["dora"], good=TREES["dora"]),
        ["'dense/kernel'", "pass params="],
        {*ADAPTERS, *ALONE} - NEED_W,
    ),
    "a stack": (
        Case(adapters=STACKED),
        ["'dense/kernel'", "stack of 2", "alone"],
        {"cache_norm"},
    ),
    "cache_norm": (
        Case(adapters=SCALED, good=SCALED),
        ["'dense/kernel'", "is of cache_norm|pass params="],
        {*ADAPTERS, *ALONE} - {"save", "save, no base", "peft.save", *NEED_W},
    ),
    "untied": (
        Case(adapters=UNTIED, good=UNTIED),
        ["'dense/kernel' has tied='untie'"],
        {*ADAPTERS, *ALONE} - {"lora_merge", "rounding", "export"},
    ),
    "swapped": (
        Case(TREES["lora"], TREES["lora"], FROZEN),
        ["'dense/kernel'.*swapped|'dense/bias', which nothing in the pool has"],
        {*ALONE},  # which cannot know
    ),
    "fully trained leaves in both": (
        Case(frozen=PARAMS),
        ["'head/(bias|kernel)' is in the base and, fully trained"],
        {*ADAPTERS, *ALONE} - {"lora_apply", "lora_merge", "rounding", "summary", "save", "export"},
    ),
    "NaN": (
        Case(adapters=NAN),
        ["dense[./](kernel|weight|lora)", "NaN or infinite"],
        {"lora_apply", "lora_apply, ids", "lora_merge", "summary", "rounding", "cache_norm"}
        | {"stack", "stack, no base"},  # in which it reaches no other row
    ),
    "float16": (
        base(dense_kernel=PARAMS["dense"]["kernel"].astype(np.float16)),
        [],
        {*ADAPTERS, *ALONE},
    ),
    "boxed": (
        base(dense_kernel=nn.Partitioned(PARAMS["dense"]["kernel"], (None, "x"))),
        [],
        {*ADAPTERS, *ALONE},
    ),
    "quantized": (base(dense_kernel=QUANTIZED), [], {*ADAPTERS, *ALONE}),
    "FrozenDict": (
        Case(*map(flax.core.freeze, (FROZEN, PARAMS, TREES["lora"], TREES["lora"]))),
        [],
        {*ADAPTERS, *ALONE},
    ),
}


def output(case):
    """What the model gives, by the formulas, in NumPy."""
    frozen, adapters = map(flax.core.unfreeze, (case.frozen, case.adapters))
    W = np.asarray(unbox(frozen["dense"]["kernel"]), np.float32)
    node, head = adapters["dense"]["kernel"], adapters["head"]
    W = W + node.scale * node.U @ node.V
    if node.m is not None:
        W = W * node.m / (np.linalg.norm(W, axis=0) if node.kind == "dora" else 1)
    return (X @ W + frozen["dense"]["bias"]) @ head["kernel"] + head["bias"]


def computed(entry, got, case):
    """What the model gives with what an entry point gave."""
    if entry.startswith("lora_apply"):
        return got
    if entry == "export":
        got = {tuple(path.split("/")): leaf for path, leaf in got.items()}
        return MODEL.apply({"params": unflatten_dict(got)}, X)
    if entry == "lora_merge":
        return MODEL.apply({"params": got}, X)
    if entry == "save, no base":
        got = unflatten_dict({tuple(path.split("/")): node for path, node in got.items()})
    if entry == "save":
        got = got[1]
    if entry.startswith(("stack", "AdapterPool")):
        got = jax.tree.map(lambda x: x[0], got)
    return lora_jax.lora_apply(MODEL, {"params": {"dense": case.frozen["dense"]}}, got, X)


@pytest.mark.parametrize("name", SOME)
def test_what_only_some_take(name, tmp_path):
    case, message, takes = SOME[name]
    failed = []
    for entry in {**ADAPTERS, **ALONE}:
        if entry == "lora_apply, ids" and name == "a stack":
            continue  # which it is for
        if entry not in takes:
            failed.append(refusal(entry, case, message, tmp_path / entry))
            continue
        (tmp_path / entry).mkdir()
        got = ENTRIES[entry](case, tmp_path / entry)
        if entry == "summary":
            m = 0 if case.adapters["dense"]["kernel"].m is None else 4
            assert (got.trained, got.total) == (24 + m, 26)
        elif entry == "rounding":
            assert np.isnan(got["dense/kernel"].largest) == (name == "NaN")
        elif name not in ("a stack", "swapped"):
            y = computed(entry, got, case)
            np.testing.assert_allclose(y, output(case), 2e-3 if name == "float16" else 1e-5, 1e-5)
        elif name == "swapped":
            assert jax.tree.leaves(got)
    assert not [line for line in failed if line]


def test_a_model_may_name_its_parameters_as_an_adapter_does(tmp_path):
    low = {"U": array(3, 2), "V": array(2, 4), "m": array(4)}
    params = {"low": low, "head": PARAMS["head"]}
    config = lora_jax.LoraConfig([lora_jax.Rule("head/kernel", 1)], trainable=["low/.*"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), params, config)
    got = lora_jax.lora_merge(frozen, adapters)["low"]
    assert all((got[name] == low[name]).all() for name in low)
    lora_jax.save(tmp_path / "a", adapters)
    assert set(lora_jax.load(tmp_path / "a", params)[1]["low"]) == set(low)
    with pytest.raises(TypeError, match=r"'U' and 'V' and 'm' at 'low'.* pass the base too"):
        lora_jax.save(tmp_path / "b", {"low": low})
    lora_jax.save(tmp_path / "b", {"low": low}, frozen={"head": PARAMS["head"]})
    assert lora_jax.stack([{"low": low}], params)["low"]["U"].shape == (1, 3, 2)
    boxes = {name: {"kernel": {"value": array(3, 2)}} for name in ("dense", "head")}
    config = lora_jax.LoraConfig([lora_jax.Rule("dense/.*", 1)], trainable=["head/.*"])
    frozen, adapters = lora_jax.lora_init(jax.random.key(0), boxes, config)
    assert lora_jax.lora_merge(frozen, adapters)["head"]["kernel"].keys() == {"value"}


def test_an_optimizer_for_each_is_for_a_stack():
    assert each(Case(adapters=STACKED), None).trace["head"]["bias"].shape == (2, 2)
    square = Adapter(array(2, 2), array(2, 2), rank=2)  # of which every size is the same
    for one in (TREES["lora"], {"kernel": square}, {"bias": np.float32(1)}):
        with pytest.raises(ValueError, match=r"per_adapter is for stacked .*lora_jax.stack\("):
            each(Case(adapters=one), None)


# --- the commands, which take files ---


def in_file(**leaves):
    return flatten_dict(changed(PARAMS, **leaves), sep="/")


FILES = {
    "base": in_file(),
    "int8": in_file(dense_kernel=CODES.astype(np.int8)),
    "uint8": in_file(head_kernel=np.ones((4, 2), np.uint8)),
    "shapes": in_file(dense_kernel=array(3, 5)),
    "paths": in_file(dense_kernel=None, other_kernel=array(3, 4)),
    "NaN": in_file(dense_kernel=array(3, 4) * np.nan),
}
NO_ADAPTER = ["no adapters in", "base"]
# What is called, and what is said; the other arguments are files and folders of these names.
COMMANDS = [
    ("merge lora int8 out", ["'dense/kernel' is int8", "floating point"]),
    ("merge dora int8 out", ["'dense/kernel' is int8", "floating point"]),
    ("merge lora uint8 out", ["'head/kernel' is uint8", "floating point"]),
    ("merge lora shapes out", ["'dense/kernel' does not fit the kernel (3, 5)", "another model"]),
    ("merge lora paths out", ["'dense", "Nearest: ", "other/kernel"]),
    ("merge dora NaN out", ["'dense/kernel' has NaN"]),
    ("merge untied base out", ["'dense/kernel' has tied='untie'"]),
    ("merge base lora out", NO_ADAPTER),
    ("verify base", NO_ADAPTER),
    ("verify verified --base int8", ["'dense/kernel'"]),
    ("verify verified --base shapes", ["'dense/kernel'"]),
    ("verify verified --base paths", ["'dense/kernel'"]),
    ("verify verified --base NaN", ["'dense/kernel'", "NaN"]),
    ("verify lora --base base", ["no hashes of its base"]),
    ("inspect base", NO_ADAPTER),
    ("convert base out", NO_ADAPTER),
    ("diff base lora", NO_ADAPTER),
    ("diff lora base", NO_ADAPTER),
    ("diff lora dora", ["dense/kernel"]),
    ("diff lora untied", ["dense/kernel", "untied"]),
    ("extract int8 base out --rank 1", ["'dense/kernel'", "--allow-rest"]),
    ("extract base int8 out --rank 1", ["'dense/kernel'", "--allow-rest"]),
    ("extract shapes base out --rank 1", ["'dense/kernel'", "--match and --allow-rest"]),
    ("extract paths base out --rank 1", ["'dense/kernel'", "--match"]),
    ("extract NaN base out --rank 1", ["'dense/kernel' has NaN"]),
    ("extract base NaN out --rank 1", ["'dense/kernel' has NaN"]),
    ("extract lora base out --rank 1", ["'dense/kernel.U'"]),
]


def test_commands(tmp_path, monkeypatch, capsys):
    for name, arrays in FILES.items():
        safetensors.numpy.save_file(arrays, tmp_path / name)
    for name, adapters in {**TREES, "untied": UNTIED}.items():
        lora_jax.save(tmp_path / name, adapters)
    lora_jax.save(tmp_path / "verified", TREES["lora"], frozen=FROZEN)
    monkeypatch.setenv("COLUMNS", "200")

    def call(line):
        words = [str(tmp_path / x) if x[0] != "-" and not x.isdigit() else x for x in line.split()]
        monkeypatch.setattr("sys.argv", ["lora-jax", line.split()[0], *words[1:]])
        try:
            code = main()
        except SystemExit as exit_:
            code = exit_.code
        out = capsys.readouterr()
        return code, out.out + out.err

    for line, message in COMMANDS:
        code, said = call(line)
        assert code not in (0, None), (line, said)
        assert not [part for part in message if part not in said], (line, said)
        assert not (tmp_path / "out").exists(), line
    for line in ("merge lora base out", "verify verified --base base", "diff lora lora"):
        assert call(line)[0] == 0
    merged = Checkpoint(tmp_path / "out")
    expected = lora_jax.lora_merge(FROZEN, TREES["lora"])
    assert np.allclose(merged["dense/kernel"], expected["dense"]["kernel"], atol=1e-6)
