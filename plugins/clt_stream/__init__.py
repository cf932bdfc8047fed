"""The activation source `stream`: MLP inputs and outputs of a Hugging Face language model, as it reads text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import HubOrPath, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class StreamConfig:
    """Runs the model of `[model]` over text and hands out its activations, shuffled, without storing them.

    Memory: one block of `buffer_tokens` rows, each of 2 x layers x d_model numbers in the model's dtype (4.8 GB for
    GPT-2 small in float32 at the default size), besides the model itself.
    """

    text: HubOrPath = field(default=HubOrPath("python-stdlib"))
    """What the model reads: "python-stdlib" (the sources and help texts that come with Python), a .txt, .jsonl or
    .parquet file, a folder of such files of one kind, or the id of a data set on the Hugging Face hub."""
    subset: str = ""
    """The configuration of a hub data set, where it has several ("sample-10BT")."""
    split: str = "train"
    """The split of a hub data set."""
    text_column: str = "text"
    """The column of a data set, or field of a JSON line, that holds the text."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What counts as one document in .txt files: a whole file, a paragraph (up to a blank line) or a line."""
    streaming: bool = False
    """Read a data set as it comes, in its own order, instead of first storing it whole and shuffling its documents."""
    held_out: float = field(default=0.05, validator=[validators.ge(0), validators.lt(1)])
    """Share of the documents kept for evaluation and never trained on; chosen by a hash of each document, so the same
    ones in every run, whatever its seed, and equal documents fall on the same side."""
    context: int = field(default=128, validator=validators.gt(1))
    """Tokens in one context window. Longer documents go on in further contexts."""
    pack: bool = True
    """Fill contexts with several short documents, which do not see each other; otherwise each piece of a document has
    a context of its own, padded on the right. (Models without support for packing are padded anyway.)"""
    skip_first: int = field(default=1, validator=validators.ge(0))
    """How many positions at the start of each document (and of each further piece of one) are left out: models park
    attention on them, and their activations are hundreds of times larger than the others."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether each piece begins with the beginning-of-sequence token: "auto" where the tokenizer itself adds it. Like
    all special tokens it is read by the model but left out of the batches."""
    model_batch: int = field(default=16, validator=validators.gt(0))
    """Contexts in one forward pass of the model."""
    buffer_tokens: int = field(default=65536, validator=validators.gt(0))
    """Rows in the block within which tokens are shuffled, on each rank; at least a batch."""
    buffer_device: str = "auto"
    """Where the block lies: "auto" is the model's device; "cpu" spares the memory of a GPU."""


def build_stream(config: StreamConfig, context: Context) -> Any:
    from clt_stream.source import Stream

    return Stream(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("stream", StreamConfig, build_stream)]


@hookimpl
def clt_check(recipe: Any) -> list[str]:
    config = recipe.source.config
    if not isinstance(config, StreamConfig):
        return []
    faults = []
    if recipe.model is None:
        faults.append('model: required, but missing: the source "stream" reads a language model')
    if config.skip_first >= config.context:
        faults.append(
            f"source.skip_first: must be less than source.context, which is {config.context}: {config.skip_first}"
        )
    return faults
