"""The stage `report`: what was collected, made into files by one of `reports`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clt_plugins import Checks, Collected, Fault, Faults, Refused, StageInfo, build, read_facts, run_of

if TYPE_CHECKING:
    from clt_plugins import Context, Job
    from clt_reports import ReportConfig


class ReportStage:
    """Writes the files of a report, and `report.json`."""

    def __init__(self, config: ReportConfig, context: Context):
        self.config = config
        self.report: Any = build(config.format, context)
        self.info = StageInfo(
            folder=f"reports/{config.folder or config.format.name}",
            needs="transcoder",
            every=config.every,
            record="report.json",
            reads=(config.collected,),
            may_read=("evaluation",),
        )

    def check(self, job: Job) -> None:
        if isinstance(self.report, Checks):
            texts = self.report.check(job.transcoder)
            if texts:
                raise Faults(Fault(("stages", "report", "format"), text) for text in texts)

    def run(self, job: Job) -> None:
        if job.root is None:
            raise Refused(
                "stages.report",
                "the transcoder is in no run: write what its features do with `collect PLACE --out STORE`, then use "
                "`report STORE --out FOLDER`",
            )
        collected = job.root / self.config.collected
        facts = read_facts(run_of(collected), job.made_from.transcoder, job.root / "evaluation")
        self.report.write(Collected.open(collected), facts, job.folder)
