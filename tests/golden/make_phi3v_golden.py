"""Makes the golden model of tests/phi3v_test.py: Phi-3-vision of CLIP's tower and Phi-3, by torch.

    python tests/golden/make_phi3v_golden.py

Transformers has no Phi-3-vision, so the oracle is its `CLIPVisionModel` and `Phi3ForCausalLM`, and
between them the image embedding of the published remote code written down again in torch. Written
are a folder with the published names of tensors, and golden.npz with pictures, what torch and PIL
make of them, hidden states, and logits. Made with torch 2.14 and transformers 5.24; those that are
there stay as they are.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "phi3_v"
VOCAB, IMAGE, PATCH, CROPS = 20, 8, 2, 4
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
CLIP = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
PHI3 = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FACTORS = {"short_factor": [1.0, 1.3, 1.7], "long_factor": [1.5, 3.0, 6.0]}
SIZES = {"wide": (40, 13), "high": (9, 30), "square": (24, 24)}
TEXT = {"before": 3, "after": 5}


def hd_transform(image: Image.Image) -> tuple[Image.Image, int, int]:
    """Returns the padded image, as the remote code makes it; widths and heights in crops."""
    width, height = image.size
    on_side = width < height
    if on_side:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        width, height = image.size
    ratio, scale = width / height, 1
    while scale * np.ceil(scale / ratio) <= CROPS:
        scale += 1
    scale -= 1
    new_width = int(scale * IMAGE)
    new_height = int(new_width / ratio)
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    target = int(np.ceil(new_height / IMAGE) * IMAGE)
    padded = Image.new("RGB", (new_width, target), (255, 255, 255))
    padded.paste(image, (0, int((target - new_height) / 2)))
    if on_side:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
    return padded, padded.height // IMAGE, padded.width // IMAGE


def pixels(image: Image.Image) -> tuple[torch.Tensor, int, int]:
    """Returns the crops, 1 + rows * columns x 3 x side x side, global view first."""
    padded, rows, columns = hd_transform(image)
    x = torch.tensor(np.asarray(padded)).permute(2, 0, 1).float() / 255
    x = (x - MEAN[:, None, None]) / STD[:, None, None]
    whole = torch.nn.functional.interpolate(x[None], size=(IMAGE, IMAGE), mode="bicubic")
    own = x.reshape(1, 3, rows, IMAGE, columns, IMAGE).permute(0, 2, 4, 1, 3, 5)
    return torch.cat([whole, own.reshape(-1, 3, IMAGE, IMAGE)]), rows, columns


def embedded(features: torch.Tensor, rows: int, columns: int, parts: dict) -> torch.Tensor:
    """Returns the embeddings of one image, T x D; features are N x patches x width."""
    side = IMAGE // PATCH // 2
    width = features.shape[-1]
    x = features.reshape(-1, side, 2, side, 2, width).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(-1, side, side, 4 * width)
    glb = torch.cat([x[:1], parts["sub_GN"].repeat(1, side, 1, 1)], dim=2).reshape(-1, 4 * width)
    sub = x[1:].reshape(1, rows, columns, side, side, 4 * width).permute(0, 1, 3, 2, 4, 5)
    sub = sub.reshape(1, rows * side, columns * side, 4 * width)
    ends = parts["sub_GN"].repeat(1, rows * side, 1, 1)
    sub = torch.cat([sub, ends], dim=2).reshape(-1, 4 * width)
    joined = torch.cat([sub, parts["glb_GN"][0], glb])
    first = torch.nn.functional.linear(joined, *parts["first"])
    return torch.nn.functional.linear(torch.nn.functional.gelu(first), *parts["second"])


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a model whose weights are large enough that every part matters."""
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def models() -> tuple[torch.nn.Module, torch.nn.Module, dict, dict]:
    """Returns tower, decoder, the parts between them, and the config.json."""
    torch.manual_seed(0)
    clip = moved(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)))
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS}
    config = transformers.Phi3Config(**PHI3, rope_parameters=rope, attn_implementation="eager")
    phi3 = moved(transformers.Phi3ForCausalLM(config))
    folded, width = 4 * CLIP["hidden_size"], PHI3["hidden_size"]
    parts = {
        "glb_GN": torch.randn(1, 1, folded),
        "sub_GN": torch.randn(1, 1, 1, folded),
        "first": (0.3 * torch.randn(width, folded), torch.randn(width)),
        "second": (0.3 * torch.randn(width, width), torch.randn(width)),
    }
    hf = PHI3 | {
        "model_type": "phi3_v",
        "architectures": ["Phi3VForCausalLM"],
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "su", **FACTORS},
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "embd_layer": {"hd_transform_order": "sub_glb", "with_learnable_separator": True},
        "img_processor": {"name": "clip_vision_model", "image_dim_out": 8, "num_img_tokens": 4},
        "vision_config": CLIP,
    }
    return clip, phi3, parts, hf


def tensors(clip: torch.nn.Module, phi3: torch.nn.Module, parts: dict) -> dict:
    """Returns all tensors by their published names."""
    place = "model.vision_embed_tokens."
    tower = f"{place}img_processor.vision_model."
    found = dict(phi3.state_dict())
    for name, value in clip.state_dict().items():
        found[tower + name.removeprefix("vision_model.")] = value
    found[f"{tower}embeddings.position_ids"] = torch.arange((IMAGE // PATCH) ** 2 + 1)[None]
    found[f"{place}wte.weight"] = phi3.get_input_embeddings().weight
    found |= {f"{place}{name}": parts[name] for name in ("glb_GN", "sub_GN")}
    for number, name in ((0, "first"), (2, "second")):
        found[f"{place}img_projection.{number}.weight"] = parts[name][0]
        found[f"{place}img_projection.{number}.bias"] = parts[name][1]
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def main() -> None:
    """Makes the folder if it is missing."""
    if FOLDER.exists():
        return
    FOLDER.mkdir()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        clip, phi3, parts, hf = models()
        save_file(tensors(clip, phi3, parts), FOLDER / "model.safetensors", {"format": "pt"})
        (FOLDER / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        settings = json.dumps({"num_crops": CROPS}) + "\n"
        (FOLDER / "preprocessor_config.json").write_text(settings)
        arrays = {}
        for name, (width, height) in SIZES.items():
            image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            crops, rows, columns = pixels(Image.fromarray(image))
            out = clip(pixel_values=crops, output_hidden_states=True)
            image_embeds = embedded(out.hidden_states[-2][:, 1:], rows, columns, parts)
            ids = torch.tensor(rng.integers(3, VOCAB, sum(TEXT.values())))
            words = phi3.get_input_embeddings()(ids)
            at = TEXT["before"]
            embeds = torch.cat([words[:at], image_embeds, words[at:]])[None]
            arrays |= {
                f"{name}_image": image,
                f"{name}_pixels": crops.permute(0, 2, 3, 1).numpy(),
                f"{name}_grid": np.array([rows, columns]),
                f"{name}_hidden": torch.stack(out.hidden_states).numpy(),
                f"{name}_pooled": out.pooler_output.numpy(),
                f"{name}_embeds": image_embeds.numpy(),
                f"{name}_ids": ids.numpy(),
                f"{name}_logits": phi3(inputs_embeds=embeds).logits[0].numpy(),
            }
        np.savez_compressed(FOLDER / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
