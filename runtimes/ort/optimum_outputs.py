"""Second names for outputs of Stable Diffusion XL's text encoders, under which optimum's pipeline looks for them."""

from __future__ import annotations

from typing import Any, Final

STATES: Final = "penultimate_hidden_state"  # ours
SECOND_NAME: Final = "hidden_states.0"
_POOLED: Final = "text_embeds"


def add_second_names(model: Any) -> None:
    """Add `hidden_states.0` to a text encoder (an `onnx.ModelProto`) that gives its penultimate states, in place.

    optimum-onnx 0.1.0 (`ORTTextEncoder.forward`) lists `hidden_states.0`, ... for as many layers as the configuration
    states, and adds `last_hidden_state`; diffusers' pipeline reads the last but one of that list. With one layer stated
    (`optimum_layout`) that is this output. The pipeline also takes the very first output for the pooled text, if that
    has two axes; so it comes first.
    """
    from onnx import helper

    outputs = {output.name: output for output in model.graph.output}
    if STATES not in outputs:
        return
    model.graph.node.append(helper.make_node("Identity", [STATES], [SECOND_NAME], name=SECOND_NAME))
    first = [name for name in outputs if name == _POOLED]
    ordered = [outputs[name] for name in dict.fromkeys((*first, *outputs))]
    copies = [type(output).FromString(output.SerializeToString()) for output in (*ordered, outputs[STATES])]
    copies[-1].name = SECOND_NAME
    del model.graph.output[:]
    model.graph.output.extend(copies)
