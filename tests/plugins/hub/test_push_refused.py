"""What `push` refuses before anything is sent: paths of this disk, damaged files, wrong options, a missing token."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from clt_plugins import CrossLayerTranscoder, run, toml_text
from clt_plugins.cli.main import main_group
from clt_plugins.files.folders import check_folder
from tests.support.helpers import tables
from tests.support.hub.pushing import JUMPRELU, push, pushed

MODEL = Path(__file__).parents[3] / "examples/models/stdlib-gpt2"


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """A run whose recipe and results name paths of this disk, as one of a local model does."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run(tables(activation=JUMPRELU, evaluate={"tokens": 64}, exports=[{"name": "safetensors"}]), out=folder)
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace("[source]", f'[model]\npath = "{MODEL}"\n\n[source]', 1))
    for name in ("transcoder/transcoder.json", "evaluation/evaluation.json"):
        data = json.loads((folder / name).read_text())
        if "made_from" in data:
            data["made_from"]["settings"]["model"] = {"path": str(MODEL), "tokenizer": f"{MODEL}/tokenizer.json"}
        else:
            data["model"] = {"path": str(MODEL)}
        (folder / name).write_text(json.dumps(data))
        seal(folder / name)
    return folder


def seal(path: Path) -> None:
    """Make the checksums of a folder fit a file that was changed."""
    manifest = path.parent / "manifest.json"
    listed = json.loads(manifest.read_text())
    content = path.read_bytes()
    listed["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(listed))


def test_no_path_of_this_disk_is_pushed(hub, local, tmp_path):
    done = push(local, "user/clt")
    assert done.exit_code == 2 and not hub.repositories
    assert f"model.path: '{MODEL}' is a path of this disk" in done.stderr and "--base-model ID" in done.stderr
    files = pushed(hub, local, "--base-model", "user/model").files()
    for name, content in files.items():
        for path in (MODEL, MODEL.parent, local, tmp_path, Path.home()):
            assert f"{path}/".encode() not in content and f'"{path}"'.encode() not in content, (name, path)
    assert tomllib.loads(files["recipe.toml"].decode())["model"]["path"] == "user/model"
    assert json.loads(files["transcoder/transcoder.json"])["model"]["path"] == "user/model"
    model = json.loads(files["evaluation/evaluation.json"])["made_from"]["settings"]["model"]
    assert model == {"path": "user/model", "tokenizer": "user/model/tokenizer.json"}
    CrossLayerTranscoder.load("user/clt")  # the manifest fits what was changed


@pytest.mark.parametrize("name", ["evaluation/evaluation.json", "exports/safetensors/notes.yaml", "before"])
def test_a_path_that_is_left_is_refused_by_the_files_name(hub, trained, tmp_path, name, monkeypatch):
    folder = tmp_path / "run"
    run(tables(activation=JUMPRELU, evaluate={"tokens": 64}, exports=[{"name": "safetensors"}]), out=folder)
    own = []
    if name == "before":
        (tmp_path / "own.md").write_text(f"Run by /usr/bin/env, see {folder}/notes.txt\n")
        own = ["--before", tmp_path / "own.md"]
    elif name.endswith(".json"):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | {"notes": ["/data/secret/texts"]}))
    else:
        (folder / name).write_text("text: /data/secret/texts\n")
    done = push(folder, "user/clt", *own)
    named = "README.md" if name == "before" else Path(name).name
    assert done.exit_code == 2 and f"{named}: names '/" in done.stderr and "a path of this disk" in done.stderr
    assert not hub.repositories


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs files in memory")
def test_prompts_and_tokens_are_no_paths(hub, trained, tmp_path):
    """Of circuits: "/* sum */" and "/>" were taken for paths, with a remedy that could not work; and an address in a
    prompt was refused when others evaluated what was pushed."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    prompts = [
        "root:x:0:0 is in /etc/passwd and",
        "/home/alice/notes.txt:",
        "/* sum of a and b */ int f(",
        "~5 dollars is",
        "See https://example.org for",
        "C:\\ is",
    ]
    circuits = {
        "name": "circuits",
        "format": {"name": "circuit-tracer", "model_name": "user/model", "input_hook": "mlp.hook_in"},
        "prompts": prompts,
        "scan": "/gpt2",
        "feature_details": {"feature_json_base_url": "https://example.org/features"},
    }
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    recipe["stages"].append(circuits)
    (folder / "recipe.toml").write_text(toml_text(recipe))
    graphs = [{"prompt": prompt, "logits": [["/>", 0.5], ["/home", 0.25]]} for prompt in prompts]
    made_from = json.loads((folder / "evaluation/evaluation.json").read_text())["made_from"]
    made_from["settings"] = {"prompts": prompts, "scan": "/gpt2"}
    scores = {"replacement": 0.5, "completeness": 0.5, "graphs": graphs, "versions": {}}
    (folder / "circuits").mkdir()
    (folder / "circuits/circuits.json").write_text(json.dumps({**scores, "made_from": made_from}))
    files = pushed(hub, folder).files()
    assert json.loads(files["circuits/circuits.json"])["graphs"][0]["prompt"] == prompts[0]
    assert tomllib.loads(files["recipe.toml"].decode())["stages"][-1]["prompts"] == prompts
    done = CliRunner().invoke(main_group, ["evaluate", "hf://user/clt", "--json"])
    assert done.exit_code == 0, done.output


def test_what_is_said_instead_is_no_path_either(hub, local):
    done = push(local, "user/clt", "--instead", "model.path=/home/me/model")
    assert done.exit_code == 2 and not hub.repositories
    assert "model.path: '/home/me/model' is a path of this disk too" in done.stderr


def test_a_file_in_memory_is_one_of_this_disk_and_a_device_is_not(hub, trained, tmp_path):
    own = tmp_path / "own.md"
    own.write_text("See /dev/shm/me/notes.txt\n")
    done = push(trained, "user/clt", "--before", own)
    assert done.exit_code == 2 and "README.md: names '/dev/shm/me/notes.txt', a path of this disk" in done.stderr
    own.write_text("Run by /usr/bin/env with its output in /dev/null.\n")
    assert push(trained, "user/clt", "--before", own).exit_code == 0


@pytest.mark.parametrize("name", ["converted/transcoder.safetensors", "exports/circuit-tracer/W_enc_0.safetensors"])
def test_a_damaged_file_is_not_pushed(hub, trained, tmp_path, name):
    folder = shutil.copytree(trained, tmp_path / "run")
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    done = push(folder, "user/clt")
    assert done.exit_code == 2 and f"{Path(name).name}: damaged: its checksum" in done.stderr, done.stderr
    assert not hub.repositories


def test_an_export_without_its_record_is_refused_and_not_left_out(hub, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "exports/circuit-tracer/export.json").unlink()
    done = push(folder, "user/clt")
    assert done.exit_code == 2 and "exports/circuit-tracer/export.json: missing" in done.stderr, done.stderr
    assert not hub.repositories


@pytest.mark.parametrize("name", ["converted/transcoder.safetensors", "exports/circuit-tracer/W_enc_1.safetensors"])
def test_numbers_that_are_not_finite_are_not_pushed(hub, trained, tmp_path, name):
    """Though the checksums fit."""
    folder = shutil.copytree(trained, tmp_path / "run")
    tensors = load_file(folder / name)
    last = sorted(name for name, value in tensors.items() if value.is_floating_point())[-1]
    tensors[last].view(-1)[-1] = torch.nan
    save_file(tensors, folder / name, metadata={"format": "pt"})
    seal(folder / name)
    done = push(folder, "user/clt")
    assert done.exit_code == 2 and f"{Path(name).name}: tensor {last!r} holds numbers that are not" in done.stderr
    assert not hub.repositories


REFUSED = {
    "no license": (["user/clt"], None, "--license"),
    "no license of the hub": (["user/clt"], "MIT License", "'license' must be one of the hub's names"),
    "other": (["user/clt"], "other", "--license-name: must be given with --license other"),
    "no repository": (["clt"], "mit", "write user/repository[/folder][@revision]"),
    "a commit": ([f"user/clt@{40 * 'a'}"], "mit", "a commit cannot be changed: name a branch"),
    "no file": (["user/clt", "--before", "none.md"], "mit", "none.md: missing"),
    "no export": (["user/clt", "--export", "none"], "mit", "exports/none: is not there"),
    "no such setting": (["user/clt", "--instead", "model.path=x"], "mit", "model.path: the recipe has no such text"),
    "set": (["user/clt", "--set", "seed=1"], "mit", "--instead says what others read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_before_anything_is_sent(hub, trained, case):
    arguments, license_name, text = REFUSED[case]
    done = push(trained, *arguments, license_name=license_name)
    assert done.exit_code == 2 and text in done.stderr, done.stderr
    assert not hub.repositories and not any(request.startswith(("PUT", "POST")) for request in hub.requests)


def test_without_a_token_or_a_network_it_says_so_at_once(hub, trained, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "no token to upload with" in done.stderr and "hf auth login" in done.stderr
    assert not hub.requests
    done = push(trained, "user/clt", "--out", tmp_path / "out")
    assert done.exit_code == 0 and (tmp_path / "out/README.md").is_file(), "nothing is uploaded"
    assert not hub.requests
    check_folder(tmp_path / "out/converted")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "hf auth login" in done.stderr, done.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "the network is off (HF_HUB_OFFLINE)" in done.stderr
    assert not hub.repositories and not any(request.startswith(("PUT", "POST /api/models")) for request in hub.requests)


def test_a_folder_that_could_not_be_written_is_not_there_and_can_be_made_again(trained, monkeypatch, tmp_path):
    real, copied = shutil.copyfile, []

    def full(source, target):
        copied.append(target)
        if len(copied) == 2:
            raise OSError(28, "No space left on device", str(target))
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    done = push(trained, "user/clt", "--out", tmp_path / "out")
    assert done.exit_code == 1 and f"{tmp_path / 'out'}: could not be written: " in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/README.md").write_text("of a process that was killed")
    done = push(trained, "user/clt", "--out", tmp_path / "out")
    assert done.exit_code == 0 and [path.name for path in tmp_path.iterdir()] == ["out"], done.stderr
    check_folder(tmp_path / "out/converted")
    done = push(trained, "user/clt", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "already there: give another folder" in done.stderr
