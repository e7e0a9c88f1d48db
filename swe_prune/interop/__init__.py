"""Pretrained language models: import from Hugging Face folders and GGUF files, and export.

    model = interop.load("path/to/SmolLM2-135M")
    logits_BxLxV = gpt.build(model.config, model.vocab_size).apply({"params": model.params}, tokens)
    record = interop.PruningRecord(Recipe(method="wanda", sparsity=0.5))
    interop.export("path/to/pruned", model, mask=mask, record=record)

pretrained          `load` and `open_pretrained`, and the models that they return
exporting           `export`, which writes a folder that transformers loads
families            settings in config.json of each model family
family              what such a table says
hf_config           config.json <-> ModelConfig
layer_kinds         layers that differ in config.json <-> ModelConfig
rope_settings       rotary positions in config.json <-> RopeConfig
tensor_names        tables of the parameters in each tensor of a folder
tensor_names_gguf   tables of the parameters in each tensor of a GGUF file
tensor_rows         what such a table says
slices              the tables applied to one model: slices of stored tensors
load_params         stored tensors to parameters, one at a time, with their shardings
folder_files        files of a folder that hold the weights
safetensors_header  checked headers of safetensors files
safetensors_folder  checked reading of a folder of safetensors
prefixes            prefixes of the names of tensors
gguf_file           reading of a GGUF file
tokenizer           text to token ids and back
tokenizer_models    tokenizers made of a vocabulary, SentencePiece's too
tokenizer_folder    the tokenizer of a Hugging Face folder, or of a given path
tokenizer_gguf      the tokenizer inside a GGUF file
token_ids           checked ids of the tokens that begin and end a text
weights_file        safetensors files, written tensor by tensor
mask_file           masks with one bit per weight
lm_eval             `harness`, the interface of lm_eval to a model
pruning_record      pruning.json: settings and results of the pruning
optional            import of optional packages when they are used
"""

from swe_prune.interop.exporting import check_free, export
from swe_prune.interop.families import FAMILIES
from swe_prune.interop.hf_config import read_config, write_config
from swe_prune.interop.lm_eval import harness
from swe_prune.interop.mask_file import FILE as MASKS
from swe_prune.interop.mask_file import read_masks
from swe_prune.interop.pretrained import (
    Pretrained,
    PretrainedSource,
    load,
    located,
    open_pretrained,
)
from swe_prune.interop.pruning_record import FILE as RECORD
from swe_prune.interop.pruning_record import PruningRecord, commit_of_code, read_record
from swe_prune.interop.slices import abstract_params
from swe_prune.interop.tokenizer import PretrainedTokenizer

__all__ = [
    "FAMILIES",
    "MASKS",
    "RECORD",
    "Pretrained",
    "PretrainedSource",
    "PretrainedTokenizer",
    "PruningRecord",
    "abstract_params",
    "check_free",
    "commit_of_code",
    "export",
    "harness",
    "load",
    "located",
    "open_pretrained",
    "read_config",
    "read_masks",
    "read_record",
    "write_config",
]
