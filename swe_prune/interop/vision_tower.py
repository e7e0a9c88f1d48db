"""Loading of CLIP's vision tower from the folder of a CLIP model."""

from pathlib import Path
from typing import Any

from swe_prune.arguments import checked
from swe_prune.config import ModelConfig, VisionConfig
from swe_prune.errors import InputError
from swe_prune.interop.folder_files import check_model_folder
from swe_prune.interop.load_params import Shardings, match, read_params
from swe_prune.interop.safetensors_folder import read_folder
from swe_prune.interop.slices import bind
from swe_prune.interop.stranger_files import check_inside, check_sizes, read_json
from swe_prune.interop.tensor_names import CLIP
from swe_prune.interop.vision_settings import read_vision, vision_sizes


@checked
def load_vision_tower(
    path: str | Path, *, dtype: str | None = None, shardings: Shardings = None
) -> tuple[VisionConfig, dict[str, Any]]:
    """Loads the vision tower of a CLIP model, for `models.vision.VisionTower`.

    The names of its tensors may begin with `vision_model.`, as transformers 4 wrote them, or not.
    Of a whole CLIP model the text tower is not read.

    Args:
        path: Path of a Hugging Face folder.
        dtype: Dtype of the parameters: "float32", "bfloat16" or "float16". If None, as stored.
        shardings: Shardings of the parameters under "vision", as in `load`.

    Returns:
        The sizes of the tower, and its parameters.

    Raises:
        InputError: If there is no CLIP model at the path, or it is incomplete or damaged.
    """
    path = Path(path)
    check_model_folder(path)
    check_inside(path, ("config.json",))
    hf = read_json(path / "config.json")
    kinds = {"clip_vision_model": hf, "clip": hf.get("vision_config")}
    sizes = kinds.get(str(hf.get("model_type")))
    if not sizes:
        raise InputError(
            f"{path} has model_type {hf.get('model_type')!r} and no CLIP vision tower; give the "
            "folder of a clip or clip_vision_model"
        )
    try:
        vision = read_vision({"vision_config": sizes})
    except InputError as error:
        raise InputError(str(error).replace("config.json", str(path / "config.json"), 1)) from None
    source = read_folder(path)
    largest = max((size for one in source.entries.values() for size in one.shape), default=0)
    count = len(source.entries)
    check_sizes(vision_sizes(vision, count, largest), count, largest, path)
    bound = bind(CLIP, ModelConfig(layers=1, heads=1, width=2, vision=vision), 1)
    names = match(source, bound, CLIP, {}, str(path))
    return vision, read_params(source, bound, names, dtype, shardings)["vision"]
