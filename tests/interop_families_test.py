"""config.json <-> ModelConfig, and the tables of names."""

import dataclasses
import math

import interop_tiny
import numpy as np
import pytest
from interop_tiny import CONFIGS, GPT2, LLAMA, LLAMA3, VOCAB, random_params

from swe_prune import tree
from swe_prune.config import ModelConfig, RopeConfig
from swe_prune.errors import InputError
from swe_prune.interop import families, hf_config, slices
from swe_prune.interop.family import NEEDED
from swe_prune.interop.tensor_names import SAFETENSORS
from swe_prune.interop.tensor_names_gguf import GGUF
from swe_prune.interop.tensor_rows import Row, Table

GGUF_CASES = [name for name in CONFIGS if CONFIGS[name]["model_type"] in GGUF]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_is_what_is_written(name):
    family, config, vocab_size = hf_config.read_config(CONFIGS[name])
    written = hf_config.write_config(config, vocab_size, family)
    assert hf_config.read_config(written) == (family, config, vocab_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_is_found_for_the_settings(name):
    _, config, vocab_size = hf_config.read_config(CONFIGS[name])
    written = hf_config.write_config(config, vocab_size)
    assert hf_config.read_config(written)[1] == config


def test_settings_get_where_they_belong():
    hf = LLAMA | {"attention_bias": True, "head_dim": 6, "hidden_act": "gelu", "rope_theta": 5e5}
    family, config, vocab_size = hf_config.read_config(hf, "bfloat16")
    assert (family, vocab_size) == ("llama", VOCAB)
    assert config == ModelConfig(
        layers=2,
        heads=4,
        width=16,
        context=32,
        activation="gelu_exact",
        use_bias=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=False,
        head_bias=False,
        tied_head=False,
        dtype="bfloat16",
        hidden=20,
        kv_heads=2,
        head_width=6,
        gated=True,
        norm="rms",
        norm_epsilon=1e-5,
        positions="rope",
        rope=RopeConfig(theta=5e5, original_context=32),
    )


def test_both_spellings_of_rope_mean_the_same():
    old = LLAMA | {"rope_theta": 1e3, "rope_scaling": LLAMA3}
    new = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 1e3}}
    assert hf_config.read_config(old) == hf_config.read_config(new)
    assert hf_config.read_config(old)[1].rope.theta == 1e3


def test_early_names_of_phi3s_scaling_are_understood():
    hf = CONFIGS["phi3 longrope"]
    early = hf | {"rope_scaling": hf["rope_scaling"] | {"type": "su"}}
    assert hf_config.read_config(early) == hf_config.read_config(hf)


def test_dynamic_scaling_lets_texts_exceed_the_context_that_is_said():
    config = hf_config.read_config(CONFIGS["llama dynamic"])[1]
    assert (config.context, config.rope.original_context) == (32, 8)


def changed(name, drop=(), **changes):
    return {key: value for key, value in (CONFIGS[name] | changes).items() if key not in drop}


