"""The three stages, as the engine runs them; the work is in `convert`, `evaluate` and the exporters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins import Checks, Fault, Faults, StageInfo, build, write_json
from clt_stages import convert as conversion
from clt_stages import evaluate as evaluation

if TYPE_CHECKING:
    from clt_plugins import Context, CrossLayerTranscoder, Job
    from clt_stages import ConvertConfig, EvaluateConfig, ExportConfig


class Convert:
    """Writes the transcoder with thresholds, and `convert.json`."""

    def __init__(self, config: ConvertConfig):
        self.config = config
        self.info = StageInfo(folder="converted", returns_transcoder=True, every=config.every, record="convert.json")

    def check(self, job: Job) -> CrossLayerTranscoder:
        transcoder, faults = job.transcoder, list[Fault]()
        converted = transcoder
        try:
            conversion.check_convertible(transcoder)
        except Faults as error:
            faults += error.faults
        try:
            self.config.targets(transcoder.n_layers, transcoder.n_features)
        except Faults as error:
            faults += error.faults
        try:
            ones = torch.ones(transcoder.shape)
            converted = conversion.with_thresholds(transcoder, ones, self.config.activation)
        except Faults as error:
            faults += error.faults
        if faults:
            raise Faults(faults)
        return converted

    def run(self, job: Job) -> CrossLayerTranscoder:
        converted, report = conversion.convert(job.transcoder, job.source, self.config)
        report = attrs.evolve(report, made_from=job.made_from)
        # Before it is written: a full disk does not take the numbers away.
        job.show(conversion.as_table(report), report)
        write_json(job.folder / "convert.json", report)
        return converted


class Evaluate:
    """Writes `evaluation.json`, and logs its numbers."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.info = StageInfo(folder=config.folder, every=config.every, record="evaluation.json", keeps_older=True)

    def check(self, job: Job) -> None:
        if job.source is not None:
            evaluation.model_tokens(job.source, self.config)

    def run(self, job: Job) -> None:
        report = attrs.evolve(evaluation.evaluate(job.transcoder, job.source, self.config), made_from=job.made_from)
        job.show(evaluation.as_table(report), report)
        write_json(job.folder / "evaluation.json", report)
        job.log(evaluation.as_metrics(report))


class Export:
    """Writes the files of an exporter, and `export.json`."""

    def __init__(self, config: ExportConfig, context: Context):
        self.config = config
        self.exporter: Any = build(config.format, context)
        name = config.folder or config.format.name
        self.info = StageInfo(folder=f"exports/{name}", needs="transcoder", every=config.every, record="export.json")

    def check(self, job: Job) -> None:
        if isinstance(self.exporter, Checks):
            texts = self.exporter.check(job.transcoder)
            if texts:
                raise Faults(Fault(("stages", "export", "format"), text) for text in texts)

    def run(self, job: Job) -> None:
        self.exporter.export(job.transcoder, job.folder)
