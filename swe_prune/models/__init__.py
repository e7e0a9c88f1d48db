"""Linen models, which contain no pruning code.

gpt        one decoder for all model families: `build`, and the partition rules of its parameters
vision     CLIP's vision tower
phi3v      Phi-3-vision, the decoder with a tower; `build` for the model of any config
block      block of the decoder and the tower: attention and MLP
checks     checks of the config
experts    MLP of sparse experts
layers     dense layers, norms and activations
attention  attention, causal or not
kv_cache   positions of tokens, and the cache of keys and values
rope       rotary position embeddings

Letters that denote shapes in names (`x_BxLxD`), here and in the whole package:

    B  batch, sequences           V  vocabulary, symbols
    L  length, tokens             N  B * L, tokens of the whole batch as one axis
    D  model width                F  hidden width of the MLP
    H  attention heads            K  width of one head
    G  heads of keys and values   T  tokens with keys and values to attend to
    R  inputs of a kernel         C  outputs of a kernel (a Flax Dense kernel is R x C)
    E  experts                    P  experts of one token
    Q  queries of one chunk of the attention, S those of all heads of a group, H // G * Q
"""
