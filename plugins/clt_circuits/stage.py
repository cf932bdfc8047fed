"""The stage `circuits`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clt_circuits.peer import Peer
from clt_circuits.records import Circuit, as_table
from clt_circuits.records import Circuits as Record
from clt_plugins import Checks, Fault, Faults, Refused, StageInfo, build, write_json

if TYPE_CHECKING:
    from clt_circuits import CircuitsConfig
    from clt_plugins import Context, CrossLayerTranscoder, Job

FORMATS = ("circuit-tracer", "transcoder-set", "gemma-scope-2")
"""The formats that circuit-tracer reads: the first, for features that write to their own layer, with a skip path."""


class Circuits:
    """Writes `circuits.json`, and `graphs/SLUG.json` for each prompt."""

    def __init__(self, config: CircuitsConfig, context: Context):
        self.config = config
        self.exporter: Any = build(config.format, context)
        self.info = StageInfo(
            folder=config.folder, needs="transcoder", every=config.every, record="circuits.json", keeps_older=True
        )

    def check(self, job: Job) -> None:
        slugs(self.config.prompts)
        if self.config.format.name not in FORMATS:
            text = f"{self.config.format.name!r} is not read by circuit-tracer: use one of {', '.join(FORMATS)}"
            raise Refused("stages.circuits.format", text)
        peer = Peer.find(self.config.python)
        model = language_model(job.transcoder)[0]
        if isinstance(self.exporter, Checks):
            texts = self.exporter.check(job.transcoder)
            if texts:
                raise Faults(Fault(("stages", "circuits", "format"), text) for text in texts)
        peer.check(model=model, backend=self.config.backend, device=self.config.device)

    def run(self, job: Job) -> None:
        config, handed_over = self.config, job.folder / "transcoder"
        handed_over.mkdir()
        self.exporter.export(job.transcoder, handed_over)
        model, revision = language_model(job.transcoder)
        graphs = job.folder / "graphs"
        request = {
            "transcoder": str(handed_over),
            "model": model if revision is None else at_revision(model, revision),
            "prompts": list(zip(slugs(config.prompts), config.prompts, strict=True)),
            "backend": config.backend,
            "device": config.device,
            "max_logits": config.max_logits,
            "logit_probability": config.logit_probability,
            "max_features": config.max_features,
            "batch_size": config.batch_size,
            "node_threshold": config.node_threshold,
            "edge_threshold": config.edge_threshold,
            "scan": config.scan or f"/{Path(model).name}",
            "graphs": str(graphs) if config.graphs else None,
        }
        result = Peer.find(config.python).trace(request, job.folder)
        shutil.rmtree(handed_over)
        circuits = [
            Circuit(**{**graph, "logits": [(text, probability) for text, probability in graph["logits"]]})
            for graph in result["graphs"]
        ]
        if config.graphs:
            for circuit in circuits:
                describe(graphs / f"{circuit.slug}.json", config, result["versions"])
        record = Record(
            replacement=statistics.fmean(circuit.replacement for circuit in circuits),
            completeness=statistics.fmean(circuit.completeness for circuit in circuits),
            graphs=circuits,
            versions=result["versions"],
            made_from=job.made_from,
        )
        job.show(as_table(record), record)
        write_json(job.folder / "circuits.json", record)
        job.log({"circuits/replacement": record.replacement, "circuits/completeness": record.completeness})


def language_model(transcoder: CrossLayerTranscoder) -> tuple[str, str | None]:
    """The language model that a transcoder is of: a folder, as an absolute path, or a name on the model hub, then
    perhaps with a revision.

    Raises:
        Refused: it is not known.
    """
    described = transcoder.model_described()
    name = described.get("path")
    if not name:
        raise Refused("stages.circuits", "the language model is not known: there must be a [model] in the recipe")
    path = Path(name).expanduser()
    return (str(path.resolve()), None) if path.is_dir() else (str(name), described.get("revision"))


def at_revision(name: str, revision: str) -> str:
    """The folder of a language model at a revision: by its name, circuit-tracer would load the newest one.

    Raises:
        OSError: it is not in the hub's cache, and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        tables = ["*.json", "*.txt", "*.model", "*.jinja"]
        folder = snapshot_download(name, revision=revision, allow_patterns=[*tables, "*.safetensors"])
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, allow_patterns=[*tables, "*.bin"])
    except (HfHubHTTPError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise OSError(f"model.path: {name} at revision {revision} cannot be had from the hub: {text}") from error
    return folder


def slugs(prompts: list[str]) -> list[str]:
    """A name for the file of each prompt: its first words, and a digest so that no two are the same."""
    names = []
    for prompt in prompts:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:32].strip("-")
        names.append(f"{words or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}")
    if len(set(names)) < len(names):
        raise Refused("stages.circuits.prompts", "the same prompt stands there twice")
    return names


def describe(file: Path, config: CircuitsConfig, versions: dict[str, str | None]) -> None:
    """Add to a graph's `metadata` what Neuronpedia's schema has room for: by what it was made, and how."""
    graph = json.loads(file.read_text(encoding="utf-8"))
    metadata: dict[str, Any] = graph["metadata"]
    metadata["info"] = {
        "generator": {
            "name": "circuit-tracer",
            "version": str(versions.get("circuit-tracer")),
            "url": "https://github.com/decoderesearch/circuit-tracer",
        }
    }
    metadata["generation_settings"] = {
        "max_n_logits": config.max_logits,
        "desired_logit_prob": config.logit_probability,
        "batch_size": config.batch_size,
        "max_feature_nodes": config.max_features,
    }
    metadata["pruning_settings"] = {"node_threshold": config.node_threshold, "edge_threshold": config.edge_threshold}
    if config.feature_details:
        metadata["feature_details"] = dict(config.feature_details)
    file.write_text(json.dumps(graph, indent=1), encoding="utf-8")
