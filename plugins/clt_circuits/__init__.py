"""The stage `circuits`: attribution graphs of prompts, made and scored by circuit-tracer itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import Attribute, field, frozen, validators

from clt_plugins import FREE_ON_RESUME, FREE_TEXT, Selected, Spec, default_choice, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context

_positive: Any = validators.gt(0)
_share: Any = [validators.ge(0), validators.le(1)]


def _texts(_: Any, attribute: Attribute[Any], value: list[str]) -> None:
    if not value or not all(text.strip() for text in value):
        raise ValueError(f"'{attribute.name}' must be texts, at least one, and none of them empty")


@frozen(kw_only=True)
class CircuitsConfig:
    """Attribution graphs of prompts and their replacement and completeness scores, made by circuit-tracer (Ameisen et
    al. 2025) where it is installed: of its git repository, not the package of that name on PyPI."""

    prompts: list[str] = field(validator=_texts, metadata={"example": ["def test_copy(self):"], **FREE_TEXT})
    """The texts to trace: what follows each is attributed to its tokens and features."""
    python: str | None = field(default=None, metadata=FREE_ON_RESUME)
    """The Python interpreter that has circuit-tracer, which needs older libraries than this project:
    "circuit-tracer/bin/python". If not given, the one that runs this."""
    format: Annotated[Selected, "exports"] = default_choice("circuit-tracer")
    """How the transcoder is handed over, with settings such as `input_hook`: `circuit-tracer`; `transcoder-set` where
    features write to their own layer only; `gemma-scope-2` where there is a skip path."""
    backend: Literal["transformerlens", "nnsight"] = "transformerlens"
    """What circuit-tracer runs the language model with. `nnsight` knows Gemma, Llama, Qwen 3 and GPT-OSS."""
    device: str = field(default="cpu", metadata=FREE_ON_RESUME)
    """Where circuit-tracer works: "cpu", "cuda"."""
    max_logits: int = field(default=10, validator=_positive)
    """Attribute so many of the likeliest next tokens, at most."""
    logit_probability: float = field(default=0.95, validator=_share)
    """Fewer, if they already have this probability together."""
    max_features: int = field(default=7500, validator=_positive)
    """Keep so many of the active features, the most influential ones, at most. Fewer features mean lower scores."""
    batch_size: int = field(default=256, validator=_positive, metadata=FREE_ON_RESUME)
    """Nodes per backward pass."""
    graphs: bool = True
    """Also write each graph as JSON: for circuit-tracer's page, for Neuronpedia, and for `report`."""
    node_threshold: float = field(default=0.8, validator=_share)
    """The JSON keeps the nodes that have this share of all influence. Scores are of the whole graph."""
    edge_threshold: float = field(default=0.98, validator=_share)
    """The JSON keeps the edges that have this share of the influence between these nodes."""
    scan: str | None = field(default=None, metadata=FREE_TEXT)
    """The name of this set of features in the JSON: for Neuronpedia the model's id there. circuit-tracer's page reads
    local features if it begins with "/"; "/MODEL" if not given."""
    feature_details: dict[str, str] = field(factory=dict, metadata=FREE_TEXT)
    """Where Neuronpedia finds features: `neuronpedia_source_set`, or `feature_json_base_url`."""
    folder: str = "circuits"
    """The folder of the result; a second such stage in one recipe needs another."""
    every: int | None = field(default=None, validator=validators.optional(_positive), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints."""


def build_circuits(config: CircuitsConfig, context: Context) -> Any:
    from clt_circuits.stage import Circuits

    return Circuits(config, context)


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("circuits", CircuitsConfig, build_circuits)]
