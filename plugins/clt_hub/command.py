"""The command `push`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from clt_hub import PushConfig
from clt_hub.facts import Facts, gather
from clt_hub.new_folder import check_empty, new_folder
from clt_hub.stage import as_text, send
from clt_plugins import HubPlace, Refused, check_upload, has_file

if TYPE_CHECKING:
    from clt_plugins import Trained


def push(trained: Trained, repository: str, *, out: Path | None, as_json: bool, **options: Any) -> None:
    """Upload a transcoder that is on this disk.

    Raises:
        Faults: an option is wrong, or something names a path of this disk; see `gather`.
    """
    config = _config(repository, upload=out is None, **options)
    if trained.hub is not None:
        raise Refused(str(trained.hub), "is on the hub already: name a folder of this disk")
    if trained.overrides:
        raise Refused("--set", "nothing is computed anew: --instead says what others read in place of a path")
    if config.upload:
        check_upload(HubPlace.parse(repository))
    if out is not None:
        check_empty(out)
    facts = _facts(trained, config)
    if facts.evaluation is None:
        click.echo("the card has no scores: run `evaluate` first", err=True)
    if out is not None:
        with new_folder(out) as partial:
            receipt = send(facts, partial, None)
    else:
        with tempfile.TemporaryDirectory(prefix="clt-plugins-push-") as contents:
            receipt = send(facts, Path(contents), None)
    shown = {key: value for key, value in attrs.asdict(receipt).items() if key != "made_from"}
    click.echo(json.dumps(shown, indent=2) if as_json else as_text(receipt))


def _facts(trained: Trained, config: PushConfig) -> Facts:
    own = has_file(trained.folder / "transcoder.json")
    sizes: dict[str, Any] | None = None
    if not own:
        transcoder = trained.transcoder()
        sizes = {
            "layers": transcoder.n_layers,
            "features": transcoder.n_features,
            "d_model": transcoder.d_model,
            "model": transcoder.model_described(),
            "activation": {"name": transcoder.choices["activation"].name},
            "tying": {"name": transcoder.choices["tying"].name},
        }
    if trained.recipe_file is None:
        return gather(config, trained.folder, None, None, sizes)
    return gather(config, trained.folder, trained.run, trained.recipe(), sizes)


def _config(
    repository: str,
    *,
    license_id: str,
    public: bool,
    message: str | None,
    instead: tuple[str, ...],
    datasets: tuple[str, ...],
    tags: tuple[str, ...],
    exports: tuple[str, ...],
    no_exports: bool,
    **rest: Any,
) -> PushConfig:
    said = {}
    if message:
        rest["message"] = message
    for one in instead:
        key, equals, text = one.partition("=")
        if not equals:
            raise Refused("--instead", f"expected KEY=VALUE, got {one!r}")
        said[key.strip()] = text.strip()
    if license_id == "other" and not rest.get("license_name"):
        raise Refused("--license-name", "must be given with --license other")
    try:
        return PushConfig(
            repository=repository,
            license=license_id,
            private=not public,
            instead=said,
            datasets=list(datasets) or None,
            tags=list(tags),
            exports=[] if no_exports else list(exports) or None,
            **rest,
        )
    except ValueError as error:
        raise Refused("push", str(error.args[0])) from error
