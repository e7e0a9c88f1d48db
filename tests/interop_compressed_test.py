"""Weights without their zeros come back bit for bit, and what does not fit is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop_tiny import assert_same_params, model
from safetensors.numpy import load_file, save_file

from swe_prune import interop, tree
from swe_prune.errors import InputError
from swe_prune.interop import compressed_file
from swe_prune.interop.folder_files import COMPRESSED
from swe_prune.interop.safetensors_header import read_header
from swe_prune.interop.weights_file import METADATA, Piece, write_file

DTYPES = ("float32", "bfloat16", "float16")


def with_zeros(sparsity, dtype, shape=(32, 24)):
    """Random values, of which a share is 0, or two of four."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32)
    if sparsity == "2:4":
        values.reshape(-1, 4)[:, 1:3] = 0
    else:
        values.reshape(-1)[rng.permutation(values.size)[: round(values.size * sparsity)]] = 0
    return values.astype(jnp.dtype(dtype))


def piece(name, array):
    return Piece(name, array.dtype, array.shape, lambda: array)


def read(path):
    entries = compressed_file.check_compressed(read_header(path))
    return {name: compressed_file.decompressed(path, name, one) for name, one in entries.items()}


def same_bits(one, two):
    assert (one.dtype, one.shape) == (two.dtype, two.shape)
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0, "2:4"])
def test_out_and_in_again_is_bit_identical_and_as_small_as_said(tmp_path, dtype, sparsity):
    array = with_zeros(sparsity, dtype)
    compressed_file.write_compressed(tmp_path / "small", [piece("a", array)])
    same_bits(read(tmp_path / "small")["a"], array)
    share = 0.5 if sparsity == "2:4" else sparsity
    least = min(1.0, 1 - share + 1 / (8 * array.dtype.itemsize))
    stored = sum(values.nbytes for values in load_file(tmp_path / "small").values())
    assert stored == pytest.approx(least * array.nbytes, abs=array.dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_and_nan_keep_their_bits(tmp_path, dtype):
    array = with_zeros(0.5, dtype, (9, 7)).reshape(-1)  # 63: the last byte of the bitmap has room
    array[[0, 1, 62]] = -0.0
    array[[2, 3]] = np.nan
    array.view(f"uint{8 * array.itemsize}")[4] = 1  # the smallest number above 0
    compressed_file.write_compressed(tmp_path / "small", [piece("a", array.reshape(9, 7))])
    same_bits(read(tmp_path / "small")["a"], array.reshape(9, 7))


def test_tensors_that_would_grow_and_empty_ones_are_stored_as_they_are(tmp_path):
    arrays = {"dense": np.ones((8, 8), np.float32), "none": np.ones((0, 3), np.float32),
              "half": with_zeros(0.5, "float32")}  # fmt: skip
    path = tmp_path / "small"
    compressed_file.write_compressed(path, [piece(*one) for one in arrays.items()])
    assert set(load_file(path)) == {"dense", "none", "half.bitmap", "half.values"}
    for name, array in read(path).items():
        same_bits(array, arrays[name])


def halved(name, dtype):
    """A model of which half of every tensor is 0."""
    made = model(name, dtype)
    return made, tree.map_named(
        lambda _, leaf: jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) % 2 == 0, leaf, 0),
        made.params,
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize(("name", "dtype", "most"), [("llama", "float32", 0.55),
                         ("phi3", "float32", 0.55), ("gpt2", "bfloat16", 0.5625 + 1e-3),
                         ("mixtral", "bfloat16", 0.5625 + 1e-3)])  # fmt: skip
