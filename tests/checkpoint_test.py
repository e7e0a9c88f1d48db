import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swe_prune.checkpoint import Checkpoints
from swe_prune.errors import InputError, RunError

TREE = {
    "w": jnp.arange(6.0).reshape(2, 3),
    "half": jnp.ones(3, jnp.bfloat16),
    "mask": jnp.array([True, False]),
    "dense": None,
    "step": jnp.int32(7),
    "rng": jax.random.key(3),
}


def stored(folder, steps=(1, 2)):
    store = Checkpoints(folder)
    for step in steps:
        store.save(step, TREE, {"position": step})
    store.close()
    return Checkpoints(folder)


def test_everything_comes_back_with_its_dtype(tmp_path):
    like = jax.eval_shape(lambda: TREE)
    tree, extra = stored(tmp_path).restore(like)
    assert extra == {"position": 2}
    assert tree["dense"] is None
    for name in ("w", "half", "mask", "step"):
        assert tree[name].dtype == TREE[name].dtype
        np.testing.assert_array_equal(tree[name], TREE[name])
    np.testing.assert_array_equal(
        jax.random.normal(tree["rng"], (4,)), jax.random.normal(TREE["rng"], (4,))
    )


def test_arrays_may_be_given_up_as_soon_as_save_returns(tmp_path):
    store = Checkpoints(tmp_path)
    values = {"w": jax.random.normal(jax.random.key(0), (300, 1000))}
    expected = jax.device_get(jax.tree.map(jnp.copy, values))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    store.save(1, values, {})
    for _ in range(20):
        values = overwrite(values)
    restored, _ = store.restore(values)
    np.testing.assert_array_equal(restored["w"], expected["w"])


def test_only_the_latest_are_kept(tmp_path):
    store = stored(tmp_path, steps=(1, 2, 3, 4))
    assert store.latest() == 4
    assert store.restore(TREE, 3)[1] == {"position": 3}
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "4"]


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_file_of_holes_is_not_read_to_its_end(tmp_path):
    store = stored(tmp_path)
    with open(largest_file(tmp_path / "2"), "r+b") as file:
        file.truncate(1 << 36)
    with pytest.raises(InputError, match=r"is damaged: .* is nearly all holes"):
        store.restore(TREE, 2)


def test_a_flipped_bit_is_found(tmp_path):
    store = stored(tmp_path)
    file = largest_file(tmp_path / "2")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint 2 .* is damaged.*starts from the newest"):
        store.restore(TREE, 2)
    assert store.restore(TREE, 1)[1] == {"position": 1}
    with pytest.warns(UserWarning, match=r"checkpoint 2 .* damaged.* writing; continuing from 1"):
        assert store.restore(TREE)[1] == {"position": 1}
    assert store.latest() == 1
    assert (tmp_path / "damaged_2").is_dir()
    store.save(2, TREE, {"position": "again"})
    store.wait()
    assert store.restore(TREE)[1] == {"position": "again"}


def test_when_all_are_damaged_none_is_trusted(tmp_path):
    store = stored(tmp_path)
    for step in ("1", "2"):
        file = largest_file(tmp_path / step)
        file.write_bytes(file.read_bytes()[:-1])
    with (
        pytest.warns(UserWarning, match="continuing from 1"),
        pytest.raises(
            InputError, match=r"checkpoint 1 .* is damaged.*run the command that made it"
        ),
    ):
        store.restore(TREE)
    assert store.latest() is None  # the same command starts again


def test_those_of_every_so_many_steps_stay_too(tmp_path):
    store = Checkpoints(tmp_path, keep=1, keep_every=3)
    for step in range(1, 9):
        store.save(step, TREE, {})
    store.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["3", "6", "8"]


def test_a_missing_file_is_found(tmp_path):
    store = stored(tmp_path)
    largest_file(tmp_path / "2").unlink()
    with pytest.raises(InputError, match="is missing"):
        store.restore(TREE, 2)


@pytest.mark.parametrize("content", ['["x"]', "{}", '{"init_timestamp_nsecs": "x"}', None])
def test_metadata_that_orbax_cannot_read_are_as_any_other_damage(tmp_path, content):
    stored(tmp_path).close()
    file = tmp_path / "2/_CHECKPOINT_METADATA"
    if content is None:
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_text(content)
    with pytest.raises(InputError, match=r"checkpoint 2 .* is damaged: _CHECKPOINT_METADATA"):
        Checkpoints(tmp_path, reading=True)
    with pytest.warns(UserWarning, match="checkpoint 2 .* is damaged.*continuing without it"):
        assert Checkpoints(tmp_path).restore(TREE)[1] == {"position": 1}


@pytest.mark.parametrize("content", ["3", '["x"]', "null", '{"x": 3}', None])
def test_checksums_of_another_kind_are_damaged(tmp_path, content):
    store = stored(tmp_path)
    file = tmp_path / "2.checksums"
    file.unlink()
    os.mkfifo(file) if content is None else file.write_text(content)
    with pytest.raises(InputError, match=r"checkpoint 2 .* is damaged"):
        store.restore(TREE, 2)
    os.mkfifo(tmp_path / "1/pipe")
    assert store.restore(TREE, 1)[1] == {"position": 1}


def test_a_save_that_a_kill_cut_short_is_as_if_it_never_was(tmp_path):
    stored(tmp_path).close()
    (tmp_path / "2.checksums").unlink()
    with pytest.warns(UserWarning, match="checkpoint 2 .* is incomplete; continuing from the one"):
        store = Checkpoints(tmp_path)
    assert store.latest() == 1
    assert store.restore(TREE)[1] == {"position": 1}


def test_another_model_is_refused_by_name(tmp_path):
    store = stored(tmp_path)
    with pytest.raises(InputError, match=r"'w' is float32\[2, 3\] and should be float32\[5, 5\]"):
        store.restore(TREE | {"w": jnp.zeros((5, 5))})
    with pytest.raises(InputError, match="'other' is not in it"):
        store.restore({"other": jnp.zeros(2)})
    with pytest.raises(InputError, match="should be absent"):
        store.restore({"w": TREE["w"]})


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        Checkpoints(tmp_path).restore(TREE)


def test_a_disk_that_takes_no_more_is_said_and_the_earlier_one_is_kept(tmp_path):
    resource = pytest.importorskip("resource")
    store = stored(tmp_path, steps=(1,))
    big = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        store.save(2, big, {})
        with pytest.raises(RunError, match=r"checkpoint 2 .* cannot be written.*kept"):
            store.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(tmp_path).restore(TREE)[1] == {"position": 1}


def test_writes_after_one_that_failed_say_nothing():
    code = """if True:
        from swe_prune import checkpoint
        checkpoint._quiet_loops()
        async def _create_paths(): pass
        _create_paths()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
