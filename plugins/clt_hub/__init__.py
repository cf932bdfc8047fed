"""The stage and command `push`: a transcoder, with a model card, uploaded to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import Attribute, field, frozen, validators

from clt_plugins import FREE_ON_RESUME, HubPlace, Refused, Spec, hookimpl, with_trained

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe, Trained

HELP = "PLACE is a run, a transcoder or another tool's folder; REPOSITORY is user/name[/folder][@branch]."


def _a_place(_: Any, attribute: Attribute[Any], value: str) -> None:
    try:
        HubPlace.parse(value)
    except Refused as refused:
        raise ValueError(f"'{attribute.name}' is {refused.faults[0].text}") from refused


def _a_license(_: Any, attribute: Attribute[Any], value: str) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value):
        raise ValueError(
            f"'{attribute.name}' must be one of the hub's names, such as mit, apache-2.0, cc-by-4.0, gemma or other: "
            f"{value!r}"
        )


def _a_model(_: Any, attribute: Attribute[Any], value: str) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
        raise ValueError(f"'{attribute.name}' must be the id of a model on the hub, such as user/name: {value!r}")


def _hub_ids(_: Any, attribute: Attribute[Any], value: list[str] | None) -> None:
    for name in value or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise ValueError(f"'{attribute.name}' must be ids of data sets on the hub, such as user/name: {name!r}")


@frozen(kw_only=True)
class PushConfig:
    """The transcoder, its scores and exports, with a model card, uploaded to the Hugging Face hub."""

    repository: str = field(validator=_a_place, metadata={"example": "user/clt-gpt2"})
    """Where to: `user/name`, with `/folder` for a folder in it and `@branch` for a branch; made where there is none."""
    license: str = field(validator=_a_license, metadata={"example": "apache-2.0"})
    """The license that you give it, by the hub's name: "mit", "apache-2.0", "cc-by-4.0". The licenses of the language
    model and of the text may restrict it."""
    license_name: str | None = None
    """The name of a license that the hub does not know; then `license` is "other"."""
    license_link: str | None = None
    """The address of that license, or the file in the repository."""
    private: bool = True
    """Of a repository that is made: only you and your organisation see it."""
    message: str = "Upload a transcoder"
    """The commit's message."""
    base_model: str | None = field(default=None, validator=validators.optional(_a_model))
    """The language model's id on the hub; that of the recipe if not given. Needed where the recipe has a folder of this
    disk: the pushed files name this one in its place."""
    instead: dict[str, str] = field(factory=dict)
    """What others read in place of paths of this disk, by the recipe's settings: `{"source.text" = "user/texts"}`."""
    datasets: list[str] | None = field(default=None, validator=_hub_ids)
    """Ids of the data sets that it was trained on; if not given, the recipe's text where it is one of the hub's."""
    tags: list[str] = field(factory=list)
    """Further tags of the model card."""
    exports: list[str] | None = None
    """Which folders in exports/ go along; if not given, all that were made from this transcoder."""
    before: Path | None = None
    """A Markdown file of yours that the card begins with."""
    after: Path | None = None
    """A Markdown file of yours that the card ends with."""
    replace_readme: bool = field(default=False, metadata=FREE_ON_RESUME)
    """Whether a README.md in the repository that was not made by `push` is replaced."""
    upload: bool = True
    """False: only write the files, to look at them or to upload them later."""
    folder: str = "hub"
    """The folder in the run for the receipt; a second `push` in one recipe needs another."""


def build_push(config: PushConfig, context: Context) -> Any:
    from clt_hub.stage import Push

    return Push(config)


@click.command(epilog=HELP)
@with_trained()
@click.argument("repository")
@click.option(
    "--license", "license_id", required=True, metavar="NAME", help="The license you give it: mit, apache-2.0."
)
@click.option("--license-name", help="Of a license that the hub does not know; with --license other.")
@click.option("--license-link", help="The address of that license.")
@click.option("--public", is_flag=True, help="Everybody sees a repository that is made; else it is private.")
@click.option("--message", default=None, help="The commit's message.")
@click.option("--base-model", help="The language model's id on the hub, where the recipe has a folder.")
@click.option("--instead", multiple=True, metavar="KEY=VALUE", help="What others read in place of a path of this disk.")
@click.option("--dataset", "datasets", multiple=True, help="The id of a data set that it was trained on.")
@click.option("--tag", "tags", multiple=True, help="A further tag of the card.")
@click.option("--export", "exports", multiple=True, help="A folder in exports/; else all that are of this transcoder.")
@click.option("--no-exports", is_flag=True, help="Push no exports.")
@click.option("--before", type=click.Path(path_type=Path), help="A Markdown file that the card begins with.")
@click.option("--after", type=click.Path(path_type=Path), help="A Markdown file that the card ends with.")
@click.option("--replace-readme", is_flag=True, help="Also replace a README.md that was not made by `push`.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the files into a new folder; upload nothing.")
@click.option("--json", "as_json", is_flag=True, help="The receipt as JSON.")
def push(trained: Trained, repository: str, **options: Any) -> None:
    """Upload PLACE, with a model card, to REPOSITORY on the Hugging Face hub."""
    from clt_hub.command import push as work

    work(trained, repository, **options)


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("push", PushConfig, build_push)]


@hookimpl
def clt_commands() -> list[click.Command]:
    return [push]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    """What would be pushed must be there: stages after `push` are not."""
    faults = []
    pushed = [index for index, stage in enumerate(recipe.stages) if isinstance(stage.config, PushConfig)]
    for index in pushed:
        config: Any = recipe.stages[index].config
        if config.license == "other" and config.license_name is None:
            faults.append(f'stages[{index}].license_name: must be given where license is "other"')
        later = [one.name for one in recipe.stages[index + 1 :] if not isinstance(one.config, PushConfig)]
        if later:
            faults.append(f"stages[{index}]: pushes what is there before {later[0]!r}: put it last")
    return faults
