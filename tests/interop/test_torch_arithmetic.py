"""Sums of adapters equal PEFT's where both mean the same; of DoRA PEFT leaves something out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_like, relative_error

import lora_jax
from lora_jax.arithmetic import _task_vectors as task_vectors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
merge_utils = pytest.importorskip("peft.utils.merge_utils")

pytestmark = pytest.mark.interop

KEY = jax.random.key(0)
WEIGHTS = [0.7, 0.3, 1.2]


def tensor(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("method", ["magnitude_prune", "ties"])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_task_vectors(method, density):
    rng = np.random.default_rng(0)
    deltas = list(rng.standard_normal((3, 9, 7)).astype(np.float32))
    deltas[1][0] = -deltas[0][0]  # sums of 0 elect the same sign
    deltas[2][0] = 0
    theirs = getattr(merge_utils, method)(
        [tensor(delta) for delta in deltas], torch.tensor(WEIGHTS), density
    )
    ours = task_vectors.merged(method, deltas, WEIGHTS, density)
    assert relative_error(ours, theirs.numpy()) < 1e-6


def test_election_among_what_dare_has_kept():
    rng = np.random.default_rng(1)
    deltas = list(rng.standard_normal((3, 9, 7)).astype(np.float32))
    keys = list(jax.random.split(KEY, 3))
    kept = [task_vectors.dropped(d, 0.6, k) for d, k in zip(deltas, keys, strict=True)]
    stack, weights = torch.stack(list(map(tensor, kept))), torch.tensor(WEIGHTS)
    mask = merge_utils.calculate_majority_sign_mask(stack)
    theirs = {
        "dare_ties": merge_utils.disjoint_merge(stack * weights[:, None, None], mask),
        "dare_linear": merge_utils.task_arithmetic(list(stack), weights),
    }
    for method, expected in theirs.items():
        ours = task_vectors.merged(method, deltas, WEIGHTS, 0.6, keys)
        assert relative_error(ours, expected.numpy()) < 1e-6


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = torch.nn.Linear(6, 5, bias=False)
        self.embed = torch.nn.Embedding(11, 4)

    def forward(self, x):
        return self.dense(x)


PARAMS = random_like(
    {"dense": {"kernel": jnp.zeros((6, 5))}, "embed": {"embedding": jnp.zeros((11, 4))}}
)
RULES = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "alpha": 2.0, "rslora": True}, {"rank": 1})


def adapters(**more):
    """Three trees of different ranks and scales."""
    trees = []
    for seed, options in enumerate(RULES):
        rule = lora_jax.Rule(".*", **(options | more))
        _, tree = lora_jax.lora_init(KEY, PARAMS, lora_jax.LoraConfig([rule]))
        trees.append(random_like(tree, seed))
    return trees


def in_peft(trees):
    """A model of PEFT with the same base and an adapter for each tree."""
    model = TorchModel()
    model.dense.weight.data = tensor(PARAMS["dense"]["kernel"].T)
    model.embed.weight.data = tensor(PARAMS["embed"]["embedding"])
    for i, tree in enumerate(trees):
        node = tree["dense"]["kernel"]
        config = peft.LoraConfig(
            r=node.rank,
            lora_alpha=node.alpha,
            use_rslora=node.rslora,
            use_dora=node.m is not None,
            target_modules=["dense", "embed"],
        )
        if i == 0:
            model = peft.get_peft_model(model, config, "0")
        else:
            model.add_adapter(str(i), config)
        dense, embed = model.base_model.model.dense, model.base_model.model.embed
        dense.lora_A[str(i)].weight.data = tensor(node.U.T)
        dense.lora_B[str(i)].weight.data = tensor(node.V.T)
        embed.lora_embedding_A[str(i)].data = tensor(tree["embed"]["embedding"].U.T)
        embed.lora_embedding_B[str(i)].data = tensor(tree["embed"]["embedding"].V.T)
        if node.m is not None:
            dense.lora_magnitude_vector[str(i)].weight.data = tensor(node.m)
            magnitude = tree["embed"]["embedding"].m
            embed.lora_magnitude_vector[str(i)].weight.data = tensor(magnitude)
    return model


def changes(model, name):
    """`W' - W` of PEFT's adapter, in Flax's orientation."""
    dense, embed = model.base_model.model.dense, model.base_model.model.embed
    return dense.get_delta_weight(name).detach().numpy().T, embed.get_delta_weight(
        name
    ).detach().numpy()


def ours(combined):
    nodes = combined["dense"]["kernel"], combined["embed"]["embedding"]
    return [node.scale * node.U @ node.V for node in nodes]


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ({"combination_type": "cat"}, {}),
        ({"combination_type": "svd", "svd_rank": 2}, {"rank": 2}),
        (
            {"combination_type": "ties_svd", "svd_rank": 3, "density": 0.6},
            {"combination_type": "ties", "rank": 3, "density": 0.6},
        ),
        (
            {"combination_type": "magnitude_prune_svd", "svd_rank": 4, "density": 0.4},
            {"combination_type": "magnitude_prune", "rank": 4, "density": 0.4},
        ),
    ],
    ids=lambda options: options.get("combination_type"),
)
@pytest.mark.parametrize("rslora", [False, True])
def test_add_weighted_adapter(theirs, options, rslora):
    trees = adapters(rslora=rslora)
    model = in_peft(trees)
    model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "sum", **theirs)
    # With rslora PEFT gives the sum the alpha of its rank, and so a scale of sqrt(rank).
    scale = model.base_model.model.dense.scaling["sum"]
    combined, _ = lora_jax.combine(trees, WEIGHTS, **options)
    rank = combined["dense"]["kernel"].rank
    for got, expected in zip(ours(combined), changes(model, "sum"), strict=True):
        assert relative_error(got, expected / scale) < 1e-5
    if not rslora:
        assert scale == 1
    elif options:
        assert scale == pytest.approx(rank**0.5)


def test_peft_leaves_out_magnitudes():
    """Of DoRA it adds `s U V` alone; here the sum is that of what the adapters change."""
    trees = adapters(variant="dora", rslora=False)
    model = in_peft(trees)
    deltas = [[], []]
    for name in ("0", "1", "2"):
        model.set_adapter(name)
        layers = model.base_model.model.dense, model.base_model.model.embed
        for layer, found in zip(layers, deltas, strict=True):
            before = layer.weight.detach().clone()
            layer.merge(adapter_names=[name])
            found.append((layer.weight - before).detach().numpy())
            layer.unmerge()
    combined, _ = lora_jax.combine(trees, WEIGHTS, params=PARAMS)
    merged = lora_jax.lora_merge(PARAMS, combined)
    got = merged["dense"]["kernel"] - PARAMS["dense"]["kernel"]
    expected = sum(w * delta for w, delta in zip(WEIGHTS, deltas[0], strict=True)).T
    assert relative_error(got, expected) < 1e-5
    got = merged["embed"]["embedding"] - PARAMS["embed"]["embedding"]
    expected = sum(w * delta for w, delta in zip(WEIGHTS, deltas[1], strict=True))
    assert relative_error(got, expected) < 1e-5
    model.base_model.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "sum", combination_type="cat")
    theirs, _ = changes(model, "sum")
    wanted = sum(w * delta for w, delta in zip(WEIGHTS, deltas[0], strict=True)).T
    assert relative_error(theirs, wanted) > 0.1


def test_a_combined_dora_runs_in_peft(tmp_path):
    trees = adapters(variant="dora", rslora=False, detach_norm=True)
    trees = [{"dense": tree["dense"]} for tree in trees]
    combined, _ = lora_jax.combine(trees, [0.5, 0.5, -0.3], params=PARAMS)
    names = [lora_jax.peft.KeyMapping("dense/kernel", "dense.weight")]
    lora_jax.peft.save(tmp_path / "peft", PARAMS, combined, names=names)
    model = TorchModel()
    model.dense.weight.data = tensor(PARAMS["dense"]["kernel"].T)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    x = random_like(jnp.zeros((3, 6)), scale=1.0)
    expected = x @ lora_jax.lora_merge(PARAMS, combined)["dense"]["kernel"]
    assert relative_error(model(tensor(x)).detach().numpy(), expected) < 1e-5
