"""`push`: what is uploaded, what the card says, and what is refused before."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from clt_plugins import CrossLayerTranscoder, Faults, run
from clt_plugins.cli.main import main_group
from clt_plugins.files.folders import check_folder
from clt_stages import evaluate, in_model
from tests.support.helpers import tables
from tests.support.hub.repositories import Repository
from tests.support.hub.small import add

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


def test_what_is_pushed_is_loaded_byte_for_byte(hub, trained, tmp_path):
    repository = pushed(hub, trained)
    files = repository.files()
    for folder in ("converted", "exports/circuit-tracer"):
        for path in (trained / folder).iterdir():
            if path.name != "manifest.json":
                assert files[f"{folder}/{path.name}"] == path.read_bytes(), path
    assert {name.split("/")[0] for name in files} == {
        *("README.md", "recipe.toml", "versions.json", "converted", "evaluation", "exports")
    }
    loaded, here = CrossLayerTranscoder.load("user/clt"), CrossLayerTranscoder.load(trained / "converted")
    for name, x in here.tensors().items():
        assert torch.equal(loaded.tensors()[name], x), name
    assert repository.private, "unless it is asked for, nobody else sees it"
    assert "command" not in json.loads(files["versions.json"])


def test_the_card_is_complete_and_what_the_hub_reads(hub, trained, tmp_path):
    (tmp_path / "before.md").write_text("Hello, *reader*.\n")
    (tmp_path / "after.md").write_text("## Thanks\n")
    own = [
        "--before",
        tmp_path / "before.md",
        "--after",
        tmp_path / "after.md",
        "--tag",
        "gpt2",
        "--dataset",
        "user/texts",
    ]
    report = json.loads((trained / "evaluation/evaluation.json").read_text())
    read = card(pushed(hub, trained, *own, "--base-model", "user/model"))
    data = read.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "clt-plugins", "feature-extraction")
    assert (data.base_model, data.datasets) == ("user/model", ["user/texts"])
    tags = {"cross-layer-transcoder", "circuit-tracer", "mechanistic-interpretability", "gpt2"}
    assert tags <= set(data.tags)
    values = {one.metric_type: one.metric_value for one in data.eval_results}
    assert values == {key: report[key] for key in ("nmse", "explained_variance", "l0", "dead_fraction")}
    assert data.model_name == "clt" and data.eval_results[0].dataset_type == "user/texts"
    text = read.text
    assert text.index("Hello, *reader*") < text.index("# clt") < text.index("## Thanks")
    for part in (
        'CrossLayerTranscoder.load("user/clt")',
        'from_pretrained("user/model", "user/clt/exports/circuit-tracer"',
        "| features per layer | 10 |",
        "jumprelu",
        "trained on | 192 tokens, 12 steps",
        f"On {report['tokens']:,} held-out tokens",
        f"| {0} | {report['by_layer']['nmse'][0]:.4f} |",
        "batch_tokens = 16",
        "by thresholds at the same L0",
        "## Limits",
    ):
        assert part in text, part


def test_scores_in_the_model_and_of_graphs_are_in_the_index(hub, trained, tmp_path):
    """As the stages `evaluate` and `circuits` write them."""
    folder = tmp_path / "run"
    run(tables(activation=JUMPRELU, evaluate={"tokens": 64}), out=folder)
    file = folder / "evaluation/evaluation.json"
    report = json.loads(file.read_text())
    each = in_model.ByVariant(model=3.0, transcoder=3.5, with_errors=3.0, mean=4.5, zero=5.0)
    report["model"] = attrs.asdict(
        in_model.InModel(
            tokens=99,
            cross_entropy=each,
            kl=attrs.evolve(each, transcoder=0.25),
            top1=attrs.evolve(each, transcoder=0.75),
            ce_recovered=0.9,
            ce_recovered_of_mean=0.8,
            largest_logit_error_with_errors=0.0,
        )
    )
    assert set(report) <= {a.alias for a in attrs.fields(evaluate.Evaluation)}
    file.write_text(json.dumps(report))
    graphs = {"replacement": 0.82, "completeness": 0.95, "graphs": [{}, {}], "made_from": report["made_from"]}
    (folder / "circuits").mkdir()
    (folder / "circuits/circuits.json").write_text(json.dumps(graphs))
    read = card(pushed(hub, folder))
    values = {one.metric_type: one.metric_value for one in read.data.eval_results}
    expected = {"ce_recovered": 0.9, "kl_divergence": 0.25, "top1_agreement": 0.75, "nmse": report["nmse"]}
    expected |= {"replacement_score": 0.82, "completeness_score": 0.95, "ce_recovered_of_mean": 0.8}
    assert expected.items() <= values.items()
    assert "in the language model 99" in read.text and "mean of 2 prompts | 0.8200" in read.text


def test_results_of_another_transcoder_are_left_out(hub, trained):
    """The run's evaluation and export are of the converted transcoder."""
    read = card(pushed(hub, trained / "transcoder"))
    assert read.data.eval_results is None and "Not evaluated." in read.text
    assert "exports" not in {name.split("/")[0] for name in hub.repositories["user/clt"].files()}


