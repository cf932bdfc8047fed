"""What circuit-tracer itself does: load a transcoder, make attribution graphs of prompts, score them.

This file runs in an environment that has circuit-tracer, which needs other versions than this project, so it imports
nothing of it. Its tool is https://github.com/decoderesearch/circuit-tracer; the package `circuit-tracer` on PyPI is an
old fork of other people.

    python tracer.py < QUESTION.json        print whether it can be done, as JSON; see `answer`
    python tracer.py REQUEST.json           do it; see `main`
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("circuit-tracer", "transformer-lens", "nnsight", "transformers", "torch")


def installed() -> dict[str, Any]:
    """The versions of what matters, and whether it is the real circuit-tracer."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    try:
        from circuit_tracer.frontend.local_server import serve
    except ImportError as error:
        return {"versions": versions, "fault": f"cannot import circuit_tracer: {error}"}
    # Not in the fork on PyPI, whose version number is higher.
    real = "features_dir" in inspect.signature(serve).parameters
    fault = None if real else "the circuit-tracer there is the old fork of that name on PyPI"
    return {"versions": versions, "fault": fault}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Whether a prompt can be traced, before there is a transcoder.

    Args:
        question: `model`, `backend`, `device`, as in a request.

    Returns:
        `versions`; and `fault`, `backend`, `device`: what is wrong with each, or None.
    """
    told: dict[str, Any] = {**installed(), "backend": None, "device": None}
    if told["fault"] is None:
        import torch

        if question["device"].startswith("cuda") and not torch.cuda.is_available():
            told["device"] = f"{question['device']}: torch {torch.__version__} of circuit-tracer's Python finds no GPU"
        told["backend"] = unsupported(question["model"], question["backend"])
    return told


def unsupported(model: str, backend: str, hooks: tuple[str, ...] = ()) -> str | None:
    """Why the backend nnsight cannot trace a model; None where it can. TransformerLens says so when it loads one."""
    if backend != "nnsight":
        return None
    from circuit_tracer.utils.tl_nnsight_mapping import get_mapping
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(model).architectures[0]
    try:
        known = get_mapping(architecture).feature_hook_mapping
    except ValueError as error:
        return f"nnsight: {error}"
    missing = [hook for hook in hooks if hook not in known]
    return f"nnsight: no hook {missing[0]!r} of {architecture}, only {sorted(known)}" if missing else None


def load_transcoder(folder: str, scan: str, device: str) -> Any:
    """The transcoder of a folder in one of circuit-tracer's layouts, in float32.

    By the folder's name circuit-tracer's own `load_transcoder_from_hub` loads the first layout only.
    """
    import torch
    import yaml
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt, load_gemma_scope_2_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    described = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    options: dict[str, Any] = {name: described[name] for name in ("feature_input_hook", "feature_output_hook")}
    options |= {"scan": scan, "device": torch.device(device), "dtype": torch.float32}
    if described["model_kind"] == "transcoder_set":
        layers = range(len(list(Path(folder).glob("layer_*.safetensors"))))
        files = {layer: str(Path(folder, f"layer_{layer}.safetensors")) for layer in layers}
        return load_transcoder_set(files, activation=described.get("activation"), k=described.get("k"), **options)
    if "transcoders" in described:
        files = {layer: str(Path(folder, name)) for layer, name in enumerate(described["transcoders"])}
        return load_gemma_scope_2_clt(files, **options)
    return load_clt(folder, **options)


def load_model(model: str, transcoder: Any, backend: str, device: str) -> Any:
    """The language model with the transcoder, as `attribute` needs it.

    Args:
        model: a folder, or a name that circuit-tracer loads from the model hub.
        backend: "transformerlens" or "nnsight".
    """
    import torch
    from circuit_tracer import ReplacementModel

    def load(name: str) -> Any:
        return ReplacementModel.from_pretrained_and_transcoders(
            name, transcoder, backend=backend, device=torch.device(device), dtype=torch.float32
        )

    if backend == "nnsight" or not Path(model).is_dir():
        return load(model)
    with tempfile.TemporaryDirectory() as folder, _transformer_lens_reads_folders():
        # TransformerLens also guesses by words in the name, "llama" or "gemma"; this one has none.
        link = Path(folder, "local")
        link.symlink_to(Path(model).resolve(), target_is_directory=True)
        loaded = load(str(link))
    loaded.cfg.tokenizer_name = model
    return loaded


@contextmanager
def _transformer_lens_reads_folders() -> Iterator[None]:
    """TransformerLens can read config and weights from a folder, but first looks for its name among those it knows."""
    from transformer_lens import loading_from_pretrained as loading
    from transformers import GPT2Config

    official = loading.get_official_model_name
    loading.get_official_model_name = lambda name: name if Path(name).is_dir() else official(name)
    # It asks for a setting of GPT-2 that newer configs have under this name only.
    GPT2Config.attribute_map.setdefault("n_ctx", "n_positions")
    try:
        yield
    finally:
        loading.get_official_model_name = official


def tokens_of(model: Any, prompt: str) -> Any:
    """The ids of a prompt, [T], with a special token first: circuit-tracer gives position 0 no features."""
    import torch

    tokenizer = model.tokenizer
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    special = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    first = next((token for token in special if token is not None), None)
    # circuit-tracer puts one there itself, but never the one whose id is 0.
    if first is not None and (not len(tokens) or int(tokens[0]) not in tokenizer.all_special_ids):
        tokens = torch.cat([torch.tensor([first]), tokens])
    return tokens.long()


def trace(model: Any, prompt: str, slug: str, request: dict[str, Any]) -> dict[str, Any]:
    """Make and score the graph of a prompt; write it, pruned, to `SLUG.json` in the folder `graphs`."""
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores, prune_graph
    from circuit_tracer.utils.create_graph_files import create_graph_files

    start = time.monotonic()
    graph = attribute(
        tokens_of(model, prompt),
        model,
        max_n_logits=request["max_logits"],
        desired_logit_prob=request["logit_probability"],
        max_feature_nodes=request["max_features"],
        batch_size=request["batch_size"],
    )
    replacement, completeness = compute_graph_scores(graph)
    result = {
        "slug": slug,
        "prompt": prompt,
        "tokens": int(graph.n_pos),
        "logits": [[str(target.token_str), float(probability)] for target, probability in _targets(graph)],
        "active_features": len(graph.active_features),
        "features": len(graph.selected_features),
        "edges": int((graph.adjacency_matrix != 0).sum()),
        "replacement": float(replacement),
        "completeness": float(completeness),
    }
    if request["graphs"] is not None:
        thresholds = {name: request[name] for name in ("node_threshold", "edge_threshold")}
        pruned = prune_graph(graph, **thresholds)
        result["pruned_features"] = int(pruned.node_mask[: len(graph.selected_features)].sum())
        create_graph_files(graph, slug, request["graphs"], scan=request["scan"], **thresholds)
    return {**result, "seconds": time.monotonic() - start}


def _targets(graph: Any) -> list[tuple[Any, Any]]:
    return list(zip(graph.logit_targets, graph.logit_probabilities.tolist(), strict=True))


def main(path: str) -> None:
    """Trace prompts.

    Args:
        path: a JSON file with `transcoder` (its folder), `model` (a folder or a name on the hub), `prompts` (pairs of a
            name and a text), `backend`, `device`, the arguments of `attribute` and `prune_graph`, `scan`, `graphs` (a
            folder for JSON files, or null) and `result` (the file to write).
    """
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    transcoder = load_transcoder(request["transcoder"], request["scan"], request["device"])
    hooks = transcoder.feature_input_hook, transcoder.feature_output_hook
    fault = unsupported(request["model"], request["backend"], hooks)
    if fault is not None:
        sys.exit(fault)
    model = load_model(request["model"], transcoder, request["backend"], request["device"])
    graphs = []
    for number, (slug, prompt) in enumerate(request["prompts"], 1):
        graphs.append(trace(model, prompt, slug, request))
        print(f"{number}/{len(request['prompts'])} {slug}: {graphs[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    Path(request["result"]).write_text(json.dumps({**installed(), "graphs": graphs}), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        print(json.dumps(answer(json.load(sys.stdin))))
