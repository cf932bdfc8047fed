"""What a plan has to know of `stream`: sizes by the language model's configuration, without weights, text or tokenizer.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from clt_plugins import Outline, Refused
from clt_stream.known import known

if TYPE_CHECKING:
    from clt_plugins import Context
    from clt_stream import StreamConfig

PASS_NUMBERS = 12
"""Numbers per token and dimension that a forward pass of a language model has alive at most: the residual stream, the
MLP's neurons before and after their activation. (An MLP of 4 D neurons without a gate needs 10, with one 14.)"""
KEPT_NUMBERS = 20
"""Numbers per token, layer and dimension that a forward pass keeps for its backward pass: 34 bytes in Korthikanti et
al. 2022 (arXiv 2205.05198) for numbers of 2 bytes, without scores of attention; an MLP with a gate has more."""
LOGITS = 8
"""Numbers per token and word of the vocabulary: logits of both models, their logarithms, and gradients of them."""
REMEDY = "give --n-layers and --d-model"


class Model(NamedTuple):
    """What is known of a language model; 0 where it is not."""

    n_layers: int
    d_model: int
    layer_parameters: int
    parameters: int


def outline(config: StreamConfig, context: Context) -> Outline:
    """See `Spec.outline`.

    Raises:
        Refused: nothing here knows the model's sizes; says what to give.
    """
    recipe = context.recipe
    settings = recipe.model if recipe is not None else None
    if recipe is None or settings is None:
        raise Refused("model", 'required, but missing: the source "stream" reads a language model')
    model = _given(settings, context)
    dtype = getattr(torch, settings.dtype)
    batch = context.batch_share()
    if config.buffer_tokens < batch:
        raise Refused("source.buffer_tokens", f"{config.buffer_tokens} is less than a batch of {batch} tokens")
    row = 2 * model.n_layers * model.d_model * dtype.itemsize
    in_pass = config.model_batch * config.context
    rows = block_rows(config, batch, recipe.train.eval_tokens)
    beside = settings.device in ("auto", recipe.transcoder.device)
    return Outline(
        n_layers=model.n_layers,
        d_model=model.d_model,
        row_bytes=row,
        buffer_bytes={settings.device if config.buffer_device == "auto" else config.buffer_device: rows * row},
        model_bytes=model.parameters * dtype.itemsize if beside else 0,
        text_tokens=config.context,
        text_bytes=_text_bytes(config, model, dtype) if beside else 0,
        pass_bytes=PASS_NUMBERS * in_pass * model.d_model * dtype.itemsize if beside else 0,
        model_parameters=model.layer_parameters,
        model_dtype=settings.dtype,
    )


def _text_bytes(config: StreamConfig, model: Model, dtype: torch.dtype) -> int:
    kept = KEPT_NUMBERS * model.n_layers * model.d_model * dtype.itemsize
    # At most: embeddings of positions are among these parameters, and an LM head of its own counts twice.
    vocabulary = (model.parameters - model.layer_parameters) // max(1, model.d_model)
    return config.context * (kept + LOGITS * vocabulary * torch.float32.itemsize)


def block_rows(config: StreamConfig, batch_tokens: int, eval_tokens: int, *, parts: int = 1) -> int:
    """Rows in memory at the peak: a block and the held-out rows, each read to the end of its last forward pass.

    Args:
        parts: blocks that share the buffer.
    """
    block = config.buffer_tokens // parts // batch_tokens * batch_tokens
    return parts * block + eval_tokens + (parts + 1) * config.model_batch * config.context


def _given(settings: Any, context: Context) -> Model:
    """The model of the recipe, its layers and width as the user has given them, if so."""
    if context.n_layers:
        try:
            model = find(settings, hub=False)
        except Refused:
            model = Model(0, 0, 0, 0)
        return model._replace(n_layers=context.n_layers, d_model=context.d_model)
    model = find(settings)
    if settings.layers is None:
        return model
    if settings.layers[-1] >= model.n_layers:
        raise Refused("model.layers", f"expected ascending numbers below {model.n_layers}, got {settings.layers}")
    # What lies above the last layer that is read is not run.
    share = (settings.layers[-1] + 1) / model.n_layers
    return model._replace(n_layers=len(settings.layers), layer_parameters=round(share * model.layer_parameters))


def find(settings: Any, *, hub: bool = True) -> Model:
    """Sizes of the model in `[model]`: from its folder, the hub's cache, the table of known models, or the hub.

    Raises:
        Refused: none of them has it.
    """
    from clt_stream.model import locate

    path, options = locate(settings)
    if Path(path).is_dir():
        return _of_config(settings, path, options)
    try:
        return _of_config(settings, path, {**options, "local_files_only": True})
    except Refused:
        pass  # it is not in the cache
    if sizes := known(path):
        return Model(sizes.layers, sizes.d_model, sizes.layer_parameters, sizes.parameters)
    if not hub:
        raise Refused("model.path", f"{path!r} is not known")
    try:
        return _of_config(settings, path, options)
    except Refused as refused:
        raise Refused("model.path", f"{refused.faults[0].text}; or {REMEDY}") from refused


def _of_config(settings: Any, path: str, options: dict[str, Any]) -> Model:
    """Sizes by a configuration: a model is made of it that has no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from clt_stream.model import loaded

    config = loaded(lambda: AutoConfig.from_pretrained(path, **options), str(settings.path), "model.path")
    text = config.get_text_config()
    n_layers, d_model = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size"))
    if not (isinstance(n_layers, int) and isinstance(d_model, int)):
        kind = type(config).__name__
        raise Refused("model.path", f"{settings.path!r}: its {kind} does not say layers and width: {REMEDY}")

    def build() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    model: Any = loaded(build, str(settings.path), "model.path")
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    at_ends = {id(p) for part in ends for p in part.parameters()}
    counts = {id(p): p.numel() for p in model.parameters()}
    return Model(n_layers, d_model, sum(n for key, n in counts.items() if key not in at_ends), sum(counts.values()))