def test_a_second_push_replaces_the_first(hub, trained):
    first = pushed(hub, trained).branches["main"]
    repository = hub.repositories["user/clt"]
    again = pushed(hub, trained).branches["main"]
    assert again == first, "nothing has changed"
    add(repository, {"notes.txt": b"mine"})
    pushed(hub, trained / "transcoder")
    names = {name.split("/")[0] for name in repository.files()}
    assert names == {"README.md", "recipe.toml", "versions.json", "transcoder", "notes.txt"}
    loaded = CrossLayerTranscoder.load("user/clt")
    assert loaded.choices["activation"].name == "batchtopk", "the converted one is gone"
    assert CrossLayerTranscoder.load(f"user/clt@{first}").choices["activation"].name == "jumprelu"


def test_folders_branches_and_visibility(hub, trained):
    pushed(hub, trained / "transcoder", "--public", to="user/many/small@dev")
    repository = hub.repositories["user/many"]
    assert not repository.private and set(repository.branches) == {"main", "dev"}
    assert not repository.files("main") and "small/transcoder/transcoder.json" in repository.files("dev")
    CrossLayerTranscoder.load("user/many/small@dev")
    assert 'load("user/many/small@dev")' in repository.files("dev")["small/README.md"].decode()


def test_a_readme_of_somebody_is_not_overwritten(hub, trained):
    hub.repositories["user/clt"] = repository = Repository()
    add(repository, {"README.md": b"---\nlicense: mit\n---\nMy own words.\n"})
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "has a README.md that was not made by this program" in done.stderr
    assert len(repository.files()) == 1
    assert push(trained, "user/clt", "--replace-readme").exit_code == 0
    assert push(trained, "user/clt").exit_code == 0, "its own it replaces"


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
    done = push(trained, "user/clt", "--out", tmp_path / "out")
    assert done.exit_code == 0 and (tmp_path / "out/README.md").is_file(), "nothing is uploaded"
    check_folder(tmp_path / "out/converted")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_stranger")
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "hf auth login" in done.stderr, done.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = push(trained, "user/clt")
    assert done.exit_code == 2 and "the network is off (HF_HUB_OFFLINE)" in done.stderr
    assert not hub.requests or not hub.repositories


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


def test_another_tools_folder_is_pushed_as_it_is(hub, trained):
    folder = trained / "exports/circuit-tracer"
    (folder / "evil.pt").write_bytes(b"pickle")
    try:
        repository = pushed(hub, folder, to="user/ct")
    finally:
        (folder / "evil.pt").unlink()
    files = repository.files()
    assert files["W_dec_0.safetensors"] == (folder / "W_dec_0.safetensors").read_bytes() and "evil.pt" not in files
    read = card(repository)
    assert "circuit-tracer" in read.data.tags and read.data.base_model == "user/model"
    assert '"user/model", "user/ct", dtype' in read.text
    x = torch.randn(5, 3, 6)
    assert torch.equal(CrossLayerTranscoder.load("user/ct")(x), CrossLayerTranscoder.load(folder)(x))


def stage(**settings: object) -> dict[str, object]:
    own = {"name": "push", "repository": "user/clt", "license": "mit", **settings}
    return tables(activation=JUMPRELU, stages=[{"name": "evaluate", "tokens": 64}, own])


