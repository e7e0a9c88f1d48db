"""Conversion between the vision tower in config.json and `VisionConfig`.

The published Phi-3-vision names its tower and not the sizes, which are those of the defaults of
`VisionConfig`. A tower of other sizes has them in a group `vision_config`, as transformers writes
it for CLIP. How many crops an image may have is in preprocessor_config.json.

Source: https://huggingface.co/microsoft/Phi-3-vision-128k-instruct (config.json);
https://github.com/huggingface/transformers, models/clip/configuration_clip.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from swe_prune.bounds import COUNT, POSITIVE
from swe_prune.config import VisionConfig
from swe_prune.errors import InputError, check_choice, shown
from swe_prune.interop.families import ACTIVATIONS
from swe_prune.models.vision import check

PREPROCESSOR = "preprocessor_config.json"
TOWER = "openai/clip-vit-large-patch14-336"
_SIZES = {
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_size": "width",
    "intermediate_size": "hidden",
    "image_size": "image",
    "patch_size": "patch",
}
_EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


def read_vision(hf: Mapping[str, Any]) -> VisionConfig:
    """Returns the vision tower of a config.json.

    Raises:
        InputError: If the tower or the way its features are put into the text is not supported.
    """
    for key, wanted in _EMBEDDING.items():
        given = _group(hf, "embd_layer").get(key, wanted)
        if given != wanted:
            raise InputError(
                f"config.json has embd_layer.{key} = {given!r}, which is not supported; supported "
                f"is {wanted!r}"
            )
    tower, sizes = _group(hf, "img_processor"), _group(hf, "vision_config")
    name = tower.get("model_name", TOWER)
    if tower.get("name", "clip_vision_model") != "clip_vision_model" or (
        name != TOWER and not sizes
    ):
        raise InputError(
            f"config.json has the vision tower {name!r}, whose sizes are not known; supported are "
            f"{TOWER!r}, and another CLIP tower with its sizes in vision_config"
        )
    fields: dict[str, Any] = {}
    for key, field in _SIZES.items():
        fields[field] = sizes.get(key, getattr(VisionConfig(), field))
        COUNT.check(fields[field], f"vision_config.{key} in config.json")
    act = sizes.get("hidden_act", "quick_gelu")
    check_choice(act or "", ACTIVATIONS, "vision_config.hidden_act in config.json")
    epsilon = sizes.get("layer_norm_eps", 1e-5)
    POSITIVE.check(epsilon, "vision_config.layer_norm_eps in config.json")
    vision = VisionConfig(
        activation=ACTIVATIONS[act],  # type: ignore[arg-type]
        norm_epsilon=float(epsilon),
        **fields,
    )
    try:
        check(vision)
    except InputError as error:
        where = "vision_config in config.json: "
        raise InputError(str(error).replace("config.model.vision.", where, 1)) from None
    for key, wanted in (("image_dim_out", vision.width), ("num_img_tokens", vision.cells**2)):
        if tower.get(key, wanted) != wanted:
            raise InputError(
                f"config.json has img_processor.{key} = {tower[key]!r}, and the tower gives "
                f"{wanted}; correct vision_config"
            )
    return vision


def write_vision(vision: VisionConfig) -> dict[str, Any]:
    """Returns the settings of config.json for a vision tower, the inverse of `read_vision`."""
    written: dict[str, Any] = {
        "embd_layer": dict(_EMBEDDING),
        "img_processor": {
            "image_dim_out": vision.width,
            "model_name": TOWER,
            "name": "clip_vision_model",
            "num_img_tokens": vision.cells**2,
        },
    }
    if dataclasses.replace(vision, crops=VisionConfig.crops) != VisionConfig():
        acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        written["vision_config"] = {
            **{key: getattr(vision, field) for key, field in _SIZES.items()},
            "hidden_act": acts[vision.activation],
            "layer_norm_eps": vision.norm_epsilon,
        }
    return written


def read_crops(preprocessor: Mapping[str, Any], path: object = PREPROCESSOR) -> int:
    """Returns how many crops an image may have by a preprocessor_config.json.

    Args:
        preprocessor: Content of the file.
        path: Path of the file, for the sentence.

    Raises:
        InputError: If the number is none.
    """
    crops = preprocessor.get("num_crops", VisionConfig.crops)
    COUNT.check(crops, f"num_crops in {path}")
    return crops


def vision_sizes(vision: VisionConfig, count: int, largest: int) -> dict[str, tuple[int, int]]:
    """Returns by name each size of a tower, and the most that the tensors of a file allow.

    Args:
        vision: Sizes of the tower.
        count: Number of tensors.
        largest: Size of the longest axis of them.
    """
    return {
        "the tower's layers": (vision.layers, count),
        "the tower's width": (vision.width, largest),
        "the tower's MLP": (vision.hidden, largest),
        "the tower's positions": ((vision.image // vision.patch) ** 2, largest),
    }


def _group(hf: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = {} if hf.get(name) is None else hf[name]
    if not isinstance(group, Mapping):
        raise InputError(f"{name} in config.json must be a mapping, got {shown(group)}")
    return group
