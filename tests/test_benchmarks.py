"""The benchmarks measure what they say; how long it takes is not tested."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lora_jax
from benchmarks import guard, operations, report, tpu, train_step
from benchmarks.contenders import mixed_products, ours, serving
from benchmarks.contenders.families import FAMILIES, TRAJECTORIES, check_losses, trained
from benchmarks.contenders.problems import PROBLEMS
from benchmarks.contenders.table import build
from benchmarks.contenders.training import make_step
from benchmarks.many.process import PeftProcess
from benchmarks.models import arrays, cases, data, linen
from benchmarks.models.cases import CASES
from benchmarks.running import files, stats, worker

ENVIRONMENT = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_bytes": 2**34,
    "python": "3.11",
    "packages": {"jax": "0.10.2"},
    "date": "2026-01-02T03:04:05",
}


def test_quartiles():
    assert stats.quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == {"low": 2, "median": 3, "high": 4}
    assert stats.quartiles([2.0]) == {"low": 2, "median": 2, "high": 2}


def test_ratio_is_of_medians_and_its_interval_of_pairs():
    got = stats.ratio([2.0, 4.0, 30.0], [1.0, 2.0, 10.0])
    assert got == {"low": 2, "median": 2, "high": 2.5}
    with pytest.raises(ValueError, match="zip"):
        stats.ratio([1.0], [1.0, 2.0])


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    files.write(path, {"a": [1.23456789, 1], "b": {"c": "text"}})
    assert files.read(path) == {"a": [1.23457, 1], "b": {"c": "text"}}
    with pytest.raises(TypeError):
        files.write(path, {"a": object()})
    assert files.read(path)["b"] == {"c": "text"}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert files.read(tmp_path / "none.json") == {}


SMALL = dataclasses.replace(CASES["tiny-decoder"], kv_heads=2, tied=True, dtype="bfloat16")


@pytest.mark.parametrize("case", [*CASES.values(), SMALL], ids=lambda case: case.name)
def test_shapes_are_those_of_the_models(case):
    ids, _ = data.batch(case)
    made = jax.eval_shape(linen.make(case).init, jax.random.key(0), ids)["params"]
    assert {k: v.shape for k, v in flatten_dict(made, sep="/").items()} == cases.shapes(case)
    assert all(cases.shapes(case)[f"{k}/kernel"] == v for k, v in cases.kernels(case).items())


def test_sweeps_make_cases():
    options = train_step.Options(cases=("minilm",), ranks=(4, 8), tokens=(64, 4096))
    got = {case.name: case for case in train_step.expand(options)}
    assert list(got) == [f"minilm rank={r} tokens={t}" for r in (4, 8) for t in (64, 4096)]
    assert [(case.rank, case.tokens) for case in got.values()] == [
        (4, 64),
        (4, 4096),
        (8, 64),
        (8, 4096),
    ]
    assert next(train_step.expand(train_step.Options(dtypes=("bfloat16",)))).dtype == "bfloat16"


def test_contenders_that_compute_something_else_are_found():
    right = {"floor": [1.0, 0.9], "full": [1.0, 0.5], "lora": [1.2, 1.1], "merge": [1.2, 1.1]}
    check_losses(right, 1e-4, exact=True)
    with pytest.raises(RuntimeError, match="full does not compute what floor does"):
        check_losses({**right, "full": [1.001, 0.5]}, 1e-4)
    with pytest.raises(RuntimeError, match="merge does not compute what lora does"):
        check_losses({**right, "merge": [1.2, 1.101]}, 1e-4, exact=True)
    with pytest.raises(RuntimeError, match="merge"):
        check_losses({**right, "merge": [float("nan")] * 2}, 1e-4)
    assert {name for group in TRAJECTORIES for name in group} <= set(FAMILIES)


def test_noise_is_the_same_wherever_it_is_made():
    noise = data.noise(SMALL, "a", (200, 300), std=2.0, mean=1.0)
    index = np.arange(60_000, dtype=np.int32).reshape(200, 300)
    expected = noise.integers(index).astype(np.float32) * np.float32(noise.step) + np.float32(1)
    array = arrays.array_of(noise, jnp.float32)
    np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)
    assert abs(np.mean(expected) - 1) < 0.03
    assert abs(np.std(expected) - 2) < 0.03
    other = arrays.array_of(data.noise(SMALL, "b", (200, 300), std=2.0), jnp.float32)
    assert abs(np.corrcoef(np.ravel(array), np.ravel(other))[0, 1]) < 0.02
    # What is stacked begins with what is alone.
    for path, alone in arrays.factors(SMALL, stack=(1,)).items():
        for one, of_three in zip(alone, arrays.factors(SMALL, stack=(3,))[path], strict=True):
            np.testing.assert_array_equal(one, of_three[:1])


def test_a_case_survives_its_text():
    case = dataclasses.replace(SMALL, adapted=("q", "v"))
    assert cases.Case.loads(case.dumps()) == case
    assert {path.split("/")[1] for path in cases.kernels(case)} == {"q", "v"}


@pytest.mark.parametrize("variant", [pytest.param("base", marks=pytest.mark.slow), "library"])
def test_what_serves_computes_what_the_model_does(variant):
    case = dataclasses.replace(SMALL, dtype="float32", batch=8, length=6, layers=1)
    model, params = linen.make(case), arrays.params(case)
    ids = jnp.asarray(data.batch(case)[0])
    adapters, call = (), jax.jit(model.apply)
    apply = serving.plain(model)
    if variant == "library":
        rules = ours.config(case, variant="dora")
        adapters = ours.adapters(case, rules, params, 8)
        call = jax.jit(
            lambda variables, ids: lora_jax.lora_apply(
                model, variables, adapters, ids, adapter_ids=jnp.arange(8)
            )
        )
        apply = serving.adapted(model)
    expected = call({"params": params}, ids)
    rows = jnp.arange(8)
    inputs = ids[:, :-1], serving.caches(case), 0
    logits, caches = apply(params, adapters, rows, inputs)
    np.testing.assert_allclose(logits, expected[:, -2], rtol=1e-4, atol=1e-5)
    inputs = ids[:, -1:], caches, case.length - 1
    logits, _ = apply(params, adapters, rows, inputs)
    np.testing.assert_allclose(logits, expected[:, -1], rtol=1e-4, atol=1e-5)


def test_ways_by_hand_agree():
    rng = np.random.default_rng(0)
    x, U, V = (rng.standard_normal(s, np.float32) for s in ((6, 3, 5), (4, 5, 2), (4, 2, 7)))
    ids = jnp.asarray([3, 0, 0, 2, 3, 3])
    expected = np.stack([x[b] @ U[i] @ V[i] for b, i in enumerate(ids)])
    for name, add in mixed_products.PRODUCTS.items():
        got = add(*map(jnp.asarray, (x, U, V)), ids)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def talk(contender, case, text):
    """What a worker answers."""
    answers = []
    worker.main(contender, case, io.StringIO(f"compile\n{text}"), answers.append)
    return json.loads(json.dumps(answers))


def test_two_contenders_agree_and_obey():
    case = dataclasses.replace(CASES["tiny-decoder"], layers=1, width=8, ff=8, vocab=16, length=4)
    commands = "step 2\nforward 1\nmerge 1\nfacts\nquit\nstep 1\n"
    lora, plain = (talk(name, case, commands) for name in ("lora", "lora-plain"))
    assert [len(answers) for answers in (lora, plain)] == [6, 6]
    assert lora[0]["built"] == "lora"
    losses = {"lora": lora[1]["losses"], "merge": plain[1]["losses"]}
    check_losses(losses, 1e-4, exact=True)
    assert len(lora[1]["losses"]) == 3
    np.testing.assert_allclose(lora[3]["value"], plain[3]["value"], rtol=1e-4)
    assert lora[3]["value"] < lora[2]["value"] < lora[1]["losses"][0]
    assert len(lora[2]["seconds"]) == 2
    assert plain[4] == {"missing": "merge"}
    assert lora[5]["facts"]["trained"] == trained(case, "lora")
    assert lora[5]["facts"]["temp_bytes"] > 0


def test_errors_are_answers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    (answer,) = talk("qwix", CASES["tiny"], "")
    assert answer["error"].startswith("not installed: ")
    monkeypatch.setattr(worker, "trained", lambda *_: -1)
    case = dataclasses.replace(CASES["tiny"], layers=1)
    (answer,) = talk("lora-plain", case, "")
    assert answer["error"] == f"ValueError: trains {trained(case, 'lora')} numbers, not -1"
    with pytest.raises(KeyError):
        build("nobody", case)


def test_a_process_of_peft_that_ended_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="--no-torch leaves PEFT out"):
        PeftProcess(CASES["tiny"], (1,))


def result(name):
    """A result as `train_step` writes it."""
    step = {"low": 0.9, "median": 1.0, "high": 1.1, "seconds": [1.0]}
    one = {
        "step": {**step, "to_floor": {"low": 1.2, "median": 1.25, "high": 1.3}},
        "losses": [1.0],
        "memory": {"peak_rss": 2**30},
        "facts": {"trained": 1234, "temp_bytes": 2**20},
    }
    return {
        "case": dataclasses.asdict(dataclasses.replace(CASES["tiny"], name=name)),
        "environment": ENVIRONMENT,
        "rounds": 2,
        "steps": 3,
        "together": 4,
        "contenders": {"floor": one, "lora": one, "qwix": {"error": "not installed: qwix"}},
        "pairs": {"full/lora": {"median": 1.5}},
    }


@pytest.mark.slow
def test_operations(tmp_path):
    out = tmp_path / "operations.json"
    operations.main(operations.Options(("tiny", "tiny-decoder"), rounds=1, out=out))
    results = files.read(out)
    assert set(results) == {"tiny", "tiny-decoder"}
    for name, result in results.items():
        layers = CASES[name].layers
        assert result["model"]["attention"]["count"] == layers
        assert result["model"]["product, 32 to 32"]["count"] == 4 * layers
        assert result["adapters"]["DoRA but its norm, 32 to 32"]["median"] > 0


def test_estimated_cycles_of_the_program_and_not_of_what_is_fused_in_it():
    line = 'fusion(), backend_config={"estimated_cycles":"%d"}\n'
    assert tpu.estimated_cycles(f"{line % 1}\nENTRY main {{\n{line % 20}{line % 300}}}") == 320


def test_report(tmp_path):
    options = report.Options(tmp_path / "results", tmp_path / "page.md", tmp_path / "page.png")
    files.write(
        options.results / "train_step.json",
        {name: result(name) for name in ("tiny", "tiny rank=4", "tiny rank=8")},
    )
    times = {"full": {"median": 0.5}, "lora": {"median": 1, "to_base": {"median": 2.0}}}
    once = {"what": "Traces.", "base": "full", "times": times, "environment": ENVIRONMENT}
    files.write(options.results / "overheads.json", {"Tracing": once})
    alone = {
        "case": dataclasses.asdict(CASES["tiny"]),
        "environment": ENVIRONMENT,
        "model": {"product, 2 to 3": {"count": 4, "median": 0.002, "torch": {"median": 0.001}}},
        "adapters": {"LoRA, 2 to 3": {"count": 4, "median": 0.003}},
    }
    files.write(options.results / "operations.json", {"tiny": alone})
    counts = dict.fromkeys(("flops", "bytes_accessed", "temp_bytes", "estimated_cycles"), 2e12)
    twice = {key: 2 * count for key, count in counts.items()}
    contenders = {"floor": counts, "lora": twice}
    counted = {"case": alone["case"], "environment": ENVIRONMENT, "contenders": contenders}
    files.write(options.results / "tpu.json", {"v5e:2x2": counted})
    options.page.write_text(f"# Mine\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    report.main(options)
    page = options.page.read_text()
    assert page.startswith("# Mine\n")
    assert page.endswith(f"{report.END}\n\nThe end.\n")
    assert "old" not in page
    assert "| **lora_jax, LoRA** | 1,000 | 1.25 (1.20 to 1.30) |" in page
    assert "| qwix | not installed |" in page
    assert "| `full/lora` | 1.50 |" in page
    assert "|  | rank=4 | rank=8 |" in page
    assert "| `lora` | 1,000 | 2.00 |" in page
    assert "| **all of it** |  | 8 | 4 | 2.00 |" in page
    assert "| LoRA | 3 | 12 |" in page
    assert "| **lora_jax, LoRA** | 4.00 | 2.000 | 3725.29 | 2.000 |" in page
    assert options.figure.stat().st_size > 1000
    report.main(options)
    assert options.page.read_text() == page


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_model_in_nnx_is_the_same_program(variant):
    case = dataclasses.replace(CASES["tiny-decoder"], layers=1)

    def counts(name):
        step = make_step(PROBLEMS[name](case), case)
        step.compile()
        return {name: step.facts[name] for name in guard.COUNTS}

    assert counts(f"{variant}-in-nnx") == counts(variant)
