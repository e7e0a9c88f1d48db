"""Masks and statistics survive: with their settings, in any of the usual files."""

import dataclasses

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import swe_prune
from swe_prune import importance, masks, trajectory, tree
from swe_prune.errors import InputError

W = jnp.sin(jnp.arange(48.0)).reshape(8, 6)
PARAMS = {"up": {"kernel": W, "bias": jnp.ones(6)}, "layers": [{"kernel": W[::-1]}, {"kernel": -W}]}
SETTINGS = {"power": 0.3, "window_start": 2, "vote_rate": 1.5}
MEASURES = ("late_mean", "votes", "variance")


def tracked(params=PARAMS, compensated=True):
    stats = trajectory.init(params, MEASURES, compensated=compensated, **SETTINGS)
    for t in range(3):
        stats = trajectory.update(stats, jax.tree.map(lambda x, t=t: x * (1 + t), params))
    return stats


def assert_same(a, b):
    a, b = (dict(tree.named_leaves(one)) for one in (a, b))
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        assert (leaf is None) == (b[name] is None), name
        if leaf is not None:
            assert leaf.dtype == b[name].dtype
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[name]), err_msg=name)


def test_one_file_holds_masks_and_statistics_to_the_bit(tmp_path):
    stats = tracked()
    mask = masks.by_sparsity(importance.score("magnitude", PARAMS), 0.5)
    path = tmp_path / "state.safetensors"
    swe_prune.save(path, masks=mask, stats=stats)
    found = swe_prune.load(path)
    assert jax.tree.structure(found.masks) == jax.tree.structure(mask)
    assert_same(found.masks, mask)
    assert jax.tree.structure(found.stats) == jax.tree.structure(stats)
    assert_same(found.stats, stats)
    assert_same(trajectory.update(found.stats, PARAMS), trajectory.update(stats, PARAMS))
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    assert swe_prune.load(path).masks["up"]["bias"] is None
    swe_prune.save(path, masks=mask)
    assert swe_prune.load(path).stats is None


def test_safetensors_reads_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    swe_prune.save(tmp_path / "s", stats=tracked())
    with safetensors.safe_open(tmp_path / "s", framework="numpy") as file:
        assert file.metadata()["format"] == "swe_prune.state.1"
        assert '"power": 0.3' in file.metadata()["about"]
        np.testing.assert_array_equal(
            file.get_tensor("buffers/late_mean/up/kernel"),
            tracked().buffers["late_mean"]["up"]["kernel"],
        )


ODD = {"a/b": W > 0, 'c"ü\n\\': {"": W < 0, 3: None}, "__metadata__": [W > 1, (None, W > 2)]}


@pytest.mark.parametrize("mask", [{"x": ODD}, W > 0, [W > 0], {"empty": jnp.zeros((0, 3), bool)}])
def test_names_may_have_any_characters(mask, tmp_path):
    if isinstance(mask, dict) and "x" in mask:
        mask = {"x": {**ODD, 'c"ü\n\\': {"": W < 0, "3": None}}}
    swe_prune.save(tmp_path / "m", masks=mask)
    assert_same(swe_prune.load(tmp_path / "m").masks, mask)


def test_an_nnx_mask_comes_back_for_its_module(tmp_path):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    pruned = swe_prune.prune(model, 0.5, verbose=False)
    swe_prune.save(tmp_path / "m", masks=pruned.masks)
    found = swe_prune.load(tmp_path / "m").masks
    applied = masks.apply(nnx.state(model, nnx.Param), found)
    np.testing.assert_array_equal(applied.kernel[...], pruned.params.kernel[...])


