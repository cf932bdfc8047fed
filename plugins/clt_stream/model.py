"""Loading the language model and its tokenizer: a hub id, a local folder, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clt_plugins import Refused
from clt_stream.identity import special_tokens
from clt_stream.library_errors import is_about_revision, one_line, reason
from clt_stream.weights import check_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(settings: Any, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """The model, in eval mode and without gradients, and its tokenizer.

    Args:
        settings: the recipe's `[model]`: `path`, `gguf_file`, `tokenizer`, `revision`, `dtype`, `device`.
        device: where the model goes if `settings.device` is "auto".

    Raises:
        Refused: there is no such folder, file, hub model or revision; it is gated, or broken; the hub does not answer.
    """
    from transformers import AutoModelForCausalLM

    path, options = locate(settings)
    tokenizer = _load_tokenizer(settings, path, options)
    dtype = getattr(torch, settings.dtype)
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    model, info = loaded(lambda: AutoModelForCausalLM.from_pretrained(path, **options), settings.path, "model.path")
    check_weights(model, info, str(settings.path))
    # In training mode a model with dropout would give random activations.
    model.eval().requires_grad_(False)
    # Packed contexts have no mask. Without this the model would look for padding, and warn, at each pass.
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
    target = device if settings.device == "auto" else usable_device(settings.device, "model.device")
    try:
        model.to(target)
    except torch.OutOfMemoryError as error:
        raise Refused(
            "model.device", f"{target} has too little memory for {settings.path!r} in {settings.dtype}"
        ) from error
    return model, tokenizer


def locate(settings: Any) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: a folder or hub id, and options.

    Raises:
        Refused: a local path does not exist or holds no model, or a GGUF file cannot be read here.
    """
    path, gguf_file, gguf_setting = str(settings.path), settings.gguf_file, "model.gguf_file"
    local = Path(path).expanduser()
    if local.suffix == ".gguf" and not gguf_file:
        local, gguf_file, gguf_setting = local.parent, local.name, "model.path"
    is_local = local.exists() or path.startswith(("/", ".", "~")) or path.endswith(".gguf")
    if is_local:
        path = str(local)
        if not local.is_dir():
            raise Refused("model.path", f"no folder {path!r}")
        if gguf_file and not (local / gguf_file).is_file():
            raise Refused(gguf_setting, f"no file {gguf_file!r} in {path!r}")
        if not gguf_file and not (local / "config.json").is_file():
            raise Refused("model.path", f"{path!r} holds no model: there is no config.json in it")
    options: dict[str, Any] = {"trust_remote_code": False}  # not given, transformers asks at a terminal
    if settings.revision and not is_local:
        options["revision"] = settings.revision
    if gguf_file:
        _need_gguf(gguf_setting)
        options["gguf_file"] = gguf_file
    return path, options


def _load_tokenizer(settings: Any, path: str, options: dict[str, Any]) -> Any:
    """The tokenizer that the recipe names, else the model's.

    Raises:
        Refused: it cannot be loaded, or there is none.
    """
    from transformers import AutoTokenizer

    setting, name = "model.path", str(settings.path)
    if settings.tokenizer:
        setting, name, options = "model.tokenizer", str(settings.tokenizer), {"trust_remote_code": False}
        local = Path(name).expanduser()
        if name.startswith(("/", ".", "~")) and not local.is_dir():
            raise Refused(setting, f"no folder {name!r}")
        path = str(local) if local.is_dir() else name
    remedy = "name a folder or hub id that has one" if settings.tokenizer else "set model.tokenizer"
    nothing = Refused(setting, f"{name!r} has no tokenizer: {remedy}")
    folder = Path(path)
    if folder.is_dir() and "gguf_file" not in options and not any(map(_is_of_tokenizer, folder.iterdir())):
        raise nothing
    try:
        tokenizer = loaded(lambda: AutoTokenizer.from_pretrained(path, **options), name, setting, "the tokenizer of ")
    except Refused as refused:
        if "instantiate the backend tokenizer" in str(refused.__cause__):
            raise nothing from refused
        raise
    if _is_empty(tokenizer):
        raise nothing
    return tokenizer


def _is_of_tokenizer(file: Path) -> bool:
    return re.search(r"token|vocab|merges|spiece|sentencepiece|\.spm$|\.model$|tekken|bpe", file.name) is not None


TRIED = 100
"""About how many words of a tokenizer are tried."""


def _is_empty(tokenizer: Any) -> bool:
    """Whether it is the stand-in that transformers makes where there are no files: it knows no words."""
    others = sorted({*tokenizer.get_vocab().values()} - {*special_tokens(tokenizer)})
    # By its own words: a vocabulary may be digits only. The first ones may all be bytes or unknown.
    known = {
        tuple(tokenizer(tokenizer.decode([number]), add_special_tokens=False)["input_ids"])
        for number in others[:: max(1, len(others) // TRIED)]
    }
    return len({ids for ids in known if set(ids) - {tokenizer.unk_token_id}}) < 2


def _need_gguf(setting: str) -> None:
    try:
        # transformers imports them only after it has read a part of the file.
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        text = f"a GGUF file is read with the package {error.name}: pip install 'clt-plugins[gguf]'"
        raise Refused(setting, text) from error


def loaded(load: Callable[[], Any], name: str, setting: str, part: str = "") -> Any:
    """What `load` returns.

    Args:
        part: which part of it, for the message.

    Raises:
        Refused: it failed. It calls nothing but `from_pretrained`, which reads what the user named and fails in many
            ways where that is wrong or damaged (OSError, KeyError, struct.error, ...).
    """
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if setting == "model.path" and is_about_revision(error):
            setting = "model.revision"
        raise Refused(setting, reason(error, name, part)) from error


def usable_device(name: str, setting: str) -> torch.device:
    """A device by its name.

    Raises:
        Refused: there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(setting, f"{name!r} cannot be used here: {one_line(error)}") from error
    return device