REFUSED = {
    "architecture": (changed("llama", model_type="mamba"), "supported are gpt2, llama, mistral"),
    "no model_type": (changed("llama", drop=["model_type"]), "model_type None"),
    "quantized": (changed("llama", quantization_config={"bits": 4}), "quantization_config"),
    "activation": (changed("llama", hidden_act="relu6"), "'relu6'.*supported are gelu_new"),
    "scaled by layer": (
        changed("gpt2", scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx = True.*supported for gpt2 is False",
    ),
    "unscaled": (changed("gpt2", scale_attn_weights=False), "scale_attn_weights"),
    "cross attention": (changed("gpt2", add_cross_attention=True), "add_cross_attention"),
    "missing": (changed("llama", drop=["hidden_size"]), "lacks 'hidden_size'"),
    "not a number": (
        changed("llama", hidden_size="16"),
        "hidden_size in .* an integer of at least 1, got '16'",
    ),
    "negative": (changed("llama", num_hidden_layers=-1), "num_hidden_layers in .* got -1"),
    "not a bool": (changed("llama", tie_word_embeddings=1), "tie_word_embeddings in .* got 1"),
    "rope type": (
        changed("llama", rope_scaling={"rope_type": "axial", "factor": 2.0}),
        "rope type 'axial'; supported are default, linear",
    ),
    "rope without factor": (
        changed("llama", rope_scaling={"rope_type": "linear"}),
        "'linear' without 'factor'",
    ),
    "rope of words": (
        changed("llama", rope_scaling={"rope_type": "linear", "factor": "two"}),
        "factor in .* got 'two'",
    ),
    "rope for each kind": (
        changed("llama", rope_parameters={"full_attention": {"rope_type": "default"}}),
        "per kind of layer",
    ),
    "rope no group": (changed("llama", rope_scaling="linear"), "must be a mapping"),
    "longrope factors": (
        changed("llama", rope_scaling={"type": "longrope", "short_factor": 1, "long_factor": [1]}),
        "short_factor in .* must be a list, got 1",
    ),
    "original of words": (
        changed("llama", original_max_position_embeddings="8", rope_scaling=LLAMA3),
        "original_max_position_embeddings in .* got '8'",
    ),
    "partial": (changed("llama", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    "mixed layers": (
        changed("mistral", layer_types=["full_attention", "sliding_attention"]),
        "supported is sliding_attention in all",
    ),
    "unknown layers": (
        changed("gemma2", layer_types=["chunked_attention"] * 3),
        "layers of the types chunked_attention; supported are full_attention and sliding",
    ),
    "too few layers": (
        changed("gemma2", layer_types=["full_attention"]),
        "layer_types in .* one entry for each of the 3 layers",
    ),
    "layers of words": (changed("smollm3", no_rope_layers="all"), "no_rope_layers in .* 'all'"),
    "no window": (
        changed("gemma2", sliding_window=None),
        "sliding_attention without sliding_window; add it",
    ),
    "window off": (
        changed("qwen3 biases", use_sliding_window=False),
        "sliding_attention without use_sliding_window; add it",
    ),
    "pattern": (
        changed("gemma3_text", sliding_window_pattern=0),
        "sliding_window_pattern in .* at least 1, got 0",
    ),
    "both directions": (
        changed("gemma3_text", use_bidirectional_attention=True),
        "use_bidirectional_attention = True.*supported for gemma3_text is False",
    ),
    "unused cap": (
        changed("gemma3_text", attn_logit_softcapping=50.0),
        "attn_logit_softcapping = 50.0.*supported for gemma3_text is None",
    ),
    "scaled window": (
        changed(
            "gemma3_text nested",
            rope_parameters={
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        "'linear' in layers of the type sliding_attention",
    ),
    "rope of one kind": (
        changed("gemma3_text nested", rope_parameters={"rope_type": "default"}),
        "rope_parameters in .* mapping for 'full_attention'",
    ),
    "norm behind": (
        changed("opt", do_layer_norm_before=False),
        "do_layer_norm_before = False.*supported for opt is True",
    ),
    "projected words": (
        changed("opt", word_embed_proj_dim=8),
        "word_embed_proj_dim = 8.*supported for opt is hidden_size, 16",
    ),
    "no experts": (changed("mixtral", num_local_experts=0), "num_local_experts in .* got 0"),
    "images": (changed("gemma3_text", model_type="gemma3"), "'gemma3'.*gemma3_text, mixtral"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_in_a_sentence(case):
    hf, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence) as caught:
        hf_config.read_config(hf)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_of_computation_is_refused():
    with pytest.raises(InputError, match="one of float32, bfloat16"):
        hf_config.read_config(GPT2, "float16")


def test_a_decoder_of_no_family_is_not_written():
    with pytest.raises(InputError, match="any family"):
        hf_config.write_config(ModelConfig(norm="rms"), 9)
    with pytest.raises(InputError, match="of mistral"):
        hf_config.write_config(hf_config.read_config(GPT2)[1], 9, "mistral")


def test_defaults_are_those_of_transformers():
    pytest.importorskip("transformers", reason="the defaults are compared with transformers'")
    from transformers import AutoConfig

    for name, family in families.FAMILIES.items():
        if family.vision:  # transformers does not have it
            continue
        switch = {} if family.layers is None else {family.layers.switch or "": True}
        theirs = AutoConfig.for_model(name, **switch)
        for key in family.keys:
            if key.default is not NEEDED and key.default is not None:
                assert getattr(theirs, key.name) == key.default, (name, key.name)


@pytest.mark.parametrize(
    ("tables", "name"),
    [(SAFETENSORS, name) for name in CONFIGS] + [(GGUF, name) for name in GGUF_CASES],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_parameter_is_in_one_tensor_and_comes_out_as_it_went_in(tables, name):
    family, config, vocab_size = hf_config.read_config(CONFIGS[name])
    params = dict(tree.named_leaves(random_params(config)))
    bound = slices.bind(tables[family], config, vocab_size)
    parts = [part for one in bound for part in one.parts]
    assert sorted(part.name for part in parts if not part.copy) == sorted(params)
    copies = sum(len(params[part.name]) - 1 for part in parts if part.copy == 0)
    assert len(parts) == len(params) + copies
    for one in bound:
        stored = interop_tiny.stored(one, params)
        assert stored.shape == one.shape
        for part in one.parts:
            whole = (slice(None),) * len(part.shape)
            np.testing.assert_array_equal(part.read(stored, whole), part.of(params[part.name]))


class Recording:
    """A stored tensor that counts what is asked of it."""

    def __init__(self, values):
        self.values, self.read = values, 0

    def __getitem__(self, index):
        found = self.values[index]
        self.read += found.size
        return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_of_a_slice_no_more_than_the_slice_is_read(name):
    family, config, vocab_size = hf_config.read_config(CONFIGS[name])
    params = dict(tree.named_leaves(random_params(config)))
    for one in slices.bind(SAFETENSORS[family], config, vocab_size):
        for part in one.parts:
            stored = Recording(interop_tiny.stored(one, params))
            half = part.shape[-1] // 2
            index = (*[slice(None)] * (len(part.shape) - 1), slice(half, None))
            found = part.read(stored, index)
            np.testing.assert_array_equal(found, params[part.name][index])
            assert stored.read == found.size


def test_a_fused_tensor_of_parts_that_are_not_alike_is_joined_in_order():
    config = hf_config.read_config(CONFIGS["phi3 longrope"])[1]
    bound = slices.bind(SAFETENSORS["phi3"], config, VOCAB)
    fused = next(one for one in bound if "qkv_proj" in one.name)
    assert fused.shape == (16 + 8 + 8, 16)
    assert [part.start for part in fused.parts] == [0, 16, 24]


def test_the_tables_say_which_rows_lie_interleaved():
    """llama.cpp's permutation of query rows, written out for one head of width 6."""
    row = Row("q", ("block_{i}/attention/query/kernel",), "out_in", interleaved=True)
    config = dataclasses.replace(
        hf_config.read_config(LLAMA)[1], layers=1, heads=1, kv_heads=1, head_width=6
    )
    (bound,) = slices.bind(Table((row,)), config, VOCAB)
    kernel = np.tile(np.arange(6.0), (16, 1))
    stored = interop_tiny.stored(bound, {"block_0/attention/query/kernel": kernel})
    np.testing.assert_array_equal(stored[:, 0], [0, 3, 1, 4, 2, 5])


SIZES = {  # layers, heads, key heads, width, hidden, vocabulary; weights as published
    "qwen2": ((24, 14, 2, 896, 4864, 151936), {"tie_word_embeddings": True}, 494_032_768),
    "qwen3": ((28, 16, 8, 1024, 3072, 151936), {"tie_word_embeddings": True}, 596_049_920),
    "gemma2": ((26, 8, 4, 2304, 9216, 256000), {}, 2_614_341_888),
    "gemma3_text": ((26, 4, 1, 1152, 6912, 262144), {}, 999_885_952),
    "gpt_neox": ((6, 8, 8, 512, 2048, 50304), {}, 70_426_624),
    "opt": ((12, 12, 12, 768, 3072, 50272), {"ffn_dim": 3072}, 125_239_296),
    "smollm3": ((36, 16, 4, 2048, 11008, 128256), {}, 3_075_098_624),
    "olmo2": ((16, 16, 16, 2048, 8192, 100352), {}, 1_484_916_736),
    "granite": ((40, 32, 8, 2048, 8192, 49155), {"tie_word_embeddings": True}, 2_533_531_648),
    "mixtral": ((32, 32, 8, 4096, 14336, 32000), {}, 46_702_792_704),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_as_many_weights_as_published(name):
    numbers, more, published = SIZES[name]
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
            "intermediate_size", "vocab_size")  # fmt: skip
    hf = {"model_type": name} | dict(zip(keys, numbers, strict=True)) | more
    _, config, vocab_size = hf_config.read_config(hf)
    shapes = slices.param_shapes(config, vocab_size)
    assert sum(math.prod(shape) for shape in shapes.values()) == published
