"""Tables of the parameters in each stored tensor, one table per kind of file.

Import, export and tests use the same rows. A row names a stored tensor, with `{i}` for the layer,
and the parameters in it, one after another along its outputs. A fused tensor (query-key-value of
GPT-2 and Phi-3, gate and up of Phi-3) is split on import and joined on export. A row whose
parameters the model does not have (biases, an untied head) is skipped.

Layouts of stored tensors, whose parameters are kernels of inputs x outputs:

    as_is    vectors, and embeddings V x D
    out_in   torch's Linear: outputs x inputs
    in_out   GPT-2's Conv1D: inputs x outputs

In GGUF files of the architecture "llama" the rows of query and key have a different order: the two
halves of a head, whose numbers i and i + K/2 are rotated together, are interleaved.

Sources: https://github.com/huggingface/transformers, models/*/modeling_*.py;
https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and gguf-py/gguf/tensor_mapping.py.
"""

import dataclasses
from collections.abc import Mapping

AS_IS, OUT_IN, IN_OUT = "as_is", "out_in", "in_out"


@dataclasses.dataclass(frozen=True)
class Row:
    """Names of a stored tensor and of the parameters in it.

    Attributes:
        stored: Name of the stored tensor, with `{i}` for the layer.
        params: Names of the parameters, in the order of the tensor's outputs.
        layout: Layout of the stored tensor: `AS_IS`, `OUT_IN` or `IN_OUT`.
        interleaved: Whether the two halves of each head are interleaved.
    """

    stored: str
    params: tuple[str, ...]
    layout: str = AS_IS
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """All the tensors of one kind of file.

    Attributes:
        rows: Rows of the table; those with `{i}` apply to every layer.
        prefix: Prefix that is missing from the names in files of the bare model, without its head.
        ignored: Regular expressions for the names of tensors that hold no parameters.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


def _norm(stored: str, ours: str) -> tuple[Row, ...]:
    return (Row(f"{stored}.weight", (f"{ours}/scale",)), Row(f"{stored}.bias", (f"{ours}/bias",)))


def _dense(
    stored: str, *ours: str, layout: str = OUT_IN, interleaved: bool = False
) -> tuple[Row, ...]:
    kernels = tuple(f"{name}/kernel" for name in ours)
    biases = tuple(f"{name}/bias" for name in ours)
    return (
        Row(f"{stored}.weight", kernels, layout, interleaved),
        Row(f"{stored}.bias", biases, interleaved=interleaved),
    )


_GPT2 = Table(
    (
        Row("transformer.wte.weight", ("embedding/embedding",)),
        Row("transformer.wpe.weight", ("position_embedding",)),
        *_norm("transformer.h.{i}.ln_1", "block_{i}/attention_norm"),
        *_dense(
            "transformer.h.{i}.attn.c_attn",
            "block_{i}/attention/query",
            "block_{i}/attention/key",
            "block_{i}/attention/value",
            layout=IN_OUT,
        ),
        *_dense("transformer.h.{i}.attn.c_proj", "block_{i}/attention/out", layout=IN_OUT),
        *_norm("transformer.h.{i}.ln_2", "block_{i}/mlp_norm"),
        *_dense("transformer.h.{i}.mlp.c_fc", "block_{i}/mlp/up", layout=IN_OUT),
        *_dense("transformer.h.{i}.mlp.c_proj", "block_{i}/mlp/down", layout=IN_OUT),
        *_norm("transformer.ln_f", "final_norm"),
        Row("lm_head.weight", ("head/kernel",), OUT_IN),
    ),
    prefix="transformer.",
    ignored=(r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",),  # the causal mask
)

_LLAMA_ENDS = (
    Row("model.embed_tokens.weight", ("embedding/embedding",)),
    *_norm("model.layers.{i}.input_layernorm", "block_{i}/attention_norm"),
    *_norm("model.layers.{i}.post_attention_layernorm", "block_{i}/mlp_norm"),
    *_norm("model.norm", "final_norm"),
    Row("lm_head.weight", ("head/kernel",), OUT_IN),
)
_FREQUENCIES = (r"rotary_emb\.inv_freq$",)  # determined by the config

_LLAMA = Table(
    (
        *_LLAMA_ENDS,
        *_dense("model.layers.{i}.self_attn.q_proj", "block_{i}/attention/query"),
        *_dense("model.layers.{i}.self_attn.k_proj", "block_{i}/attention/key"),
        *_dense("model.layers.{i}.self_attn.v_proj", "block_{i}/attention/value"),
        *_dense("model.layers.{i}.self_attn.o_proj", "block_{i}/attention/out"),
        *_dense("model.layers.{i}.mlp.gate_proj", "block_{i}/mlp/gate"),
        *_dense("model.layers.{i}.mlp.up_proj", "block_{i}/mlp/up"),
        *_dense("model.layers.{i}.mlp.down_proj", "block_{i}/mlp/down"),
    ),
    prefix="model.",
    ignored=_FREQUENCIES,
)

_PHI3 = Table(
    (
        *_LLAMA_ENDS,
        *_dense(
            "model.layers.{i}.self_attn.qkv_proj",
            "block_{i}/attention/query",
            "block_{i}/attention/key",
            "block_{i}/attention/value",
        ),
        *_dense("model.layers.{i}.self_attn.o_proj", "block_{i}/attention/out"),
        *_dense("model.layers.{i}.mlp.gate_up_proj", "block_{i}/mlp/gate", "block_{i}/mlp/up"),
        *_dense("model.layers.{i}.mlp.down_proj", "block_{i}/mlp/down"),
    ),
    prefix="model.",
    ignored=_FREQUENCIES,
)

SAFETENSORS: Mapping[str, Table] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _PHI3,
}
"""Tables for Hugging Face folders, by `model_type`."""

_GGUF_ENDS = (
    Row("token_embd.weight", ("embedding/embedding",)),
    *_norm("blk.{i}.attn_norm", "block_{i}/attention_norm"),
    *_norm("blk.{i}.ffn_norm", "block_{i}/mlp_norm"),
    *_norm("output_norm", "final_norm"),
    Row("output.weight", ("head/kernel",), OUT_IN),
    *_dense("blk.{i}.attn_output", "block_{i}/attention/out"),
    *_dense("blk.{i}.ffn_down", "block_{i}/mlp/down"),
)
_GGUF_FUSED = _dense(
    "blk.{i}.attn_qkv",
    "block_{i}/attention/query",
    "block_{i}/attention/key",
    "block_{i}/attention/value",
)
_GGUF_FREQUENCIES = (r"^rope_(freqs|factors_(long|short))\.weight$",)  # read with the config

GGUF: Mapping[str, Table] = {
    "gpt2": Table(
        (
            *_GGUF_ENDS,
            Row("position_embd.weight", ("position_embedding",)),
            *_GGUF_FUSED,
            *_dense("blk.{i}.ffn_up", "block_{i}/mlp/up"),
        ),
    ),
    "llama": Table(
        (
            *_GGUF_ENDS,
            *_dense("blk.{i}.attn_q", "block_{i}/attention/query", interleaved=True),
            *_dense("blk.{i}.attn_k", "block_{i}/attention/key", interleaved=True),
            *_dense("blk.{i}.attn_v", "block_{i}/attention/value"),
            *_dense("blk.{i}.ffn_gate", "block_{i}/mlp/gate"),
            *_dense("blk.{i}.ffn_up", "block_{i}/mlp/up"),
        ),
        ignored=_GGUF_FREQUENCIES,
    ),
    "phi3": Table(
        (
            *_GGUF_ENDS,
            *_GGUF_FUSED,
            *_dense("blk.{i}.ffn_up", "block_{i}/mlp/gate", "block_{i}/mlp/up"),
        ),
        ignored=_GGUF_FREQUENCIES,
    ),
}
"""Tables for GGUF files, by `general.architecture`; all kernels are outputs x inputs."""
