"""Logits of tiny models of every family equal those of transformers, which loads our folders."""

import numpy as np
import pytest
from interop_tiny import (
    CONFIGS,
    VOCAB,
    assert_logits_close,
    decoded,
    folder,
    left_padded,
    logits,
    model,
)

from swe_prune import interop

torch = pytest.importorskip("torch", reason="compares with transformers, which runs on torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

LONG, SHORT = 24, 7  # tokens: beyond every original context of the configs, and within
PROMPT = 6
OTHERS = ("qwen2 window", "qwen3", "granite", "stablelm parallel", "smollm3 window", "olmo2",
          "gpt_neox", "opt", "gemma2", "gemma3_text", "mixtral")  # fmt: skip
DECODED = ("gpt2", "llama tied", "llama dynamic", "llama llama3", "mistral", "phi3 longrope",
           *OTHERS)  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home, made = tmp_path_factory.mktemp("models"), {}

    def of(name, dtype="float32"):
        if (name, dtype) not in made:
            made[name, dtype] = folder(home / f"{name} {dtype}", name, dtype)
        return made[name, dtype]

    return of


def theirs(path, dtype=torch.float32):
    """Loaded again: scalings that follow the length remember the longest they met."""
    settings = {"dtype": dtype, "attn_implementation": "eager"}  # no other caps the scores
    loader = transformers.AutoModelForCausalLM
    loaded, found = loader.from_pretrained(path, output_loading_info=True, **settings)
    assert not any(found.values()), found
    return loaded.eval()


def their_logits(loaded, tokens_BxL, valid_BxL=None):
    inputs = {"input_ids": torch.tensor(tokens_BxL, dtype=torch.long)}
    if valid_BxL is not None:
        mask = torch.tensor(valid_BxL, dtype=torch.long)
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return loaded(**inputs).logits.float().numpy()


def tokens(length, batch=2):
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length)).astype(np.int32)


@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_texts(folders, name, length):
    path, made = folders(name)
    x_BxL = tokens(length)
    assert_logits_close(logits(made, x_BxL), their_logits(theirs(path), x_BxL))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_padded_on_the_left(folders, name):
    path, made = folders(name)
    x_BxL, valid_BxL = left_padded([LONG, 9, 3], LONG)
    found = logits(made, x_BxL, valid_BxL)
    wanted = their_logits(theirs(path), x_BxL, valid_BxL)
    assert_logits_close(found[valid_BxL], wanted[valid_BxL])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")  # the one name that all have
@pytest.mark.parametrize("name", DECODED)
def test_a_prompt_and_then_one_token_at_a_time(folders, name):
    path, made = folders(name)
    loaded, x_BxL, cache, wanted = theirs(path), tokens(LONG), None, []
    steps = [slice(0, PROMPT), *(slice(at, at + 1) for at in range(PROMPT, LONG))]
    for step in steps:
        ids = torch.tensor(x_BxL[:, step], dtype=torch.long)
        out = loaded(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        wanted.append(out.logits.numpy())
    assert_logits_close(decoded(made, x_BxL, PROMPT), np.concatenate(wanted, axis=1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "phi3 longrope", "qwen3", "gemma2",
                                  "olmo2", "gpt_neox"])  # fmt: skip
def test_in_bfloat16_the_error_is_no_larger_than_theirs(folders, name):
    """Root mean square over all logits, against float32 of the same bfloat16 parameters.

    The two round at other places, so neither equals the other; 1.25 leaves room for chance.
    """
    path, made = folders(name, "bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16
    x_BxL = tokens(LONG, batch=8)
    exact = logits(made, x_BxL)
    found = logits(interop.load(path, compute_dtype="bfloat16"), x_BxL)
    other = their_logits(theirs(path, torch.bfloat16), x_BxL)
    ours, errors = (np.sqrt(np.mean((one - exact) ** 2)) for one in (found, other))
    assert 0 < ours <= 1.25 * errors
    assert errors < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["gpt2 untied", "llama biases", "mistral", "phi3", "stablelm",
                                  "gemma3_text nested", *OTHERS])  # fmt: skip
def test_a_folder_that_transformers_wrote(tmp_path, name):
    """With its spelling of the config, and in shards."""
    made = model(name)
    config = transformers.AutoConfig.for_model(**made.hf_config)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    x_BxL = tokens(LONG)
    assert_logits_close(logits(interop.load(tmp_path), x_BxL), their_logits(theirs, x_BxL))
