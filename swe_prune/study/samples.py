"""What a model writes, how it repeats itself, and how far it is from the dense one."""

import base64
import dataclasses
import io
from typing import Any

import numpy as np
from jaxtyping import PyTree

from swe_prune import data as data_lib
from swe_prune.data import images
from swe_prune.data.image_text import ImageTextData, chosen
from swe_prune.evaluation import GREEDY, Protocol, generate, kl_to_dense
from swe_prune.evaluation.prices import price_errors
from swe_prune.evaluation.repetition import mean_repetition
from swe_prune.study.experiment import Experiment

THUMBNAIL = 160  # pixels of the longer side of a picture in a result


def sampled(
    experiment: Experiment, name: str, params: PyTree, dense: PyTree | None = None
) -> dict[str, Any]:
    """Returns what a result says of a model beside its loss; nothing where no prompt is given.

    Args:
        experiment: Experiment with settings, text and model.
        name: Name of the model in the result: "dense", "control", "pruned", "finetuned".
        params: Parameters of the model.
        dense: Parameters of the dense model to compare with; None: not compared.

    Returns:
        NAME_samples: prompt and text of each; NAME_repetition: the share of 3-grams that stood in
        the text before, mean over the texts; and with `dense` NAME_kl, nats per token from it on
        the validation windows, and NAME_agreement, the share of tokens whose likeliest is the same.
        Of a model of images and text instead NAME_prices, `evaluation.prices.PriceErrors`; NAME_mae
        of the prices that it generates; and NAME_answers, some of its answers.
    """
    if isinstance(experiment.data, ImageTextData):
        return _prices(experiment, name, params, experiment.data)
    settings = experiment.config.samples
    if not settings.prompts:
        return {}
    tokenizer = experiment.data.tokenizer
    prompts = [tokenizer.encode(prompt).tolist() for prompt in settings.prompts]
    found = generate(experiment.model, params, prompts, settings.tokens, sampling=GREEDY, seed=0)
    result: dict[str, Any] = {
        f"{name}_samples": [
            {"prompt": prompt, "text": tokenizer.decode(np.asarray(tokens, np.int32))}
            for prompt, tokens in zip(settings.prompts, found.tokens, strict=True)
        ],
        f"{name}_repetition": mean_repetition(found.tokens),
    }
    if dense is not None:
        config = experiment.config
        windows = data_lib.eval_batches(
            experiment.data.validation,
            context=config.window,
            windows=config.data.eval_windows,
            batch=config.data.eval_batch,
        )
        tokens = np.concatenate([batch["inputs"].ravel() for batch in windows])
        protocol = Protocol("validation windows", window=config.window, stride=config.window)
        distance = kl_to_dense(
            experiment.model, dense, params, tokens, protocol, batch=config.data.eval_batch
        )
        result |= {f"{name}_kl": distance.nats_per_token, f"{name}_agreement": distance.agreement}
    return result


def _prices(
    experiment: Experiment, name: str, params: PyTree, data: ImageTextData
) -> dict[str, Any]:
    """Returns the errors of the prices that a model reads, and some of its answers."""
    settings = experiment.config.data
    numbers = chosen(data.validation, settings.eval_windows)
    found = price_errors(
        experiment.model,
        params,
        data.validation,
        numbers,
        data.tokenizer,
        batch=settings.eval_batch,
    )
    result = dataclasses.asdict(found)
    answers = result.pop("prices")[: experiment.config.samples.pictures]
    if name == "dense":  # once for all models of the seed
        for one in answers:
            row = data.validation.rows[one["number"]]
            one["picture"] = _thumbnail(images.open_image(row.image(), row.where))
    return {
        f"{name}_prices": result,
        f"{name}_mae": found.generated["own"],
        f"{name}_answers": answers,
    }


def _thumbnail(image: Any) -> str:
    """Returns a small PNG of an image of Pillow, as base64."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
