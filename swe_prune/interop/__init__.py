"""Pretrained language models: in from Hugging Face folders and GGUF files, and out again.

    model = interop.load("path/to/SmolLM2-135M")
    logits_BxLxV = gpt.build(model.config, model.vocab_size).apply({"params": model.params}, tokens)
    record = interop.PruningRecord("wanda")
    interop.export("path/to/pruned", model, mask=mask, record=record)

pretrained          `load`, and what it gives
exporting           `export`: the folder that transformers loads
families            what each family has in config.json
hf_config           config.json <-> ModelConfig
rope_settings       its rotary positions
tensor_names        the tables: which tensor of a file holds which parameter
placing             the tables applied to one model: which slice of which tensor
reading             tensor by tensor to parameters, each to its sharding
safetensors_folder  a folder's files, checked
gguf_file           a GGUF file
tokenizer           text to ids, from whichever file has it
weights_file        safetensors written tensor by tensor
mask_file           masks, one bit for each weight
lm_eval             `harness`: the model as lm_eval asks it
pruning_record      pruning.json: how it was pruned, and what came of it
optional            the packages that this needs, imported when it is used
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
from swe_prune.interop.pruning_record import PruningRecord, commit_of_code, read_record
from swe_prune.interop.tokenizer import PretrainedTokenizer

__all__ = [
    "FAMILIES",
    "MASKS",
    "Pretrained",
    "PretrainedSource",
    "PretrainedTokenizer",
    "PruningRecord",
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
