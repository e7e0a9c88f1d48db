"""TFDS builder for price tags composed of the handwritten digits that scikit-learn ships."""

import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from swe_prune.data.digit_prices import tags


class Builder(tfds.core.GeneratorBasedBuilder):
    """Price tags of 96 x 32 grey pixels, each with a kind of goods and a price of 1 to 999.

    The figures are scans of handwritten digits; no scan is in two splits. Position, size, contrast,
    noise and distracting lines vary. The kind of goods, which the prompt names, tells the range of
    the price and no more, so what a model knows without looking can be measured.

    | split      | tags   | scans |
    |------------|--------|-------|
    | train      | 10,000 | 1,258 |
    | validation |  1,000 |   270 |
    | test       |  1,000 |   269 |
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The scans of scikit-learn."}  # noqa: RUF012 (the name is TFDS's)

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the features: the picture, prompt and answer, and the price."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="Price tags of handwritten digits, with prompt and price as text.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(tags.HEIGHT, tags.WIDTH, 1)),
                    "prompt": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                }
            ),
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="CC BY 4.0 (the scans)",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        """Returns the examples of each split; nothing is downloaded.

        Raises:
            InputError: If scikit-learn is not installed, or has other scans.
        """
        tags.scans()
        return {split: self._generate_examples(split) for split in tags.SPLITS}

    def _generate_examples(self, split) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number, features) of each tag of a split."""
        from PIL import Image

        for number, (pixels, goods, price) in enumerate(tags.tags(split)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            file.seek(0)
            prompt = f"<|image_1|>{goods} costs"
            yield number, {"image": file, "prompt": prompt, "answer": f" {price}\n"}
