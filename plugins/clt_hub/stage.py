"""The stage `push`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from clt_hub.card import card
from clt_hub.contents import MARKED, REPLACES, write_contents
from clt_hub.facts import Facts, gather, neutral_recipe
from clt_plugins import (
    Faults,
    HubPlace,
    Provenance,
    Refused,
    StageInfo,
    check_upload,
    has_file,
    identify,
    read_small,
    run_of,
    upload,
    write_json,
)

if TYPE_CHECKING:
    from clt_hub import PushConfig
    from clt_plugins import Job


@attrs.frozen(kw_only=True)
class Receipt:
    """`push.json`: what was pushed, and where to."""

    place: str
    """The folder on the hub."""
    commit: str | None
    """The commit; None where nothing was uploaded."""
    files: list[str]
    """What was pushed, by path in that folder."""
    made_from: Provenance | None = None
    """The transcoder, and the settings."""


def send(facts: Facts, contents: Path, made_from: Provenance | None) -> Receipt:
    """Write the files into an empty folder, and upload them where the settings say so."""
    config = facts.config
    files = write_contents(facts, contents, link=config.upload)
    commit = None
    if config.upload:
        marked = {} if config.replace_readme else MARKED
        commit = upload(
            contents, facts.place, message=config.message, private=config.private, replaces=REPLACES, marked=marked
        )
    return Receipt(place=str(facts.place), commit=commit, files=files, made_from=made_from)


def as_text(receipt: Receipt) -> str:
    """A receipt for people."""
    if receipt.commit is None:
        return f"{len(receipt.files)} files for {receipt.place}, not uploaded"
    return f"pushed {len(receipt.files)} files to {receipt.place}, commit {receipt.commit}"


class Push:
    """Uploads the run's transcoder, scores and exports; writes the card and a receipt."""

    def __init__(self, config: PushConfig):
        self.config = config
        self.info = StageInfo(folder=config.folder, needs="transcoder", record="push.json")

    def check(self, job: Job) -> None:
        where = "stages.push"
        if self.config.upload:
            try:
                check_upload(HubPlace.parse(self.config.repository))
            except Refused as refused:
                raise Refused(f"{where}.repository", str(refused)) from refused
        try:
            neutral_recipe(self.config, job.recipe)
        except Faults as error:
            raise Refused(where, "; ".join(str(error).splitlines())) from error
        for name in ("before", "after"):
            path = getattr(self.config, name)
            if path is not None:
                try:
                    read_small(path)
                except Refused as refused:
                    raise Refused(f"{where}.{name}", str(refused)) from refused

    def run(self, job: Job) -> None:
        contents = job.folder / "contents"
        contents.mkdir()
        run = run_of(job.root / "results") if job.root is not None else None  # a checkpoint's results are deeper in it
        saved = _saved(job, run) if run is not None else None
        if saved is None:
            saved = job.folder / "transcoder"
            job.transcoder.save(saved)
        exact = job.made_from.transcoder.sha256
        facts = gather(self.config, saved, run, job.recipe, exact=exact)
        receipt = send(facts, contents, job.made_from)
        job.show(as_text(receipt), receipt)
        if self.config.upload:
            (job.folder / "README.md").write_text(card(facts), encoding="utf-8")
            shutil.rmtree(contents)
        shutil.rmtree(job.folder / "transcoder", ignore_errors=True)
        write_json(job.folder / "push.json", receipt)


def _saved(job: Job, run: Path) -> Path | None:
    """The job's transcoder in the run's folder; None if it is not there."""
    digest = job.made_from.transcoder.sha256
    for folder in (run / job.made_from.transcoder.folder, run / "transcoder", run / "converted"):
        if has_file(folder / "transcoder.json") and identify(folder).sha256 == digest:
            return folder
    return None
