"""Tables of the parameters in each tensor of a GGUF file, one per architecture.

In GGUF files of the architecture "llama" the rows of query and key have a different order: the two
halves of a head, whose numbers i and i + K/2 are rotated together, are interleaved.

Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and
gguf-py/gguf/tensor_mapping.py.
"""

from collections.abc import Mapping

from swe_prune.interop.tensor_rows import OUT_IN, Row, Table, dense_rows, norm_rows

_GGUF_ENDS = (
    Row("token_embd.weight", ("embedding/embedding",)),
    *norm_rows("blk.{i}.attn_norm", "block_{i}/attention_norm"),
    *norm_rows("blk.{i}.ffn_norm", "block_{i}/mlp_norm"),
    *norm_rows("output_norm", "final_norm"),
    Row("output.weight", ("head/kernel",), OUT_IN),
    *dense_rows("blk.{i}.attn_output", "block_{i}/attention/out"),
    *dense_rows("blk.{i}.ffn_down", "block_{i}/mlp/down"),
)
_GGUF_FUSED = dense_rows(
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
            *dense_rows("blk.{i}.ffn_up", "block_{i}/mlp/up"),
        ),
    ),
    "llama": Table(
        (
            *_GGUF_ENDS,
            *dense_rows("blk.{i}.attn_q", "block_{i}/attention/query", interleaved=True),
            *dense_rows("blk.{i}.attn_k", "block_{i}/attention/key", interleaved=True),
            *dense_rows("blk.{i}.attn_v", "block_{i}/attention/value"),
            *dense_rows("blk.{i}.ffn_gate", "block_{i}/mlp/gate"),
            *dense_rows("blk.{i}.ffn_up", "block_{i}/mlp/up"),
        ),
        ignored=_GGUF_FREQUENCIES,
    ),
    "phi3": Table(
        (
            *_GGUF_ENDS,
            *_GGUF_FUSED,
            *dense_rows("blk.{i}.ffn_up", "block_{i}/mlp/gate", "block_{i}/mlp/up"),
        ),
        ignored=_GGUF_FREQUENCIES,
    ),
}
"""Tables for GGUF files, by `general.architecture`; all kernels are outputs x inputs."""
