"""Errors of the prices that a model reads off pictures, and what they would be without looking.

The published recipe (see `data.price_rows`) reads the price off the likeliest tokens given the true
ones before them, so every figure is predicted with the true figures before it, and counts a text
without a price as 0. Here its error stands next to that of the prices that the model generates,
with the pictures, with blank ones, and with those of other examples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from swe_prune.data import images
from swe_prune.data.image_text import Split, by_bucket, filled
from swe_prune.data.price_rows import price_in
from swe_prune.evaluation.generation import generate
from swe_prune.evaluation.sampling import GREEDY

PICTURES = ("own", "blank", "shuffled")
"""What a model is shown: the picture, a white one, or that of the example before."""

Write = Callable[[np.ndarray, dict[str, np.ndarray]], list[str]]
"""Function from the numbers of a batch's examples and the pictures to show to the model's texts."""


@dataclasses.dataclass(frozen=True)
class PriceErrors:
    """Mean absolute errors of prices.

    Attributes:
        generated: Error of the generated prices by what the model was shown, over the answers that
            end with a price; None if there is none.
        unparsable: Number of generated answers without a price, by what the model was shown.
        teacher_forced: The recipe's error, unparsable prices counted as 0.
        teacher_forced_blank: The same with blank pictures.
        prices: True price, text and answer of each example, own pictures.
    """

    generated: dict[str, float | None]
    unparsable: dict[str, int]
    teacher_forced: float
    teacher_forced_blank: float
    prices: list[dict[str, Any]]


def price_errors(
    model: Any, params: PyTree, split: Split, numbers: np.ndarray, tokenizer: Any, *, batch: int
) -> PriceErrors:
    """Returns the errors of a model on the examples of a split, by greedy generation.

    Args:
        model: Model of images and text, `models.phi3v.Phi3V`.
        params: Parameters of the model.
        split: Examples.
        numbers: Numbers of the examples to evaluate on, with different prices.
        tokenizer: Tokenizer of the texts.
        batch: Number of examples at a time.
    """
    generating = _generating(model, params, split, tokenizer)
    forcing = _forced(model, params, split, tokenizer)
    answers: dict[str, dict[int, str]] = {shown: {} for shown in PICTURES}
    recipe: dict[str, dict[int, str]] = {"own": {}, "blank": {}}
    # Pictures are prepared once for all that is shown of them, a group at a time.
    for group in by_bucket(split, numbers, batch):
        own = split.pictures(group)
        for texts, write in ((answers, generating), (recipe, forcing)):
            for shown, found in texts.items():
                found |= _texts(group, _shown(own, shown), batch, write)
    truth: dict[int, Any] = {number: split.rows[number].price for number in answers["own"]}
    generated, unparsable = {}, {}
    for shown, texts in answers.items():
        found = {number: price_in(text) for number, text in texts.items()}
        errors = [abs(price - truth[n]) for n, price in found.items() if price is not None]
        generated[shown] = float(np.mean(errors)) if errors else None
        unparsable[shown] = len(found) - len(errors)
    forced = [
        np.mean([abs((price_in(text) or 0.0) - truth[number]) for number, text in texts.items()])
        for texts in recipe.values()
    ]
    prices = [
        {
            "number": number,
            "price": truth[number],
            "prompt": split.rows[number].prompt,
            "text": text,
        }
        for number, text in answers["own"].items()
    ]
    return PriceErrors(generated, unparsable, float(forced[0]), float(forced[1]), prices)


def _shown(own: dict[str, np.ndarray], shown: str) -> dict[str, np.ndarray]:
    """Returns what to show in place of the examples' own pictures, one of `PICTURES`."""
    pixels, grid = own["pixels"], own["grid"]
    if shown == "blank":
        white = ((1 - images.MEAN) / images.STD).astype(np.float32)
        pixels = np.broadcast_to(white, pixels.shape)
    elif shown == "shuffled":
        # Of another example in the batch; its grid stays with it, and the text has its tokens.
        order = np.arange(len(grid))
        for alike in np.unique(grid, axis=0):
            same = np.flatnonzero((grid == alike).all(1))
            order[same] = np.roll(same, 1)
        pixels = pixels[order]
    return {"pixels": pixels, "grid": grid}


def _texts(
    group: np.ndarray, pictures: dict[str, np.ndarray], batch: int, write: Write
) -> dict[int, str]:
    """Returns the text that a model writes for each example, by the example's number."""
    at = filled(np.arange(len(group)), batch)  # examples repeated to a whole batch
    shown = {name: values[at] for name, values in pictures.items()}
    return dict(zip(group.tolist(), write(group[at], shown), strict=False))


def _generating(model: Any, params: PyTree, split: Split, tokenizer: Any) -> Write:
    ends = {int(tokens[-1]) for tokens in split.tokens}
    longest = max(len(t) - start for t, start in zip(split.tokens, split.starts, strict=True))

    def write(rows: np.ndarray, pictures: dict[str, np.ndarray]) -> list[str]:
        made = generate(
            model,
            params,
            [split.tokens[number][: split.starts[number]] for number in rows],
            longest + 1,
            sampling=GREEDY,
            seed=0,
            eos_id=sorted(ends) if len(ends) == 1 else None,
            images=pictures,
        )
        return [tokenizer.decode(np.asarray(tokens, np.int32)) for tokens in made.tokens]

    return write


def _forced(model: Any, params: PyTree, split: Split, tokenizer: Any) -> Write:
    def write(rows: np.ndarray, pictures: dict[str, np.ndarray]) -> list[str]:
        inputs = split.batch(rows, pictures)["inputs"]
        likeliest_BxL = np.asarray(_likeliest(model, params, inputs))
        return [
            tokenizer.decode(likeliest[: len(split.tokens[number]) - 1])
            for number, likeliest in zip(rows, likeliest_BxL, strict=True)
        ]

    return write


@functools.partial(jax.jit, static_argnums=0)
def _likeliest(model: Any, params: PyTree, inputs: Any) -> Array:
    return jnp.argmax(model.apply({"params": params}, inputs), axis=-1)
