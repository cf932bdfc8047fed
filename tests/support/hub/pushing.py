"""`push` as it is typed, and what it left in the stand-in of the hub."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

from clt_plugins.cli.main import main_group
from tests.support.hub.repositories import Repository

JUMPRELU = {"name": "jumprelu", "threshold": 0.05}


def push(*arguments: object, license_name: str | None = "mit") -> Result:
    named = ["--license", license_name] if license_name else []
    return CliRunner().invoke(main_group, ["push", *map(str, arguments), *named])


def pushed(hub, folder: Path, *arguments: object, to: str = "user/clt") -> Repository:
    done = push(folder, to, *arguments)
    assert done.exit_code == 0, done.output
    return hub.repositories["/".join(to.split("@")[0].split("/")[:2])]


def card(repository: Repository, path: str = "README.md") -> ModelCard:
    return ModelCard(repository.files()[path].decode())
