"""Where numbers that are not finite come from, asked once scores are lost already.

Letters as in `model`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minifuse.config import ModelConfig
from minifuse.dense import plain_passage, run_passages
from minifuse.linear import PackedWeight, Weight, dequantize
from minifuse.model import LayerParams, Params


def named_weights(params: Params) -> Iterator[tuple[str, Weight]]:
    """Every weight with a name for messages; layers are asked for once, in order."""
    for name in ("embed", "final_norm", "lm_head"):
        yield name, getattr(params, name)
    for index, layer in enumerate(params.layers):
        for field in LayerParams._fields:
            if getattr(layer, field) is not None:
                yield f"{field} of layer {index}", getattr(layer, field)


def widen(weight: Weight) -> Tensor:
    """A weight as floats: a quantized one as what it stands for."""
    return dequantize(weight, torch.float32) if isinstance(weight, PackedWeight) else weight


def explain_lost_scores(
    params: Params, config: ModelConfig, dtype: torch.dtype, prompts: Sequence[Sequence[int]]
) -> str:
    """Why scores are not finite: a weight that is not, or the layer in which it happens.

    Looks at every weight first, then runs the prompts once more, each by itself, eagerly.

    prompts: token ids of plain prompts
    """
    for name, weight in named_weights(params):
        lost = int((~widen(weight).isfinite()).sum())
        if lost:
            values = "value that is" if lost == 1 else "values that are"
            return f"{name} has {lost} {values} not finite: the checkpoint is damaged"
    floats = params._replace(
        embed=widen(params.embed),
        lm_head=widen(params.lm_head),
        layers=[
            layer._replace(
                wqkv=widen(layer.wqkv),
                wo=widen(layer.wo),
                w_gate_up=widen(layer.w_gate_up),
                w_down=widen(layer.w_down),
            )
            for layer in params.layers
        ],
    )
    hidden: list[list[Tensor]] = []
    passages = [plain_passage(prompt) for prompt in prompts]
    reach = max(map(len, prompts))
    run_passages(config, floats, passages, dtype, config.rope_length(reach), hidden=hidden)
    name = str(dtype).removeprefix("torch.")
    for index, states in enumerate(hidden):
        if not all(bool(x.isfinite().all()) for x in states):
            return (
                f"they arise in layer {index}, whose numbers are too large for {name}: try another "
                "dtype, such as float32"
            )
    return (
        f"no layer loses them on a prompt by itself, in {name}: try float32, and report it if that "
        "does not help"
    )
