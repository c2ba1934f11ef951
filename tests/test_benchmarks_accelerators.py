"""What is counted of programs for accelerators; their compilers are not needed."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks import guard, mesh
from benchmarks.contenders.problems import PROBLEMS
from benchmarks.models.cases import CASES
from benchmarks.models.sharded import ScannedDecoder
from benchmarks.reports import mesh as mesh_report
from benchmarks.running import accelerators, compilers, files, hlo

PROGRAM = """\
HloModule step

%fused (param_0: bf16[64,32]) -> f32[64,32] {
  %param_0 = bf16[64,32]{1,0} parameter(0)
  ROOT %convert.1 = f32[64,32]{1,0} convert(%param_0)
}

%test (arg: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %arg = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (arg.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%arg.1), index=1
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %all-reduce.1)
}

ENTRY %main (W: bf16[64,32], x: f32[8,4]) -> f32[64,32] {
  %W = bf16[64,32]{1,0} parameter(0)
  %near = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy(%W)
  %wide = f32[64,32]{1,0:T(8,128)} fusion(%W), kind=kLoop, calls=%fused
  %gather = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%x), channel_id=2
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%test, body=%body
  ROOT %joined = bf16[64,40]{1,0} concatenate(%W, %U), dimensions={1}
}
"""


def test_what_is_written():
    """By itself in main memory: not what is inside of a fusion, or brought near."""

    def is_kernel(array):
        return array.shape in ((64, 32), (64, 40))

    assert hlo.written(PROGRAM, is_kernel) == 64 * 32 * 4 + 64 * 40 * 2


@pytest.mark.parametrize("known", ["", ', backend_config={"known_trip_count":{"n":"3"}}'])
def test_what_is_sent(known):
    """What is in a loop as often as it runs: as XLA says, or by its test."""
    program = PROGRAM.replace("body=%body", f"body=%body{known}")
    assert hlo.sent(program) == (3 if known else 5) * 8 * 4 * 4 + 8 * 4 * 4


def test_what_is_written_of_a_real_program():
    def step(W, x):
        return jnp.sort(W.astype(jnp.float32), axis=0), x + 1

    args = jnp.ones((64, 32), jnp.bfloat16), jnp.ones(3)
    text = jax.jit(step).lower(*args).compile().as_text()
    assert hlo.written(text, lambda array: array.shape == (64, 32)) >= 64 * 32 * 4
    assert hlo.written(text, lambda array: array.shape == (64, 33)) == 0
    assert hlo.sent(text) == 0


def test_an_abstract_problem_is_the_problem_without_arrays():
    case = CASES["tiny-decoder"]
    got, expected = accelerators.abstract_problem("dora", case), PROBLEMS["dora"](case)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes((got.trained, got.frozen)) == shapes((expected.trained, expected.frozen))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got.frozen))


def test_only_the_base_is_sharded_by_hand():
    case = CASES["tiny-decoder"]
    ids = jnp.ones((1, 4), jnp.int32)
    model = ScannedDecoder(case, lambda x: x)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), ids)["params"])
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    where = accelerators.by_hand(params, mesh)
    params = accelerators.placed(params, where)
    adapters, _ = accelerators._trained("dora", case, model, params)
    trees = where["layers"], accelerators._where("dora", adapters, params, mesh)["layers"]
    specs = {
        jax.tree_util.keystr(path): leaf.spec
        for tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    ends = {
        "['q']['kernel']": P(None, "data", "model"),
        "['q']['kernel'].U": P(None, "data", None),
        "['q']['kernel'].V": P(None, None, "model"),
        "['q']['kernel'].m": P(None, "model"),
        "['down']['kernel']": P(None, "model", "data"),
        "['down']['kernel'].U": P(None, "model", None),
        "['down']['kernel'].m": P(None, "data"),
        "['norm_1']['scale']": P(),
    }
    assert {end: specs[end] for end in ends} == ends


def test_the_guard_says_what_it_could_not_count(monkeypatch, capsys):
    monkeypatch.setattr(compilers, "has", lambda _: False)
    monkeypatch.setattr(guard, "GUARDED", ())
    monkeypatch.setattr(guard, "traces", lambda: 1)
    assert guard.count(guard.Options()) == {"costs": {}, "traces": 1}
    assert "there is no compiler for h100" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no compiler for v5e:4x4, which --meshes needs: install"):
        guard.count(guard.Options(meshes=("model",)))


def test_the_guard_counts_copies_beyond_the_floor(monkeypatch):
    costs = {"flops": 2.0, "bytes_accessed": None, "temp_bytes": 4.0}
    kernels = {"floor": 2**20, "lora": 2**20, "dora": 3 * 2**20}

    def count(name, case, accelerator):
        return costs | {"kernel_bytes": kernels[name]}

    monkeypatch.setattr(guard, "on_one_device", count)
    got = guard.counted_for("h100")
    assert got["lora"] == {"flops": 1.0, "temp_bytes": 1.0, "copied_MiB": 0.0}
    assert got["dora"]["copied_MiB"] == 2.0
    found = guard.grown(
        {"costs": {"h100": {"dora": {"copied_MiB": 0.0}}}},
        {"costs": {"h100": {"dora": {"copied_MiB": 2.0}}}, "traces": 1},
    )
    assert len(found) == 1


def test_what_is_in_a_loop_is_counted_as_often_as_it_runs(monkeypatch):
    """XLA counts a loop's body once; with two layers in it there is one more."""
    case = dataclasses.replace(CASES["tiny-decoder"], layers=7)

    def count(*_, unroll=1):
        return {"flops": 5.0 + 3.0 * unroll, "bytes_accessed": 1.0}

    monkeypatch.setattr(accelerators, "on_a_mesh", count)
    found = accelerators.of_all_layers(count(), case, "lora", "cpu", "one")
    assert found == {"flops": 5.0 + 3.0 * 7, "bytes_accessed": 1.0}


def test_a_mesh_is_counted_and_shown(monkeypatch, tmp_path):
    def count(name, case, topology, layout):
        if name == "qwix":
            raise ImportError("no module")
        return dict.fromkeys((*mesh.COUNTS, "flops"), 2.0)

    monkeypatch.setattr(mesh, "on_a_mesh", count)
    out = tmp_path / "mesh.json"
    mesh.main(mesh.Options(layouts=("data",), contenders=("lora", "qwix"), layers=7, out=out))
    results = files.read(out)
    found = results["v5e:4x4, data"]["contenders"]
    assert found["lora"]["held_bytes"] == 4.0
    assert "not installed" in found["qwix"]["error"]
    assert "| qwix |  |" in mesh_report.section(results)
