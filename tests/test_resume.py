"""A training that was killed and goes on ends as one that was not, bit for bit."""

import functools
import json
import os
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

import lora_jax
from examples import classifier, classify, data, finetune, minilm
from examples.checkpoint import CannotResume, Checkpoints, Log
from lora_jax.files._read_folder import read

# The embeddings are nearly all of it, so that a checkpoint with the base would be large.
CONFIG = minilm.Config(vocabulary=20_000, layers=1, width=12, heads=3, hidden=20, positions=8)
MODEL = minilm.Classifier(CONFIG, 2)
OPTIONS = finetune.Options(epochs=2, batch=2, rank=2, length=4)
WAYS = finetune.methods(OPTIONS.rank, OPTIONS.alpha)
STEPS = 20


def texts(count, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, CONFIG.vocabulary, (count, OPTIONS.length)).astype(np.int32)
    return tokens, np.ones_like(tokens), rng.integers(0, 2, count).astype(np.int32)


@functools.cache
def encoder():
    return minilm.Encoder(CONFIG).init(jax.random.key(7), *texts(2, 0)[:2])["params"]


@functools.cache
def base():
    return classifier.make("linen", CONFIG, 2, encoder(), seed=0)[1]


def opened(folder, every=1, **changes):
    fixed = {name: value for name, value in vars(OPTIONS).items() if name not in finetune.FREE}
    return Checkpoints(folder, every, STEPS, fixed | changes)


def train(way, checkpoints=None, on_step=lambda step, state: None):
    sets = texts(STEPS, 1), texts(6, 2)
    return finetune.train(MODEL, base(), WAYS[way], *sets, OPTIONS, 0, on_step, checkpoints)


class Killed(Exception):
    pass


def killed_after(last):
    def on_step(step, state):
        if step == last:
            raise Killed

    return on_step


def final(folder):
    """All arrays of the last checkpoint, and what else it says that does not depend on time."""
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == STEPS
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(), said=ocp.args.JsonRestore())
        found = manager.restore(STEPS, args=items)
    log = {name: values for name, values in found.said["log"].items() if name != "seconds"}
    assert len(log["losses"]) == STEPS
    return found.arrays, log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A training's outcome and the folder of its only checkpoint, each way once."""

    @functools.cache
    def run(way):
        folder = tmp_path_factory.mktemp("uninterrupted") / way
        with opened(folder, every=STEPS) as checkpoints:
            return train(way, checkpoints), folder

    return run


def check_same(run, expected):
    chex.assert_trees_all_equal(run.adapters, expected.adapters)
    assert np.array_equal(run.correct, expected.correct)
    assert run.log.losses == expected.log.losses
    assert run.log.curve == expected.log.curve


# With a checkpoint after every third step and the last one. The second epoch begins after step 10.
@pytest.mark.parametrize(
    ("way", "kills", "goes_on_from"),
    [
        ("lora", [2], 1),  # the first step has a checkpoint too
        pytest.param("lora", [10], 9, marks=pytest.mark.slow),
        pytest.param("lora", [20], 20, marks=pytest.mark.slow),
        ("dora", [4, 5, 11, 16], 15),
    ],
)
def test_goes_on_bit_for_bit(uninterrupted, tmp_path, way, kills, goes_on_from):
    for step in kills:
        with opened(tmp_path, every=3) as checkpoints, pytest.raises(Killed):
            train(way, checkpoints, killed_after(step))
    reported = []
    with opened(tmp_path, every=3) as checkpoints:
        run = train(way, checkpoints, lambda step, state: reported.append(step))
    assert reported == list(range(goes_on_from, STEPS + 1))
    expected, folder = uninterrupted(way)
    check_same(run, expected)
    chex.assert_trees_all_equal(final(tmp_path), final(folder))


def test_checkpoints_change_nothing(uninterrupted):
    check_same(train("lora"), uninterrupted("lora")[0])


