"""Loading the language model and its tokenizer: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt_plugins import Refused
from clt_stream.text.documents import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(settings: Any, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The model, ready to be read, and its tokenizer.

    Args:
        settings: the recipe's `[model]`: `path`, `gguf_file`, `tokenizer`, `revision`, `dtype`, `device`.
        device: where the model goes if its own `device` is "auto".

    Raises:
        ValueError: there is no such folder, file or hub model, or the hub cannot be reached.
    """
    import transformers
    from safetensors import SafetensorError

    path, gguf_file = str(settings.path), settings.gguf_file
    local = Path(path).expanduser()
    if local.suffix == ".gguf" and not gguf_file:
        local, gguf_file = local.parent, local.name
    is_local = local.exists() or path.startswith(("/", ".", "~")) or path.endswith(".gguf")
    if is_local:
        path = str(local)
        if not local.is_dir():
            raise Refused("model.path", f"no folder {path!r}")
        if gguf_file and not (local / gguf_file).is_file():
            raise Refused("model.gguf_file", f"no file {gguf_file!r} in {path!r}")
        if not gguf_file and not (local / "config.json").is_file():
            raise Refused("model.path", f"{path!r} holds no model: there is no config.json in it")
    # Without the word, transformers asks at a terminal whether to run a model's own code.
    options: dict[str, Any] = {"trust_remote_code": False}
    if settings.revision and not is_local:
        options["revision"] = settings.revision
    if gguf_file:
        if find_spec("gguf") is None:
            raise Refused("model.path", "GGUF files need the extra gguf: python -m pip install 'clt-plugins[gguf]'")
        options["gguf_file"] = gguf_file
    try:
        if settings.tokenizer:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(settings.tokenizer), trust_remote_code=False)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.dtype), **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        where = "" if is_local else " (not a local folder; on the hub or in its cache: is the network there?)"
        raise Refused("model.path", f"cannot load {path!r}{where}: {one_line(error)}") from error
    # Tensors of a model in training mode are random where it has dropout.
    model.eval().requires_grad_(False)
    # Packed contexts have no mask; without a padding token the model does not look for padding (and warn) at each pass.
    model.config.pad_token_id = None
    place = device if settings.device == "auto" else usable_device(settings.device, "model.device")
    model.to(place)  # type: ignore[arg-type]
    return model, tokenizer


def usable_device(name: str, key: str) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(key, f"{name!r} cannot be used here: {one_line(error)}") from error
    return device
