"""A transcoder loaded from the hub: what is downloaded, which commit it is, and what is said where it cannot be."""

from __future__ import annotations

import json
import logging
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants

from clt_plugins import CrossLayerTranscoder, Refused, load_plugins, run
from clt_plugins.cli.main import main_group
from clt_plugins.files.hub import listing
from clt_plugins.finished.find import find_trained
from clt_plugins.finished.provenance import identify
from tests.support.hub.client import turned_to
from tests.support.hub.repositories import Repository
from tests.support.hub.small import add, repository_of


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main_group, [str(argument) for argument in arguments])


def same(one: CrossLayerTranscoder, other: CrossLayerTranscoder) -> bool:
    tensors = other.tensors()
    return all(torch.equal(x, tensors[name]) for name, x in one.tensors().items())


@pytest.fixture
def pushed(hub, trained) -> Repository:
    """The run's folder, as a repository."""
    hub.repositories["user/clt"] = repository = repository_of(trained)
    return repository


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("user/clt", "converted"),
        ("hf://user/clt", "converted"),
        ("user/clt/converted", "converted"),
        ("user/clt/transcoder@main", "transcoder"),
        ("user/clt/exports/circuit-tracer", "exports/circuit-tracer"),
    ],
)
def test_a_folder_on_the_hub_is_loaded_as_one_of_this_disk(pushed, trained, name, local):
    assert same(CrossLayerTranscoder.load(trained / local), CrossLayerTranscoder.load(name))


def test_only_what_is_needed_is_downloaded(hub, pushed, trained):
    CrossLayerTranscoder.load("user/clt/transcoder")
    asked = {request.split("/resolve/")[1].partition("/")[2] for request in hub.requests if "/resolve/" in request}
    listed = json.loads((trained / "transcoder/manifest.json").read_text())["files"]
    assert asked == {"recipe.toml", "transcoder/manifest.json", *(f"transcoder/{name}" for name in listed)}
    before = len(hub.requests)
    CrossLayerTranscoder.load("user/clt/transcoder")
    assert len(hub.requests) == before + 1, "it only asks for the commit"


def test_a_revision_is_pinned_and_on_record(hub, pushed, trained, tmp_path):
    first = pushed.branches["main"]
    other = tmp_path / "other"
    shutil.copytree(trained / "transcoder", other)
    second = add(pushed, {"converted/convert.json": b"{}"})
    loaded = CrossLayerTranscoder.load(f"user/clt@{first}")
    assert same(CrossLayerTranscoder.load(trained / "converted"), loaded)
    with pytest.raises(Refused, match=r"convert\.json"):  # of another size than the manifest says
        CrossLayerTranscoder.load("user/clt")
    assert pushed.branches["main"] == second
    place = find_trained(Path(f"user/clt@{first}"), load_plugins())
    assert place.origin().hub == f"hf://user/clt/converted@{first}"
    assert place.origin().sha256 == identify(trained / "converted").sha256
    before = len(hub.requests)
    CrossLayerTranscoder.load(f"user/clt@{first}")
    assert len(hub.requests) == before, "a commit that is in the cache needs no hub"


def test_branches_and_missing_revisions(pushed, trained):
    add(pushed, {"transcoder/manifest.json": b"{}"}, "broken")
    with pytest.raises(Refused, match=r"manifest\.json: written in format None"):
        CrossLayerTranscoder.load("user/clt/transcoder@broken")
    with pytest.raises(Refused, match=r"hf://user/clt@v9: the repository has no revision 'v9'"):
        CrossLayerTranscoder.load("user/clt@v9")


def test_commands_take_a_folder_on_the_hub_and_write_nothing_into_the_cache(hub, pushed, trained, tmp_path):
    done = invoke("evaluate", "user/clt", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    commit = pushed.branches["main"]
    assert report["made_from"]["transcoder"]["hub"] == f"hf://user/clt/converted@{commit}"
    here = json.loads((trained / "evaluation/evaluation.json").read_text())
    assert report["nmse"] == pytest.approx(here["nmse"], rel=1e-6) and report["l0"] == here["l0"]
    snapshot = listing.storage("user/clt") / "snapshots" / commit
    files = {path for path in snapshot.rglob("*") if not path.is_dir()}
    for command in (
        ["thresholds", "hf://user/clt", "--no-plot"],
        ["export", "hf://user/clt", "--format", "safetensors", "--out", tmp_path / "export"],
        ["convert", "user/clt", "--out", tmp_path / "converted", "--set=stages.convert.tolerance=0.1"],
    ):
        done = invoke(*command)
        assert done.exit_code == 0, done.output
    made_from = json.loads((tmp_path / "export/export.json").read_text())["made_from"]
    assert made_from["transcoder"]["hub"].endswith(f"@{commit}")
    new = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if not path.is_dir()}
    assert new - {path.relative_to(snapshot).as_posix() for path in files} <= {
        f"transcoder/{path.name}" for path in (trained / "transcoder").iterdir()
    }, "only downloads"