def test_the_stage_pushes_after_training_and_once(hub, tmp_path):
    run(stage(), out=tmp_path / "run")
    repository = hub.repositories["user/clt"]
    read = card(repository)
    assert read.data.eval_results and 'name = "push"' not in read.text
    receipt = json.loads((tmp_path / "run/hub/push.json").read_text())
    assert receipt["commit"] == repository.branches["main"] and receipt["made_from"]["transcoder"]["step"] == 12
    assert sorted(path.name for path in (tmp_path / "run/hub").iterdir()) == ["README.md", "manifest.json", "push.json"]
    assert (tmp_path / "run/hub/README.md").read_bytes() == repository.files()["README.md"]
    here = CrossLayerTranscoder.load(tmp_path / "run/transcoder").tensors()
    assert all(torch.equal(x, here[name]) for name, x in CrossLayerTranscoder.load("user/clt").tensors().items())
    before = len(hub.requests)
    run(stage(), out=tmp_path / "run", resume="latest")
    assert len(hub.requests) == before, "a push that was done is not done again"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"repository": "clt"}, "stages[1].repository: "),
        ({"license": "MIT"}, "stages[1].license: "),
        ({"license": "other"}, "stages[1].license_name: must be given"),
        ({"before": "none.md"}, "stages[1].before: "),
        ({"instead": {"source.text": "x"}}, "source.text: the recipe has no such text"),
    ],
)
def test_the_stage_is_checked_before_training(hub, tmp_path, settings, text):
    with pytest.raises(Faults) as caught:
        run(stage(**settings), out=tmp_path / "run")
    assert text in str(caught.value)
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_stage_needs_a_token_before_training_and_comes_last(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(Faults, match=r"stages\[1\]\.repository: .*no token"):
        run(stage(), out=tmp_path / "run")
    changed = stage()
    changed["stages"].reverse()
    with pytest.raises(Faults, match="pushes what is there before 'evaluate': put it last"):
        run(changed, out=tmp_path / "run")
    run(stage(upload=False), out=tmp_path / "run")
    assert (tmp_path / "run/hub/contents/transcoder/transcoder.safetensors").is_file() and not hub.requests


def test_an_export_goes_straight_to_a_folder_on_the_hub(hub, trained):
    def export(*arguments: object) -> Result:
        fixed = ["export", trained, "--format", "circuit-tracer", "--set", "input_hook=mlp.hook_in"]
        return CliRunner().invoke(main_group, [str(one) for one in (*fixed, "--set", "model_name=m", *arguments)])

    for wrong, text in (
        ([], "--out: say where to: --out FOLDER, or --to hf://USER/NAME/FOLDER"),
        (["--to", "hf://user/clt"], "--to: name a folder in the repository"),
        (["--to", "clt"], "not a repository's name"),
    ):
        done = export(*wrong)
        assert done.exit_code == 2 and text in done.stderr, done.stderr
    assert not hub.repositories
    hub.repositories["user/clt"] = repository = Repository()
    add(repository, {"a/W_enc_9.safetensors": b"older", "README.md": b"stays"})
    done = export("--to", "hf://user/clt/a")
    assert done.exit_code == 0 and f"exported to hf://user/clt/a, commit {repository.branches['main']}" in done.stderr
    files = repository.files()
    assert "a/W_enc_9.safetensors" not in files and files["README.md"] == b"stays"
    x = torch.randn(5, 3, 6)
    here = CrossLayerTranscoder.load(trained / "exports/circuit-tracer")
    assert torch.equal(CrossLayerTranscoder.load("user/clt/a")(x), here(x))


def test_the_card_of_a_per_layer_transcoder_says_so(hub, tmp_path):
    run(tables(activation=JUMPRELU, tying={"name": "per_layer"}, train={"steps": 1}), out=tmp_path / "run")
    read = card(pushed(hub, tmp_path / "run"))
    assert "per-layer-transcoder" in read.data.tags and "cross-layer-transcoder" not in read.data.tags
    assert "A per-layer transcoder of" in read.text and "write what that MLP writes" in read.text
    assert all(line.count("|") in (3, 7) for line in read.text.splitlines() if line.startswith("|"))