def test_a_folder_without_zeros_loads_and_goes_out_as_an_ordinary_one(tmp_path, name, dtype, most):
    made, params = halved(name, dtype)
    small = interop.export(tmp_path / "small", made, params, compress=True)
    assert not (small / "model.safetensors").exists()
    loaded = interop.load(small)
    assert_same_params(loaded.params, params)
    plain = interop.export(tmp_path / "plain", loaded)
    assert_same_params(interop.load(plain).params, params)
    same = interop.export(tmp_path / "same", made, params)
    assert (plain / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
    data = [
        sum(end - begin for begin, end in read_header(file).places.values())
        for file in (small / COMPRESSED, plain / "model.safetensors")
    ]
    assert data[0] / data[1] <= most
    assert interop.open_pretrained(small).file_bytes == (small / COMPRESSED).stat().st_size


def test_a_sharded_model_is_read_from_it(tmp_path):
    made, params = halved("llama", "float32")
    small = interop.export(tmp_path / "small", made, params, compress=True)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert_same_params(interop.load(small, shardings=lambda name, shape: one).params, params)


@pytest.fixture
def damaged(tmp_path):
    """Returns a function that changes a folder's file and returns the error of loading it."""
    made, params = halved("llama", "float32")
    folder = interop.export(tmp_path / "small", made, params, compress=True)

    def with_change(change, early=True):
        header = read_header(folder / COMPRESSED)
        tensors, metadata = load_file(folder / COMPRESSED), dict(header.metadata)
        shapes = json.loads(metadata["shapes"])
        change(tensors, shapes)
        metadata["shapes"] = json.dumps(shapes)
        if early:
            metadata.pop("checksums")
        save_file(tensors, folder / COMPRESSED, metadata)
        with pytest.raises(InputError) as refused:
            interop.load(folder)
        return str(refused.value)

    return with_change


NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_bitmap_with_other_ones_than_values_is_refused(damaged):
    def change(tensors, shapes):
        tensors[NAME + ".bitmap"][0] ^= 0b1000_0000

    assert "the bitmap of 'model.layers.0.mlp.up_proj.weight' has" in damaged(change)


@pytest.mark.parametrize("end", [".bitmap", ".values"])
def test_a_bit_that_changed_is_found_by_the_checksum(damaged, end):
    def change(tensors, shapes):
        bits = tensors[NAME + end].view(np.uint8)
        bits[0] ^= 0xFF if end == ".bitmap" else 1  # every other bit: as many ones as before

    assert "was changed after it was written; export" in damaged(change, early=False)


def test_ones_beyond_the_last_element_are_refused(tmp_path):
    array = np.array([1.0, 0, 0], np.float32).repeat([1, 60, 1])  # 62 elements, two bits of room
    packed = np.packbits(array != 0)
    packed[-1] |= 1
    metadata = {"format": compressed_file.FORMAT, "shapes": json.dumps({"a": [62]})}
    pieces = [piece("a.bitmap", packed), piece("a.values", array[array != 0])]
    write_file(tmp_path / "x", pieces, metadata)
    with pytest.raises(InputError, match="has 2 ones for 1 values"):
        read(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, shapes: shapes.update({NAME: [2**40, 2**40]}),  # nothing is allocated
        lambda tensors, shapes: shapes.update({NAME: [-20, -16]}),
        lambda tensors, shapes: tensors.update({NAME + ".values": np.ones(321, np.float32)}),
        lambda tensors, shapes: tensors.update({NAME + ".bitmap": np.ones(40, np.int8)}),
        lambda tensors, shapes: tensors.pop(NAME + ".values"),
        lambda tensors, shapes: shapes.update({NAME: "wide"}),
        lambda tensors, shapes: shapes.update({NAME: [10**400]}),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_taken(damaged, change):
    assert "export" in damaged(change)


def test_another_file_of_this_name_and_a_link_to_elsewhere_are_refused(tmp_path):
    made, params = halved("llama", "float32")
    folder = interop.export(tmp_path / "small", made, params, compress=True)
    kept = folder / COMPRESSED
    elsewhere = tmp_path / "elsewhere"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    with pytest.raises(InputError, match="a link to"):
        interop.load(folder)
    kept.unlink()
    write_file(kept, [piece("a", np.ones(3, np.float32))], METADATA)
    with pytest.raises(InputError, match=r"is not a swe_prune\.compressed\.1 file"):
        interop.load(folder)


def test_of_both_files_the_ordinary_one_is_read_and_it_is_said(tmp_path):
    made, params = halved("llama", "float32")
    small = interop.export(tmp_path / "small", made, params, compress=True)
    plain = interop.export(tmp_path / "plain", made)
    (small / COMPRESSED).rename(plain / COMPRESSED)
    with pytest.warns(UserWarning, match="next to its model.safetensors"):
        assert_same_params(interop.load(plain).params, made.params)
