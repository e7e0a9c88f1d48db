"""Makes the golden models of tests/interop_golden_test.py, by transformers and its random weights.

    python tests/golden/make_pretrained_golden.py

Each is a folder as transformers writes it, of a few KB, and golden.npz with tokens, which of them
are padding, and the logits. Those that are there stay as they are; delete a folder to make it
again, with the same seed. Made with torch 2.13 and 2.14 and transformers 5.24.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent / "pretrained"
VOCAB, LENGTH = 20, 14
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.5],
    "long_factor": [4.0],
}
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}
GEMMA = SIZES | {"head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 4}
MODELS = {
    "gpt2": ("gpt2", {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}),
    "llama_biases_llama3": (
        "llama",
        SIZES | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama_tied_yarn": ("llama", SIZES | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "llama_dynamic": (
        "llama",
        SIZES | {"max_position_embeddings": 6, "head_dim": 6, "rope_parameters": DYNAMIC},
    ),
    "llama_linear": ("llama", SIZES | {"rope_parameters": LINEAR}),
    "mistral_window": ("mistral", SIZES | {"sliding_window": 4}),
    "phi3_longrope": (
        "phi3",
        SIZES | {"original_max_position_embeddings": 8, "rope_parameters": LONG},
    ),
    "qwen2_window": (
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SIZES | {"head_dim": 6, "rope_parameters": DEFAULT}),
    "granite": (
        "granite",
        SIZES
        | {"embedding_multiplier": 1.5, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "stablelm": (
        "stablelm",
        SIZES
        | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}
        | {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
    ),
    "smollm3": ("smollm3", SIZES | {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", SIZES),
    "gpt_neox": (
        "gpt_neox",
        SIZES | {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.5}},
    ),
    "opt": ("opt", SIZES | {"ffn_dim": 12, "word_embed_proj_dim": 8}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": (
        "gemma3_text",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
            },
        },
    ),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 3}),
}


def make(name: str, seed: int) -> None:
    """Writes one folder."""
    kind, settings = MODELS[name]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, **ids, **settings)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter += 0.4 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(FOLDER / name)

    rng = np.random.default_rng(seed)
    arrays = {}
    for case, lengths in {"long": [LENGTH, LENGTH], "padded": [LENGTH, 5], "short": [6, 4]}.items():
        # Loaded again: bfloat16 rounded its frequencies, and some remember their longest text.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            FOLDER / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        length = max(lengths)
        tokens_BxL = rng.integers(0, VOCAB, (2, length))
        valid_BxL = np.arange(length) >= length - np.array(lengths)[:, None]
        mask = torch.tensor(valid_BxL, dtype=torch.long)
        logits_BxLxV = model(
            input_ids=torch.tensor(tokens_BxL),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        ).logits.numpy()
        arrays[f"{case}_tokens"] = tokens_BxL.astype(np.int32)
        arrays[f"{case}_valid"] = valid_BxL
        arrays[f"{case}_logits"] = np.where(valid_BxL[..., None], logits_BxLxV, 0)
    np.savez_compressed(FOLDER / name / "golden.npz", **arrays)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    (FOLDER / name / "model.safetensors").chmod(0o644)


def main() -> None:
    """Makes those that are missing."""
    with torch.no_grad():
        for seed, name in enumerate(MODELS):
            if not (FOLDER / name).exists():
                make(name, seed)


if __name__ == "__main__":
    main()