@pytest.mark.parametrize("way", ["lora", "dora"])
def test_the_base_is_not_in_a_checkpoint(uninterrupted, way):
    run, folder = uninterrupted(way)
    with ocp.CheckpointManager(folder) as manager:
        manager.restore(STEPS, args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
        saved = ocp.tree.to_flat_dict(manager.item_metadata(STEPS).arrays.tree)
    shapes = [leaf.shape for leaf in saved.values() if leaf is not None]
    trained = [leaf.shape for leaf in jax.tree.leaves(run.adapters)]
    # Two moments of each in AdamW; its count, that of its schedule, the step; the key's data.
    assert sorted(shapes) == sorted([*trained * 3, (), (), (), (2,)])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < sum(leaf.nbytes for leaf in jax.tree.leaves(run.frozen)) / 4


def state_of(way):
    _, adapters = lora_jax.lora_init(jax.random.key(0), base(), WAYS[way].config)
    tx = finetune.optimizer(WAYS[way].learning_rate, STEPS)
    return TrainState.create(apply_fn=MODEL.apply, params=adapters, tx=tx)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """A disk that is so slow that the next steps are done, and their buffers used, before it."""
    begun, go, mkdir = threading.Event(), threading.Event(), os.mkdir

    def slow(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go.wait(60)
        mkdir(*args, **kwargs)

    frozen, _ = lora_jax.lora_init(jax.random.key(0), base(), WAYS["dora"].config)
    state, key, log = state_of("dora"), jax.random.key(5), Log()
    batch = texts(OPTIONS.batch, 1)
    state, loss = finetune.train_step(MODEL, state, frozen, batch, key)
    log.losses.append(float(loss))
    before = jax.tree.map(np.array, (state.params, state.opt_state, state.step))

    with opened(tmp_path) as checkpoints:
        monkeypatch.setattr(os, "mkdir", slow)
        checkpoints.save(1, state, key, log)
        assert begun.wait(60)
        for _ in range(3):
            state, loss = finetune.train_step(MODEL, state, frozen, batch, key)  # donates the state
            log.losses.append(float(loss))
        assert not (tmp_path / "1").exists()
        go.set()
    with opened(tmp_path) as checkpoints:
        saved, saved_key, saved_log = checkpoints.restore(state_of("dora"), jax.random.key(0))
    chex.assert_trees_all_equal((saved.params, saved.opt_state, saved.step), before)
    assert saved.opt_state[1][0].count + 3 == state.opt_state[1][0].count
    assert saved_key == key
    assert saved_log == Log(losses=log.losses[:1])


def test_other_options_are_refused(tmp_path):
    state, key = state_of("lora"), jax.random.key(0)
    with opened(tmp_path, task="r8", rank=8) as checkpoints:
        assert checkpoints.restore(state, key) == (state, key, Log())  # a new training
        checkpoints.save(1, state, key, Log())
    message = r"other options: rank was 8 and is 2; task was 'r8' and is 'reviews'\. Use the same"
    with opened(tmp_path) as checkpoints, pytest.raises(CannotResume, match=message) as caught:
        checkpoints.restore(state, key)
    assert str(tmp_path) in str(caught.value)
    with opened(tmp_path, task="r8", rank=8) as checkpoints:
        assert checkpoints.restore(state, key)[2] == Log()


def test_all_but_free_options_are_compared():
    """A new option of the demo has to be thought of: is a training another one by it?"""
    fixed = {"task", "api", "base", "quick", "train", "epochs", "length", "batch", "rank", "alpha"}
    assert set(vars(OPTIONS)) - finetune.FREE == fixed


# --- the demo ---


@pytest.fixture
def demo(monkeypatch):
    """The demo on a small model and texts that are numbers, and how many steps it takes."""
    sets = {"train": texts(STEPS, 1), "test": texts(6, 2)}

    def task():
        fields = {"name": "numbers", "classes": ("even", "odd")}
        for name, (tokens, _, labels) in sets.items():
            fields[f"{name}_texts"] = tuple(f"{name} {i}" for i in range(len(tokens)))
            fields[f"{name}_labels"] = labels
        return data.Task(**fields)

    def tokens(name):
        if name in classify.SENTENCES:
            return sets["test"][0][classify.SENTENCES.index(name)]
        which, i = name.split()
        return sets[which][0][int(i)]

    def tokenize(names, length):
        rows = np.stack([tokens(name) for name in names])
        return rows, np.ones_like(rows)

    monkeypatch.setattr(data, "movie_reviews", task)
    monkeypatch.setattr(minilm, "load_pretrained", lambda: (CONFIG, encoder()))
    monkeypatch.setattr(minilm, "tokenize", tokenize)
    counts = {"left": 10**6, "done": 0}

    def step(*args, real=finetune.train_step):
        if not counts["left"]:
            raise Killed
        counts["left"] -= 1
        counts["done"] += 1
        return real(*args)

    step.lower = finetune.train_step.lower
    monkeypatch.setattr(finetune, "train_step", step)
    return counts


def run_demo(folder, **changes):
    finetune.main(finetune.Options(**(vars(OPTIONS) | {"out": folder, "seeds": 2} | changes)))


def outcome(folder):
    adapters = {way: read(folder / way).adapters for way in WAYS}
    return adapters, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_demo(demo, tmp_path, capsys):
    run_demo(tmp_path / "a")
    assert demo["done"] == 2 * 4 * STEPS
    assert not (tmp_path / "a" / "checkpoints").exists()
    for left in (7, 30, 0, 75):  # in the head's training, in LoRA's, ...
        demo["left"] = left
        with pytest.raises(Killed):
            run_demo(tmp_path / "b", resume=True, save_every=4)
    demo |= {"left": 10**6, "done": 0}
    run_demo(tmp_path / "b", resume=True, save_every=4)
    assert 0 < demo["done"] <= 2 * 4 * STEPS - 7 - 30 - 75 + 4 * 4
    chex.assert_trees_all_equal(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
    assert read(tmp_path / "b" / "dora").metadata["rank"] == OPTIONS.rank

    demo["left"] = 0  # all is finished: not a step more
    run_demo(tmp_path / "b", resume=True)
    chex.assert_trees_all_equal(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
    printed = capsys.readouterr().out
    sizes = {way: finetune.nbytes(tmp_path / "b" / way) for way in WAYS}
    assert all(f"{size:,}" in printed for size in sizes.values())
    held = [runs[0]["step_bytes"] for runs in outcome(tmp_path / "b")[1].values()]
    assert held == sorted(held)  # head alone, LoRA, DoRA, full
    assert all(sentence[:12] in printed for sentence in classify.SENTENCES)

    with pytest.raises(CannotResume, match="rank was 2 and is 1"):
        run_demo(tmp_path / "b", resume=True, rank=1)
    with pytest.raises(CannotResume, match=r"has checkpoints already.*--resume"):
        run_demo(tmp_path / "b", save_every=4)


@pytest.mark.slow
def test_demo_of_a_model_in_nnx(demo, tmp_path, capsys):
    """Goes on as the other does, and its adapters classify."""
    run_demo(tmp_path / "a", api="nnx", seeds=1)
    demo["left"] = 50
    with pytest.raises(Killed):
        run_demo(tmp_path / "b", api="nnx", seeds=1, resume=True, save_every=4)
    demo["left"] = 10**6
    run_demo(tmp_path / "b", api="nnx", seeds=1, resume=True, save_every=4)
    chex.assert_trees_all_equal(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
    printed = capsys.readouterr().out
    assert printed.count("Loaded again: the same accuracy") == 4
    classify.main(classify.Options(runs=tmp_path / "a"))
    assert "LoRA" in capsys.readouterr().out


# --- kill -9 ---

TRAINER = """
import sys
from pathlib import Path
from test_resume import opened, train
for way in ("lora", "dora"):
    with opened(Path(sys.argv[1]) / way) as checkpoints:
        train(way, checkpoints, lambda step, state: print(step, flush=True))
print("done", flush=True)
sys.stdin.read()  # until it is killed, too
"""


@pytest.mark.slow
def test_kill_9(uninterrupted, tmp_path):
    """Killed many times at any moment, also while a checkpoint is written or deleted."""
    rng = np.random.default_rng(0)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    before = 0
    for lines in [*rng.integers(3, 10, 6), None]:  # of the trainer, until it is killed
        process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        first = int(process.stdout.readline())
        assert first > before or first == STEPS  # goes on, and does not begin anew
        before = first
        for count, line in enumerate(process.stdout, 2):
            if count == lines or line == "done\n":
                break
        time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None
        process.kill()
        process.communicate()
    assert line == "done\n"
    for way in ("lora", "dora"):
        chex.assert_trees_all_equal(final(tmp_path / way), final(uninterrupted(way)[1]))
