"""What stays dense by default, under the names that the usual frameworks give it.

A name is a path whose parts are separated by "/" (JAX) or "." (a torch state dict).
"""

from collections.abc import Mapping

_START, _END = r"(?:^|[/.])", r"(?:[/.]|$)"

# Parts before a head, none of which is an attention: "attention/head_0" is not an output head.
_NOT_IN_ATTENTION = r"^(?:(?!\w*att(?:n|ention))[^/.]*[/.])*"

_HEAD = (
    r"(?!multi|\w*att(?:n|ention))(?:\w+_)?"
    r"(?:(?:head|heads|logits|classifier)(?:_(?:dense|layer|proj|projection|\d+))*"
    r"|embed_out|output_layer|score|unembed\w*)"
)

DENSE_BY_DEFAULT: Mapping[str, str] = {
    # lm_head, logits_dense, classifier; GPT-NeoX's embed_out, Megatron's output_layer, the score of
    # a sequence classifier, BERT's cls/predictions, Meta's output at the top.
    "output head": rf"(?i){_NOT_IN_ATTENTION}{_HEAD}{_END}"
    rf"|{_START}cls[/.]predictions{_END}"
    r"|^(?:params[/.])?output[/.](?:weight|kernel)$",
    # Token and position tables, and single learned tokens: wte, pos_emb, cls_token, T5's
    # relative_attention_bias.
    "embedding": rf"(?i)embed|{_START}(?:w[tp]e|(?:\w+_)?embs?"
    r"|(?:\w+_)?(?:cls|class|mask|dist|register)_tokens?"
    r"|(?:\w+_)?rel(?:ative)?_(?:pos(?:ition)?|attention)_bias\w*"
    rf"|(?:\w+_)?pos(?:ition(?:al)?)?_(?:enc(?:oding)?s?|table)){_END}",
    # What chooses experts. A gated MLP also has a gate: "mlp/gate/kernel" beside up and down, and
    # "gate_proj" in a state dict, where "mlp.gate" is a router.
    "router": rf"(?i){_START}(?:(?:\w+_)?routers?(?:_\w+)?|shared_expert_gate|gating_network){_END}"
    rf"|{_START}(?:(?:\w+_)?moe(?:_\w+)?|mixture_of_experts)[/.]gate{_END}"
    r"|(?:^|\.)(?:mlp|ffn|feed_forward)\.gate\.(?:weight|wg\.weight)$",
    "norm": rf"(?i)norm|{_START}(?:ln\w*|rms(?:_\w+)?){_END}",
    # By name, since a bias may have two axes: of a DenseGeneral, or stacked by a scan.
    "bias": rf"(?i){_START}bias{_END}|[/.](?:b|beta)(?:/value)?$",
    "scale": rf"(?i){_START}(?:scale|gamma|gain)(?:/value)?$|[/.]g(?:/value)?$",
}
"""Kinds of weights that stay dense by default, each with the rule that matches it."""
