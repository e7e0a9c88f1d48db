"""Text data as batches of token ids, from TFDS datasets or text files, without TensorFlow.

    data = load(config.data, context)
    for batch in train_iterator(data.train, context=context, batch=64, seed=0): ...

`B` is the batch size, `L` the context, and `N` and `M` are the numbers of tokens of the splits.
"""

from swe_prune.data.char_tokenizer import CharTokenizer
from swe_prune.data.dataset import TextData, Tokenizer, load
from swe_prune.data.overlap import check_disjoint
from swe_prune.data.sources import read_named
from swe_prune.data.windows import Batch, eval_batches, random_batches, train_iterator

__all__ = [
    "Batch",
    "CharTokenizer",
    "TextData",
    "Tokenizer",
    "check_disjoint",
    "eval_batches",
    "load",
    "random_batches",
    "read_named",
    "train_iterator",
]