def test_what_is_no_such_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(InputError, match="is not a file"):
        swe_prune.load(path)
    with pytest.raises(InputError, match="cannot be written"):
        swe_prune.save(tmp_path / "none" / "m", masks={"w": W > 0})
    with pytest.raises(InputError, match="nothing to save"):
        swe_prune.save(path)
    with pytest.raises(InputError, match="not bool"):
        swe_prune.save(path, masks={"w": W})
    swe_prune.save(path, stats=tracked())
    whole = path.read_bytes()
    other = whole.replace(b"swe_prune.state.1", b"swe_prune.state.2")
    huge = (2**62).to_bytes(8, "little") + whole[8:]
    deep = b'{"a":' * 100_000
    deep = len(deep).to_bytes(8, "little") + deep
    for damaged in (
        deep,
        b"",
        b"text",
        whole[:40],
        whole[:-5],
        other,
        huge,
        b"\x02\0\0\0\0\0\0\0{}",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot be read .*that swe_prune\.save has written"):
            swe_prune.load(path)


def test_flax_serialization_round_trips_and_refuses_other_settings():
    stats = tracked()
    for data in (
        flax.serialization.to_bytes(stats),
        flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(stats)),
    ):
        like = trajectory.init(PARAMS, MEASURES, compensated=True, **SETTINGS)
        assert_same(flax.serialization.from_bytes(like, data), stats)
        for name, value in (
            ("power", 1.0), ("window_start", 1), ("vote_rate", 1.0), ("index", "absolute")
        ):  # fmt: skip
            other = {**SETTINGS, name: value}
            like = trajectory.init(PARAMS, MEASURES, compensated=True, **other)
            with pytest.raises(InputError, match=f"tracked with {name} = .* restored under"):
                flax.serialization.from_bytes(like, data)
        with pytest.raises(InputError, match=r"give trajectory\.init the same measures="):
            flax.serialization.from_bytes(trajectory.init(PARAMS, **SETTINGS), data)
        found = trajectory.from_dict(flax.serialization.msgpack_restore(data))
        assert (found.power, found.window_start, found.vote_rate) == (0.3, 2, 1.5)
        assert_same(trajectory.read(found, "votes"), trajectory.read(stats, "votes"))
        assert_same(
            importance.score("swe", PARAMS, stats=found),
            importance.score("swe", PARAMS, stats=stats),
        )


def test_orbax_restores_with_and_without_a_target(tmp_path):
    stats = tracked()
    with ocp.StandardCheckpointer() as store:
        store.save(tmp_path / "stats", stats)
        store.wait_until_finished()
        plain = store.restore(tmp_path / "stats")
        assert not isinstance(plain, trajectory.TrajectoryStats)
        swe = importance.score("swe", PARAMS, stats=plain)
        assert_same(swe, importance.score("swe", PARAMS, stats=stats))
        assert_same(
            trajectory.read(trajectory.update(plain, PARAMS), "late_mean"),
            trajectory.read(trajectory.update(stats, PARAMS), "late_mean"),
        )
        assert swe_prune.prune(PARAMS, 0.5, stats=plain, criterion="swe", verbose=False).masks
        other = trajectory.init(PARAMS, MEASURES, compensated=True, **{**SETTINGS, "power": 1.0})
        wrong = store.restore(tmp_path / "stats", other)
    for use in (
        lambda: trajectory.update(wrong, PARAMS),
        lambda: trajectory.read(wrong, "late_mean"),
        lambda: importance.score("swe", PARAMS, stats=wrong),
        lambda: swe_prune.prune(PARAMS, 0.5, stats=wrong, verbose=False),
        lambda: trajectory.merge(wrong, wrong),
    ):
        with pytest.raises(InputError, match=r"power = 0\.3 and restored under power = 1"):
            use()
    with pytest.raises(InputError, match="has no 'settings'"):
        trajectory.read({k: v for k, v in plain.items() if k != "settings"}, "late_mean")
    with pytest.raises(InputError, match="stats must be a TrajectoryStats or a mapping"):
        trajectory.update([1], PARAMS)


def test_a_snapshot_when_due_costs_nothing_otherwise():
    stats = trajectory.init(PARAMS, ("late_mean", "mean"))

    @jax.jit(donate_argnums=0)
    def step(stats, params, t):
        return trajectory.update(stats, params, when=t % 3 == 0)

    text = step.lower(stats, PARAMS, 0).compile().as_text()
    size = f"f32[{W.shape[0]},{W.shape[1]}]"
    assert "conditional" not in text
    assert not [line for line in text.splitlines() if " copy(" in line and size in line]
    expected = trajectory.init(PARAMS, ("late_mean", "mean"))
    for t in range(7):
        before = stats
        stats = step(stats, PARAMS, t)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.buffers))
        if t % 3 == 0:
            expected = trajectory.update(expected, PARAMS)
    assert int(stats.count) == 3
    for name, leaf in tree.named_leaves(stats):
        if leaf is not None:
            np.testing.assert_allclose(leaf, dict(tree.named_leaves(expected))[name], rtol=1e-6)
    assert trajectory.update(expected, PARAMS, when=False) is expected
    assert int(trajectory.update(expected, PARAMS, when=jnp.asarray(True)).count) == 4


def test_settings_are_stored_beside_the_numbers():
    stats = tracked()
    assert dataclasses.replace(stats).settings.tolist() == pytest.approx([0.3, 2, 1.5, 0])
