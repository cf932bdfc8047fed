"""The model card: metadata that the hub reads, and a text for people. All of it comes from files; nothing is invented.

`huggingface_hub` writes the metadata, and reads it back as a check.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clt_hub.facts import Facts
from clt_hub.scores import TASK, layer_table, model_index, score_table, scores
from clt_plugins import Refused, __version__, read_small, toml_text

MARK = "<!-- made by `clt-plugins push`: text of your own goes in by its settings `before` and `after` -->"
TAGS = ("transcoder", "mechanistic-interpretability", "interpretability", "sparse-features")
PAPER = "https://transformer-circuits.pub/2025/attribution-graphs/methods.html"
CIRCUIT_TRACER = "https://github.com/decoderesearch/circuit-tracer"


def card(facts: Facts) -> str:
    """The content of README.md.

    Raises:
        Refused: a file of the user's text is missing, or the card is not what the hub can read.
    """
    from huggingface_hub import ModelCard

    lines = [MARK, "", *_own_text(facts.config.before), *_body(facts), *_own_text(facts.config.after)]
    text = f"---\n{_metadata(facts)}\n---\n\n" + "\n".join(lines).rstrip() + "\n"
    read: Any = ModelCard(text).data  # raises where the hub could not read it
    if len(read.eval_results or []) != len(scores(facts)) or read.license != facts.config.license:
        raise AssertionError("the card does not say what it was made of")
    return text


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    config = facts.config
    tags = [
        "per-layer-transcoder" if facts.per_layer else "cross-layer-transcoder",
        *TAGS,
        *(["circuit-tracer"] if facts.circuit_tracer() is not None else []),
        *config.tags,
    ]
    results = model_index(facts)
    data = ModelCardData(
        library_name="clt-plugins",
        license=config.license,
        license_name=config.license_name,
        license_link=config.license_link,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        tags=list(dict.fromkeys(tags)),
        pipeline_tag=TASK,
        model_name=facts.place.repository.split("/")[1] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _own_text(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return [read_small(path).decode("utf-8-sig").rstrip(), ""]
    except UnicodeDecodeError as error:
        raise Refused(path, f"not text in UTF-8: {error.reason}") from error


def _body(facts: Facts) -> Iterator[str]:
    place = facts.place
    title = place.folder.split("/")[-1] if place.folder else place.repository.split("/")[1]
    model = f"`{facts.base_model}`" if facts.base_model else "a language model that the files do not name"
    yield f"# {title}"
    yield ""
    kind = "per-layer" if facts.per_layer else "cross-layer"
    writes = (
        "write what that MLP writes"
        if facts.per_layer
        else ("together write what the MLPs of this and all later layers write")
    )
    yield (
        f"A {kind} transcoder of {model}: sparse features that read what the MLP of a layer reads, and {writes} "
        f"([Ameisen et al. 2025]({PAPER})). It stands in for the MLPs, so that a prompt's computation can be followed "
        "from feature to feature."
    )
    yield ""
    yield from _sizes(facts)
    yield from _scores(facts)
    yield from _loading(facts)
    yield from _training(facts)
    yield from _limits(facts)


def _sizes(facts: Facts) -> Iterator[str]:
    described, model = facts.described, facts.described["model"]
    yield "| | |"
    yield "| --- | --- |"
    if facts.base_model:
        revision = f", revision `{model['revision']}`" if model.get("revision") else ""
        yield f"| language model | `{facts.base_model}`{revision} |"
    layers = model.get("layers")
    which = f": {', '.join(map(str, layers))}" if layers else ""
    yield f"| layers | {described['layers']}{which} |"
    yield f"| features per layer | {described['features']:,} |"
    yield f"| features | {described['layers'] * described['features']:,} |"
    yield f"| d_model | {described['d_model']:,} |"
    for key, name in (("inputs", "reads, in each block"), ("outputs", "reconstructs, in each block")):
        default = "the MLP's input" if key == "inputs" else "what the MLP adds to the residual stream"
        yield f"| {name} | {f'`{model[key]}`' if model.get(key) else default} |"
    for key in ("encoder", "activation", "tying", "normalisation"):
        if described.get(key):
            yield f"| {key} | {_choice(described[key])} |"
    if described.get("dtype"):
        yield f"| type of the weights | {described['dtype']} |"
    if described.get("tokens") is not None:
        yield f"| trained on | {described['tokens']:,} tokens, {described.get('step') or 0:,} steps |"
    yield ""


def _choice(table: Any) -> str:
    if isinstance(table, str):
        return f"`{table}`"
    rest = ", ".join(f"{key} = {_short(value)}" for key, value in table.items() if key != "name")
    return f"`{table.get('name')}`" + (f" ({rest})" if rest else "")


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _scores(facts: Facts) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if not scores(facts):
        yield "Not evaluated."
        yield ""
        return
    report = facts.evaluation or {}
    if report:
        text = f" of {facts.text}" if facts.text else ""
        in_model = f"; in the language model {report['model']['tokens']:,}" if report.get("model") else ""
        yield f"On {report['tokens']:,} held-out tokens{text}{in_model}."
        yield ""
    yield from score_table(facts)
    yield ""
    if lines := layer_table(facts):
        yield "By layer:"
        yield ""
        yield from lines
        yield ""
    yield from report.get("notes") or []


def _loading(facts: Facts) -> Iterator[str]:
    place = facts.place
    yield "## Loading"
    yield ""
    yield "With clt-plugins (`pip install clt-plugins`); `@REVISION` after the name pins a commit, tag or branch:"
    yield ""
    yield "```python"
    yield "from clt_plugins import CrossLayerTranscoder"
    yield ""
    yield f'transcoder = CrossLayerTranscoder.load("{str(place).removeprefix("hf://")}")'
    yield "features = transcoder.encode(mlp_inputs)  # of [tokens, layers, d_model]; dense() [tokens, layers, features]"
    yield "mlp_outputs = transcoder(mlp_inputs)  # the reconstruction, [tokens, layers, d_model]"
    yield "```"
    yield ""
    if facts.recipe is not None:
        yield "Its scores again, on the recipe's own held-out text:"
        yield ""
        yield "```bash"
        yield f"python -m clt_plugins evaluate {place!s}"
        yield "```"
        yield ""
    folder, revision = facts.circuit_tracer(), facts.described["model"].get("revision")
    if folder is None or not facts.base_model:
        return
    name = "/".join(part for part in (place.repository, folder) if part)
    name += f"@{place.revision}" if place.revision else ""
    yield f"With [circuit-tracer]({CIRCUIT_TRACER}), installed from its git repository:"
    yield ""
    yield "```python"
    yield "import torch"
    yield "from circuit_tracer import ReplacementModel, attribute"
    yield ""
    if revision:  # by its name circuit-tracer loads the newest one
        yield "from transformers import AutoModelForCausalLM"
        yield ""
        yield f'language_model = AutoModelForCausalLM.from_pretrained("{facts.base_model}", revision="{revision}")'
        yield "model = ReplacementModel.from_pretrained("
        yield f'    "{facts.base_model}", "{name}", hf_model=language_model, dtype=torch.float32'
        yield ")"
    else:
        yield f'model = ReplacementModel.from_pretrained("{facts.base_model}", "{name}", dtype=torch.float32)'
    yield 'graph = attribute("The capital of France is", model)'
    yield "```"
    yield ""


def _training(facts: Facts) -> Iterator[str]:
    yield "## Training"
    yield ""
    if facts.datasets:
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets)
        yield f"Data: {links}."
        yield ""
    elif facts.text:
        yield f"Data: {facts.text}."
        yield ""
    if facts.conversion is not None:
        yield "After training its selection of features was replaced by thresholds at the same L0 in every layer."
        yield ""
    if facts.versions is not None:
        libraries = facts.versions.get("libraries") or {}
        shown = [f"{name} {libraries[name]}" for name in ("torch", "transformers", "datasets") if name in libraries]
        own = f"clt-plugins {facts.versions.get('clt_plugins')}, Python {facts.versions.get('python')}"
        yield f"Trained with {', '.join([own, *shown])}. This card was made by clt-plugins {__version__}."
        yield ""
    if facts.recipe is not None:
        yield "<details><summary>The recipe, every setting written out (`recipe.toml`)</summary>"
        yield ""
        yield "```toml"
        yield toml_text(facts.recipe).rstrip()
        yield "```"
        yield ""
        yield "</details>"
        yield ""
    else:
        yield "How it was trained is not on record."
        yield ""


def _limits(facts: Facts) -> Iterator[str]:
    report = facts.evaluation
    yield "## Limits"
    yield ""
    yield (
        f"- It is for {facts.base_model or 'its language model'} at the sites above only; other checkpoints of that "
        "model, fine-tuned ones too, have other activations."
    )
    if report is None:
        yield "- It was not evaluated: what it misses of the MLPs is not known."
    elif report.get("nmse") is not None:
        yield (
            f"- It leaves {report['nmse']:.1%} of the variance of the MLPs' outputs unexplained (mean over layers, on "
            "text like that which it was trained on; on other text more). A graph has that as error nodes."
        )
    if report is not None and not report.get("model"):
        yield "- What the language model loses with it in the place of its MLPs was not measured."
    if not facts.circuits:
        yield "- Replacement and completeness of attribution graphs were not measured."
    yield "- It says nothing of attention: a graph takes the attention patterns of the prompt as they are."
    yield "- A feature is a direction that is sparse on the training text, no proven cause: test it by interventions."
    yield ""
