"""Writes GGUF files of tiny models, as llama.cpp's converter does."""

import gguf
import interop_tiny
import numpy as np

from swe_prune import tree
from swe_prune.interop.slices import bind
from swe_prune.interop.tensor_names_gguf import GGUF

Q = gguf.GGMLQuantizationType


def write(path, made, kind=Q.F32, quantized=("ffn_up",), **changes):
    """Returns a writer that has the parameters of a model; `finish` it.

    Args:
        path: of the file.
        made: a Pretrained.
        kind: of the tensors that `quantized` names; the others are float32.
        quantized: parts of tensor names.
        changes: metadata by key with "__" for ".", to add or, with None, to leave out.
    """
    name, config = made.family, made.config
    writer = gguf.GGUFWriter(path, name)
    settings = {
        "embedding_length": config.width,
        "feed_forward_length": config.hidden_size,
        "block_count": config.layers,
        "attention.head_count": config.heads,
        "context_length": config.context,
    }
    if name == "gpt2":
        settings["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        settings |= {
            "attention.head_count_kv": config.key_heads,
            "attention.layer_norm_rms_epsilon": config.norm_epsilon,
            "rope.freq_base": config.rope.theta,
            "rope.dimension_count": int(config.head_size * config.rope.share),
            "attention.key_length": config.head_size,
        }
    if config.window:
        settings["attention.sliding_window"] = config.window
    for key, value in settings.items():
        if f"{name}.{key}" not in changes:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{name}.{key}", value)
    for key, value in changes.items():
        if value is not None:
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
            add[bool] = writer.add_bool
            add.get(type(value), writer.add_array)(key, value)
    params = dict(tree.named_leaves(made.params))
    for one in bind(GGUF[name], config, made.vocab_size):
        values = interop_tiny.stored(one, params).astype(np.float32)
        if any(part in one.name for part in quantized) and values.ndim == 2 and kind != Q.F32:
            if kind == Q.F16:
                writer.add_tensor(one.name, values.astype(np.float16))
            else:
                writer.add_tensor(one.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(one.name, values)
    return writer


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
