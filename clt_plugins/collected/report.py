"""Writing a report of a store into a folder of its own, outside of a run's stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from clt_plugins.contract.results.report import Report
from clt_plugins.errors import Faults, Refused
from clt_plugins.files.folders import MANIFEST, Manifest
from clt_plugins.files.records import FORMAT, read_json, write_json
from clt_plugins.finished.provenance import Origin, Provenance
from clt_plugins.finished.results import check_writable, replacing
from clt_plugins.model.devices import bare_context
from clt_plugins.recipe.structure import plain
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.collected.reader import Collected
    from clt_plugins.contract.spec import Selected
    from clt_plugins.finished.facts import Facts

RECORD = "report.json"


@attrs.frozen(kw_only=True)
class ReportRecord:
    """What a report was made from; the content of `report.json`."""

    format: int = FORMAT
    """The version of this file."""
    made_from: Provenance
    """The transcoder, and the settings of the report and of the collection."""


def check_replaceable(folder: Path) -> None:
    """Before work, refuse a folder that holds something else than a report, or that cannot be written.

    Raises:
        Refused: see above.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_report(folder))):
        raise Refused(folder, "already there, and no report: give another folder with --out")
    check_writable(folder)


def _is_report(folder: Path) -> bool:
    try:
        return RECORD in read_json(folder / MANIFEST, Manifest).files
    except Faults:
        return False


def write_report(selected: Selected, collected: Collected, facts: Facts, folder: Path) -> None:
    """Write a report into a folder, which is complete or not there. An older report is replaced; files that others put
    into it are kept beside it.

    Args:
        selected: one of `reports`, with its settings.

    Raises:
        Refused: the folder holds something else; or the store does not have what the report needs.
        PluginError: the report's plugin failed.
        OSError: it could not be written.
    """
    check_replaceable(folder)
    info = collected.info
    sizes = {"n_layers": info.n_layers, "d_model": info.d_model, "n_features": info.n_features}
    report: Report = build(selected, bare_context(torch.device("cpu"), **sizes))
    settings = {"report": {"name": selected.name, **plain(selected.config)}}
    if info.made_from is not None:
        settings["collected"] = info.made_from.settings
    made_from = Provenance(transcoder=facts.transcoder or Origin(folder=""), settings=settings)
    with replacing(folder) as partial:
        report.write(collected, facts, partial)
        write_json(partial / RECORD, ReportRecord(made_from=made_from))
