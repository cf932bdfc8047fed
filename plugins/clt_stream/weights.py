"""Whether a model's weights are all in its checkpoint, and all of its checkpoint in the model.

transformers draws what is missing at random and goes on, so each start would see another model. It also leaves out what
the model has no place for; inside the layers, that is another model than the trained one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from clt_plugins import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHOWN = 4
"""Names of weights in a message."""

NOT_LEARNT = re.compile(r"(masked_bias|(attn|attention)\.bias|inv_freq|(cos|sin)_cached|position_ids)$")
"""Old checkpoints hold masks and tables that today are computed."""


def check_weights(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> None:
    """Refuse a model that is not the one in its checkpoint. Only an output head may be missing, with a warning.

    Args:
        info: what `from_pretrained` tells with `output_loading_info`.
        name: of the checkpoint, for the message.

    Raises:
        Refused: weights are missing, have other shapes, cannot be read, or have no place in the layers of the model.
    """
    missing = sorted(info["missing_keys"])
    lost = [key for key in missing if not _is_of_head(model, key)]
    if lost:
        raise Refused("model.path", f"{name!r} lacks {_some(lost)}: is the checkpoint whole, and of this config.json?")
    mismatched = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"])
    if mismatched:
        raise Refused("model.path", f"{name!r} has {_some(mismatched)} in other shapes than its config.json says")
    if info.get("error_msgs"):
        raise Refused("model.path", f"{name!r} cannot be read: {' '.join(str(info['error_msgs'][0]).split())[:300]}")
    unused = sorted(key for key in info["unexpected_keys"] if _is_of_layer(model, key) and not NOT_LEARNT.search(key))
    if unused:
        raise Refused(
            "model.path",
            f"{name!r} holds {_some(unused)}, but {type(model).__name__} has no place for that: is config.json "
            f"the right one?",
        )
    if missing:
        log.warning(
            f"{name} has no output head ({_some(missing)}): activations are right, but do not evaluate in the model "
            f"(stages.evaluate.model_tokens = 0)"
        )


def _is_of_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight comes after all layers: outside of the model that gives hidden states."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model:
        return not key.startswith(prefix)
    head = model.get_output_embeddings()
    return head is not None and any(
        key.endswith(f"{path}.{end}") for path in _paths(model, head) for end in ("weight", "bias")
    )


def _is_of_layer(model: PreTrainedModel, key: str) -> bool:
    """Whether a name in the checkpoint is one of a weight in a layer."""
    prefix = f"{model.base_model_prefix}."
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return any(key.startswith((f"{path}.", f"{path.removeprefix(prefix)}.")) for path in lists)


def _paths(model: nn.Module, module: nn.Module) -> list[str]:
    return [path for path, other in model.named_modules() if other is module]


def _some(names: Collection[str]) -> str:
    """The first names of a list, and how many there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return (
        f"{len(names)} tensors ({shown}, ...)"
        if len(names) > SHOWN
        else f"the tensors {shown}"
        if len(names) > 1
        else f"the tensor {shown}"
    )
