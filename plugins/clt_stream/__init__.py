"""The activation source `stream`: MLP inputs and outputs of a Hugging Face language model as it reads text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, HubOrPath, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Outline, Recipe


@frozen(kw_only=True)
class StreamConfig:
    """Runs the model of `[model]` on text and yields its activations, shuffled, without storing them.

    Memory, besides the model: a block of `buffer_tokens` rows, and the held-out rows, as many as the largest evaluation
    reads (`train.eval_tokens`, `tokens` of evaluate). Each of the two needs `model_batch` x `context` rows more. Both
    are on `buffer_device`. A row has 2 x layers x d_model numbers in the model's dtype: in float32, 65536 rows of GPT-2
    small are 4.8 GB.

    On a GPU the block has two halves: the model reads into one while the other is trained on, a few passes in each
    step, on a CUDA stream of its own. (Tokens are then shuffled within a half.)

    Forward passes are divided among all ranks, but every rank tokenises all of the text. Tensor ranks send each other
    the rows, and have the same ones. With `data = N` every data rank has a block and held-out rows of its own; the
    held-out rows are read by each rank.
    """

    text: HubOrPath = field(default=HubOrPath("python-stdlib"))
    """What the model reads: "python-stdlib" (the sources and help texts that come with Python), a .txt, .jsonl or
    .parquet file, a folder with such files of one kind, or the id of a data set on the Hugging Face hub. The first two
    may be compressed (.gz, .bz2, .xz)."""
    subset: str = ""
    """The configuration of a hub data set that has several, such as "sample-10BT"."""
    split: str = "train"
    """The split of a hub data set."""
    text_column: str = "text"
    """The column of a data set, or the field of a JSON line, that holds the text."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What is one document in .txt files: a whole file, a paragraph (up to an empty line) or a line."""
    encoding_errors: Literal["refuse", "replace"] = "refuse"
    """What is done with bytes of a file that are not UTF-8: "refuse" names the file and the row before work starts,
    "replace" reads the character U+FFFD in their place, and says in how many rows."""
    streaming: bool = False
    """Read a data set while it is downloaded, in its own order. Otherwise it is stored on disk first, and its documents
    are shuffled. Files of this machine are read in their own order, too."""
    held_out: float = field(default=0.05, validator=[validators.ge(0), validators.lt(1)])
    """The share of the documents that is kept for evaluation and never trained on. A hash of each document decides, so
    the same documents are held out in every run, with any seed, and copies of a document are on the same side. Of
    "python-stdlib" a hash of each file's name decides."""
    context: int = field(default=128, validator=validators.gt(1))
    """Tokens in one context window. A longer document continues in further windows."""
    pack: bool = True
    """Put several short documents into one window; they do not see each other. Otherwise each document, or piece of a
    longer one, has a window of its own, padded on the right. A model that does not support packing gets padded
    windows in any case."""
    skip_first: int = field(default=1, validator=validators.ge(0))
    """How many positions at the start of each document, and of each further piece of a document, are left out of the
    batches. Models direct spare attention to the first positions, and the activations there are hundreds of times
    larger than elsewhere."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether each piece begins with the beginning-of-sequence token. With "auto" it does if the tokenizer adds that
    token. The model reads it, but like all special tokens it is left out of the batches."""
    model_batch: int = field(default=16, validator=validators.gt(0), metadata=FREE_ON_RESUME)
    """Context windows in one forward pass of the model. The rows do not depend on it, but for the rounding of sums."""
    buffer_tokens: int = field(default=65536, validator=validators.gt(0))
    """Rows in a block, on each data rank. Tokens are shuffled within a block, on a GPU within each half of it. At least
    a batch."""
    buffer_device: str = field(default="auto", metadata=FREE_ON_RESUME)
    """Where the block and the held-out rows are kept: "auto" is the model's device, "cpu" saves the memory of a GPU."""


def build_stream(config: StreamConfig, context: Context) -> Any:
    from clt_stream.source import Stream

    return Stream(config, context)


def outline_stream(config: StreamConfig, context: Context) -> Outline:
    from clt_stream.outline import outline

    return outline(config, context)


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("stream", StreamConfig, build_stream, outline=outline_stream)]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
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
