"""A tiny Llama that has learned a text, as a folder with a tokenizer, and two texts to use."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from swe_prune import data, interop
from swe_prune.interop import families
from swe_prune.interop.tokenizer import PretrainedTokenizer
from swe_prune.models import gpt
from swe_prune.training import state as state_lib
from swe_prune.training import step as step_lib

ROOT = Path(__file__).parents[1]
VOCAB = 320
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Paths of the model's folder and of the texts."""

    model: Path
    train: Path
    held_out: Path


def tokenizer(text):
    """A byte-level BPE of `VOCAB` tokens, learned from the text."""
    package = pytest.importorskip("tokenizers")
    backend = package.Tokenizer(package.models.BPE())
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return PretrainedTokenizer(backend, None, (0,))


def make(folder):
    """Writes everything into a folder and returns where it is."""
    place = Place(folder / "model", folder / "train.txt", folder / "held_out.txt")
    text = (ROOT / "LICENSE").read_text()
    cut = text.index("4. Redistribution")
    place.train.write_text(text[:cut])
    place.held_out.write_text(text[cut:])
    words = tokenizer(text[:cut])
    family, config, vocab_size = families.read_config(CONFIG)
    module = gpt.build(config, vocab_size)
    batches = data.train_iterator(words.encode(text[:cut]), context=64, batch=8, seed=0)
    optimizer = optax.adam(1e-2)
    params = state_lib.init_params(module, 0, 8)
    state = state_lib.create(params, optimizer, 0)
    step = step_lib.compile_train_step(module, optimizer)
    for _ in range(60):
        state, _ = step(state, dict(next(batches)))
    params = jax.tree.map(jnp.asarray, state.params)
    made = interop.Pretrained(
        config, vocab_size, params, words, family, place.model, "safetensors", CONFIG
    )
    interop.export(place.model, made)
    return place