def test_what_is_converted_already_is_not_converted(pushed, hub, trained, tmp_path):
    hub.repositories["user/converted"] = repository = Repository()
    files = {path.relative_to(trained).as_posix(): path.read_bytes() for path in (trained / "converted").iterdir()}
    add(repository, {**files, "recipe.toml": (trained / "recipe.toml").read_bytes()})
    done = invoke("convert", "user/converted", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "name it, if you want it: hf://user/converted/converted" in done.stderr, done.stderr


REFUSED = {
    "no repository": ("user/none", "no folder here, and no such repository on the hub, or a private one"),
    "gated": ("user/gated", "gated: ask for access on https://huggingface.co/user/gated, then log in"),
    "no folder": ("user/clt/none", "the repository has no folder 'none': it has"),
    "a file": ("user/clt/recipe.toml", "a file: name the folder that it is in"),
    "pickles": ("user/pickles", "no transcoder in it: no transcoder.json, no safetensors files; a.bin can run code"),
    "several": ("user/several", "it holds several transcoders: name one: hf://user/several/a, hf://user/several/b"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_line_with_the_remedy(hub, pushed, trained, case):
    hub.repositories["user/gated"] = Repository(gated=True)
    hub.repositories["user/pickles"] = several = Repository()
    add(several, {"a.bin": b"pickle", "README.md": b"hello"})
    hub.repositories["user/several"] = several = Repository()
    for name in ("a", "b"):
        add(several, {f"{name}/{path.name}": path.read_bytes() for path in (trained / "transcoder").iterdir()})
    name, text = REFUSED[case]
    with pytest.raises(Refused) as caught:
        CrossLayerTranscoder.load(name)
    assert text in str(caught.value) and len(str(caught.value).splitlines()) == 1, caught.value
    done = invoke("evaluate", name)
    assert done.exit_code == 2 and text in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_private_repositories_need_a_token(hub, pushed, tmp_path):
    pushed.private = True
    CrossLayerTranscoder.load("user/clt")
    with turned_to(hub.url, tmp_path / "stranger", token=None), pytest.raises(Refused) as caught:
        CrossLayerTranscoder.load("user/clt")
    assert "or a private one: log in with `hf auth login`, or set HF_TOKEN" in str(caught.value)


def test_without_a_network_the_cache_serves(hub, pushed, trained, monkeypatch, caplog):
    CrossLayerTranscoder.load("user/clt/transcoder")
    hub.fault = lambda request, number: "drop"
    with caplog.at_level(logging.WARNING):
        CrossLayerTranscoder.load("user/clt/transcoder")
    assert f"commit {pushed.branches['main']} from its cache is used" in caplog.text
    with pytest.raises(OSError, match=r"hf://user/other: the hub does not answer: .*: try again later"):
        CrossLayerTranscoder.load("user/other")
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(CrossLayerTranscoder.load("user/clt/transcoder"), CrossLayerTranscoder.load(trained / "transcoder"))
    for name in ("user/other", f"user/clt@{40 * 'b'}"):
        with pytest.raises(Refused, match=r"the network is off \(HF_HUB_OFFLINE\).*unset"):
            CrossLayerTranscoder.load(name)
    with pytest.raises(Refused, match=r"and converted/manifest.json is not in the hub's cache"):
        CrossLayerTranscoder.load("user/clt")
    assert len(hub.requests) == before


def test_a_foreign_folder_that_is_half_downloaded_is_not_taken_for_a_smaller_one(hub, pushed, trained, monkeypatch):
    """circuit-tracer's format has as many layers as files."""
    calls = []

    def fault(request, number):
        calls.append(request.path)
        return "drop" if "W_enc_2" in request.path or "W_dec_2" in request.path else None

    hub.fault = fault
    with pytest.raises(OSError, match="does not answer"):
        CrossLayerTranscoder.load("user/clt/exports/circuit-tracer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match=r"W_(enc|dec)_2\.safetensors is not in the hub's cache"):
        CrossLayerTranscoder.load("user/clt/exports/circuit-tracer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fault = lambda request, number: None
    assert CrossLayerTranscoder.load("user/clt/exports/circuit-tracer").n_layers == 3


def test_a_local_folder_of_that_name_wins(hub, pushed, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "transcoder", tmp_path / "user/clt")
    before = len(hub.requests)
    assert same(CrossLayerTranscoder.load("user/clt"), CrossLayerTranscoder.load(trained / "transcoder"))
    with pytest.raises(Refused, match=r"user/other: no such folder"):
        CrossLayerTranscoder.load("user/other")
    assert len(hub.requests) == before


def test_a_recipe_of_the_hub_opens_no_path_and_no_address(hub, pushed, trained, tmp_path):
    recipe = (trained / "recipe.toml").read_text()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    synthetic = recipe[recipe.index("[source]") : recipe.index("[transcoder]")]
    for source, text in (
        (f'name = "stream"\ntext = "{secret}"', "may not name a path of this disk"),
        ('name = "remote"\nurl = "http://evil.example:80"\ndataset = "x"', "may not name an address"),
        (f'name = "local"\npath = "{tmp_path}"', "may not name a path of this disk"),
    ):
        model = '[model]\npath = "user/model"\n\n'
        new = recipe.replace(synthetic, f"{model}[source]\n{source}\n\n")
        add(pushed, {"recipe.toml": new.encode()})
        done = invoke("evaluate", "user/clt")
        assert done.exit_code == 2 and text in done.stderr and "--recipe" in done.stderr, done.stderr
    done = invoke("evaluate", "user/clt", "--recipe", trained / "recipe.toml")
    assert done.exit_code == 0, done.output


def test_a_run_begins_with_a_transcoder_on_the_hub(pushed, trained, tmp_path):
    recipe = tomllib.loads((trained / "recipe.toml").read_text())
    recipe["transcoder"]["from"] = "user/clt"
    recipe["stages"] = []
    recipe["train"] |= {"steps": 1, "schedule_steps": 1, "lr": 1e-30}
    begun = run(recipe, out=tmp_path / "run")
    for name, value in CrossLayerTranscoder.load(trained / "transcoder").tensors().items():
        torch.testing.assert_close(begun.tensors()[name], value, rtol=0, atol=1e-20)
