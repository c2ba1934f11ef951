"""`lora-jax verify`: whether an adapter is complete, and of which base."""

import jax

import lora_jax


def test_verify(split, folders, call, tmp_path):
    code, out = call("verify", folders / "own", "--base", folders / "flax.safetensors")
    assert code == 0
    assert "is the base that it was trained on" in out
    assert call("verify", folders / "peft")[0] == 0
    other = jax.tree.map(lambda x: x + 1, split[0])
    lora_jax.export(tmp_path / "other.safetensors", other, {})
    code, out = call("verify", folders / "own", "--base", tmp_path / "other.safetensors")
    assert code == 1
    assert "has another 'a/kernel'" in out
    file = next((folders / "own").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    code, out = call("verify", folders / "own")
    assert code == 1
    assert "truncated" in out
