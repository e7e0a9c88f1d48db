"""Linen models that know nothing of pruning.

gpt        the decoder, one for all families: `build`, and how its parameters are divided
block      attention and MLP
attention  the attention itself
places     where tokens stand, and the cache of those before them
rope       rotary positions

One legend for the letters that carry shapes in names (`x_BxLxD`), here and in the whole package:

    B  batch, sequences           V  vocabulary, symbols
    L  length, tokens             N  B * L, tokens of the whole batch as one axis
    D  model width                F  hidden width of the MLP
    H  attention heads            K  width of one head
    G  heads of keys and values   T  tokens whose keys are there to be seen
    R  inputs of a kernel         C  outputs of a kernel (a Flax Dense kernel is R x C)
    Q  queries of one part of the attention, S those of all heads of a group, H // G * Q
"""
