"""The command that measures on a GPU, rehearsed on a CPU."""

import argparse
import dataclasses
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.contenders import attention
from benchmarks.contenders.families import FAMILIES, check_losses, trained
from benchmarks.contenders.step import Step
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.contest import Contest
from benchmarks.gpu.memory import bytes_needed
from benchmarks.gpu.races import DEMO, LLAMA_1B, LLAMA_3B, heat, races, tiny_races
from benchmarks.gpu.run import Run
from benchmarks.models import cases
from benchmarks.models.cases import CASES
from benchmarks.reports import gpu as page
from benchmarks.running import files, profiler, worker

ROOT = Path(__file__).parent.parent
NAMES = [race.name for race in races()]
H100 = {"name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1", "memory_bytes": 81559 * 2**20}


def run(*args, **options):
    """The command in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.gpu", *args]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=1300, **options)


def results(folder):
    """Every file of a folder, by the name of its case."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {result["name"]: result for result in found}


def as_on_a_gpu(source, target):
    """Copies results, as if they were of a GPU."""
    for path in source.glob("*.json"):
        result = json.loads(path.read_text())
        result |= {"tiny": False, "device": {"platform": "gpu", "kind": "NVIDIA H100"} | H100}
        files.write(target / path.name, result)


@pytest.mark.slow
def test_all_cases_in_small_and_the_page_of_them(tmp_path):
    rehearsal = tmp_path / "rehearsal"
    process = run("--tiny", "--minutes", "20", env={**os.environ, "OUT": str(rehearsal)})
    assert process.returncode == 0, process.stdout + process.stderr
    found = results(rehearsal)
    assert list(found) == sorted(NAMES)
    has_torch = importlib.util.find_spec("torch") is not None
    for race in tiny_races():
        result = found[race.name]
        assert result["complete"]
        assert result["device"] == {"platform": "cpu", "kind": "cpu"}
        assert result["environment"]["packages"]["jax"] != "not installed"
        assert result["environment"]["commit"] != ""
        measured = [entry["contenders"] for entry in result["heats"]]
        assert [list(one) for one in measured] == [list(one.entries) for one in race.heats]
        for label, one in (pair for contenders in measured for pair in contenders.items()):
            if label == "lora-merged":
                assert "product='dense') is not possible" in one["left_out"]
            elif label == "qwix" and "left_out" in one:
                assert one["left_out"].startswith("not installed: ")
            elif label.startswith(("torch", "peft")) and not has_torch:
                assert one["left_out"] == "not installed: No module named 'torch'"
            else:
                for job in one["jobs"].values():
                    assert np.shape(job["seconds"]) == (2, 1)
                    assert np.shape(job["reference_seconds"]) == (2, 1)
                    assert job["low"] <= job["median"] <= job["high"]

    options = report.Options(tmp_path / "results", tmp_path / "page.md", tmp_path / "page.png")
    as_on_a_gpu(rehearsal, options.results)
    report.main(options)
    written = options.page.read_text()
    assert "No GPU was timed" not in written
    assert "### NVIDIA H100\n" in written
    for race in races():
        assert f"#### {race.title} (`{race.name}`)" in written
    assert "| **lora_jax, DoRA**, decode, 8 |" in written
    assert '- **lora_jax, LoRA, `product="dense"`**: ValueError: lora_apply(' in written
    assert (tmp_path / "gpu.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_measured_stays_when_it_is_killed(how, tmp_path):
    call = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path)]
    process = subprocess.Popen([*call, "--cases", "demo", "sweeps"], cwd=ROOT)
    until = time.monotonic() + 200
    while not list(tmp_path.glob("*demo.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(30) in (-signal.SIGKILL, 143)
    found = results(tmp_path)
    assert "demo" in found
    assert found["demo"]["heats"][0]["contenders"]["lora"]["jobs"]["step"]["median"] > 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_it_ends_in_time_and_says_what_is_not_done(tmp_path):
    begin = time.monotonic()
    process = run("--tiny", "--minutes", "0.2", "--out", str(tmp_path))
    assert time.monotonic() - begin < 30
    assert process.returncode == 0
    assert "Not done, or in part, for lack of time: --cases " in process.stdout
    assert process.stdout.strip().endswith("sweeps")
    for result in results(tmp_path).values():
        for one in result["heats"][0]["contenders"].values():
            assert one.keys() & {"jobs", "left_out"}
            refused = ("cut: ", "not installed: ", "ValueError: The rule of")
            assert one.get("left_out", "cut: ").startswith(refused)


@pytest.mark.slow
def test_kernels_on_request(tmp_path):
    args = ("--profile", "demo", "--contenders", "lora", "--tiny", "--out", str(tmp_path))
    process = run(*args)
    assert process.returncode == 0, process.stderr
    assert "demo, lora, step\n" in process.stdout
    (text,) = tmp_path.glob("*.txt")
    assert text.read_text() in process.stdout
    (result,) = results(tmp_path).values()
    rows = result["heats"][0]["contenders"]["lora"]["kernels"]["step"]
    assert len(rows) == 11
    assert rows[0]["seconds"] >= rows[9]["seconds"] > 0
    assert rows[-1]["seconds"] >= sum(row["seconds"] for row in rows[:-1]) * 0.999


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    class Here:
        ready = {  # noqa: RUF012
            "facts": {"device": {"platform": "cpu", "kind": "cpu"}, "errors": {}},
            "jobs": ["xla"],
        }

        def compile(self, deadline):
            pass

        def ask(self, line, deadline):
            return {"seconds": [1.0]}

        def stop(self):
            pass

    monkeypatch.setattr(Run, "worker", lambda *_: Here())
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "jax computes on a cpu, not on a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cases", "nothing"], "invalid choice: 'nothing'"),
        (["--contenders", "nobody"], "there is no 'nobody' among dora, "),
        (["--minutes", "0"], "must be positive"),
        (["--rounds", "-1"], "must be positive"),
        (["--profile"], "expected at least one argument"),
    ],
)
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.arguments(args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_page_without_a_gpu(tmp_path):
    assert page.read(tmp_path) == []
    assert page.section([], "gpu.png").startswith("**No GPU was timed.**")
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    timed = list((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    assert ("No GPU was timed" in written) == (not timed)


@pytest.mark.parametrize("change", [{"tiny": True}, {"device": {"platform": "cpu", "kind": "cpu"}}])
def test_page_refuses_what_no_gpu_measured(change, tmp_path):
    result = {"tiny": False, "device": {"platform": "gpu", "kind": "H100"}} | change
    files.write(tmp_path / "gpu-decoder.json", result)
    with pytest.raises(ValueError, match=r"gpu-decoder\.json was not measured on a GPU"):
        page.read(tmp_path)


def contest(entries, gpu=H100, **chosen):
    """A contest that nobody has begun."""
    options = argparse.Namespace(contenders=None, tiny=False, profile=None, rounds=1, steps=1)
    here = Run(options, time.monotonic() + 60, gpu, Path(), attention={"chosen": "cudnn"}, **chosen)
    return Contest(here, entries, {}, lambda: None)


def test_groups_fit_into_the_memory_beside_the_reference():
    flash = dataclasses.replace(LLAMA_1B, attention="cudnn")
    entries = heat(LLAMA_1B, ("floor", "lora", "dora", "full", "lora-plain", "dora-detached"))
    groups = contest(entries).groups()
    assert [label for group in groups for label in group] == list(entries.entries)[1:]
    for group in groups:
        sizes = [bytes_needed(name, flash) for name in ("floor", *group)]
        assert sum(sizes) < 0.93 * H100["memory_bytes"]
    assert len(groups) == 3
    # Where nothing else fits, each has the reference only.
    alone = contest(entries, {"memory_bytes": 2**30}).groups()
    assert alone == [[label] for group in groups for label in group]
    # Without a GPU there is one group.
    assert len(contest(entries, {}).groups()) == 1


# GiB of temporary memory and arguments, by the compiler of an H100.
COMPILED = {
    ("floor", "xla", 4): 20.1,
    ("lora", "xla", 4): 23.0,
    ("dora", "xla", 4): 24.9,
    ("full", "xla", 4): 26.5,
    ("floor", "cudnn", 4): 8.4,
    ("lora", "cudnn", 4): 11.4,
    ("full", "cudnn", 4): 14.5,
    ("floor", "cudnn", 16): 27.6,
    ("lora", "cudnn", 16): 38.3,
}


@pytest.mark.parametrize("compiled", COMPILED, ids=str)
def test_memory_is_estimated_with_room(compiled):
    contender, attention, batch = compiled
    case = dataclasses.replace(LLAMA_1B, attention=attention, batch=batch)
    needed = bytes_needed(contender, case) / 2**30
    # What XLA tries out when it compiles stays in pieces, of the logits' size.
    tried = 2 * 4 * case.tokens * case.vocab / 2**30
    assert 1.1 * COMPILED[compiled] + tried < needed < 1.4 * COMPILED[compiled] + 1 + tried


@pytest.mark.parametrize("contender", FAMILIES)
def test_memory_of_every_contender_is_estimated(contender):
    assert 2**30 < bytes_needed(contender, LLAMA_1B) < 70 * 2**30


@pytest.mark.slow
def test_as_where_there_is_a_gpu(tmp_path):
    """All but the GPU: the variables, the groups, what the results say of it."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.159.04, 81559, 1980, 700.00'\n")
    smi.chmod(0o755)
    path = f"{smi.parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    env["XLA_CLIENT_MEM_FRACTION"] = "0.5"  # which must not be in the way
    args = ("--tiny", "--cases", "demo", "--rounds", "1", "--out", str(tmp_path))
    process = run(*args, env=env)
    assert process.returncode == 0, process.stdout + process.stderr
    (result,) = results(tmp_path).values()
    assert result["device"]["driver_version"] == "580.159.04"
    assert result["device"]["memory_bytes"] == 81559 * 2**20
    assert result["complete"]


def test_attention_of_32_bits_is_not_that_of_cudnn():
    here = contest(heat(DEMO, ("floor", "lora")))
    assert here._entries["lora"][1].attention == "xla"
    here = contest(heat(LLAMA_1B, ("floor", "lora")))
    assert here._entries["lora"][1].attention == "cudnn"


def test_many_adapters_are_checked_beside_a_merged_model():
    losses = {"serve-merged": [49.0], "serve-lora": [49.0, 50.0], "serve-gather": [49.0, 49.5]}
    with pytest.raises(RuntimeError, match="serve-gather does not compute what serve-lora does"):
        check_losses(losses, 2e-3)
    check_losses(losses | {"serve-gather": [49.0, 50.01]}, 2e-3)


def test_sizes_of_the_models():
    def count(case):
        return sum(int(np.prod(shape)) for shape in cases.shapes(case).values())

    assert count(LLAMA_1B) == 1_235_814_400
    assert count(LLAMA_3B) == 3_212_749_824
    # PEFT: trainable params of rank 32 on q_proj and v_proj.
    assert trained(LLAMA_3B, "lora") == 9_175_040


class Ready:
    """A worker that computed something."""

    def __init__(self, *losses):
        self.stopped = False
        self.ready = {
            "losses": list(losses),
            "facts": {"build_seconds": 1.0, "first_seconds": 1.0},
        }

    def stop(self):
        self.stopped = True

    def written(self):
        return "its last words"


def test_who_computes_something_else_is_not_timed():
    entries = heat(LLAMA_1B, ("floor", "lora", "lora-plain", "dora"))
    here = contest(entries)
    here._running = {
        "floor": Ready(11.5),
        "lora": Ready(11.8),
        "lora-plain": Ready(11.83),
        "dora": Ready(11.9),
    }
    wrong = here._running["lora-plain"]
    for label in list(here._running):
        here.check(label)
    assert list(here._running) == ["floor", "lora", "dora"]
    assert wrong.stopped
    assert "lora-plain does not compute what lora does" in here._results["lora-plain"]["error"]
    (failed,) = here._run.failed
    assert failed.startswith("lora-plain: lora-plain does not compute")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("not installed: No module named 'qwix'", "left_out"),
        ("cut: there was no time left", "left_out"),
        ("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory", "error"),
        ("died with exit status -9: Killed", "error"),
    ],
)
def test_what_is_missing_is_no_failure(error, kind):
    here = contest(heat(LLAMA_1B, ("floor", "qwix")))
    here.drop("qwix", error)
    assert here._results["qwix"][kind] == error
    assert bool(here._run.failed) == (kind == "error")


def test_what_was_measured_before_is_kept():
    here = contest(heat(LLAMA_1B, ("floor", "lora")))
    here._results["floor"] = {"jobs": {"step": {"median": 1.0}}}
    here._running["floor"] = Ready(1.0)
    here.drop("floor", "died with exit status -9: Killed")
    assert here._results["floor"] == {
        "jobs": {"step": {"median": 1.0}},
        "log": "its last words",
    }
    assert not here._running
    assert here._run.failed == ["floor: died with exit status -9: Killed"]


@pytest.mark.parametrize("contender", ["peft-lora", "torch-full"])
def test_pytorch_is_not_profiled_by_jax(contender):
    here = contest(heat(LLAMA_1B, ("lora", contender)))
    here.profile(contender, Ready(1.0))
    assert here._results[contender]["left_out"].startswith("not profiled: ")


def test_kernels_of_a_job_whose_name_has_a_space(monkeypatch):
    lines, answers = io.StringIO("profile decode, 8\ndecode, 8 2\n"), []
    monkeypatch.setattr(profiler, "most_expensive", lambda job: [job()])
    worker.obey(Step({"decode, 8": lambda: 3.0}, {}), lines, answers.append)
    assert answers[0] == {"kernels": [3.0]}
    assert len(answers[1]["seconds"]) == 2


def test_attention_that_is_not_there_is_left_out():
    step = attention.make(dataclasses.replace(CASES["tiny-decoder"], layers=1))
    assert list(step.jobs) == ["xla"]
    assert np.isfinite(step.jobs["xla"]())
    assert "cudnn" in step.facts["errors"]


def test_kernels_of_a_gpu_are_those_of_its_streams():
    def line(name, *events):
        found = [argparse.Namespace(name=n, duration_ns=t) for n, t in events]
        return argparse.Namespace(name=name, events=found)

    host = argparse.Namespace(name="/host:CPU", lines=[line("tf_XLA", ("add", 1.0))])
    device = argparse.Namespace(
        name="/device:GPU:0",
        lines=[line("Stream #14", ("gemm", 5.0), ("copy", 2.0)), line("XLA Ops", ("dot.1", 5.0))],
    )
    assert list(profiler.events(argparse.Namespace(planes=[host]))) == [("add", 1.0)]
    both = argparse.Namespace(planes=[host, device])
    assert list(profiler.events(both)) == [("gemm", 5.0), ("copy", 2.0)]
