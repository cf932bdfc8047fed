"""`push`: what is uploaded, and what the card says."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner, Result

from clt_hub import PushConfig
from clt_hub.card import card as written
from clt_hub.facts import gather
from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.cli.main import main_group
from clt_stages import evaluate, in_model
from tests.support.helpers import tables
from tests.support.hub.pushing import JUMPRELU, card, push, pushed
from tests.support.hub.repositories import Repository
from tests.support.hub.small import add, small_run


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


@pytest.mark.parametrize("made_by", ["this program", "another tool"])
def test_another_tools_folder_replaces_what_an_earlier_push_put_at_the_top(hub, trained, tmp_path, made_by):
    """Layers of two transcoders were one set: the hub had three of the first, and the second has two."""

    def exported(layers: int) -> Path:
        source = {"name": "synthetic", "layers": layers, "d_model": 6, "features": 24, "active": 2.0}
        export = {"name": "transcoder-set", "model_name": "user/model", "input_hook": "mlp.hook_in"}
        chosen = {"activation": JUMPRELU, "tying": {"name": "per_layer"}, "source": source, "exports": [export]}
        folder = small_run(tmp_path / str(layers), **chosen)
        if made_by == "another tool":
            (folder / "exports/transcoder-set/manifest.json").unlink()
        return folder / "exports/transcoder-set"

    three, two = exported(3), exported(2)
    repository = pushed(hub, three, to="user/ct")
    assert "layer_2.safetensors" in repository.files()
    add(repository, {"notes.json": b"{}"})
    pushed(hub, two, to="user/ct")
    assert "layer_2.safetensors" not in repository.files() and "notes.json" in repository.files()
    x = torch.randn(5, 2, 6)
    assert torch.equal(CrossLayerTranscoder.load("user/ct")(x), CrossLayerTranscoder.load(two)(x))
    pushed(hub, trained / "transcoder", to="user/ct")
    names = {name.split("/")[0] for name in repository.files()}
    assert names == {"README.md", "recipe.toml", "versions.json", "transcoder", "notes.json"}


@pytest.mark.parametrize(
    "manifest",
    [
        '{"files": {"main.js": "/static/main.js"}}',
        '{"files": ["main.js"]}',
        '{"files": "main.js"}',
        "[" * 200_000,
        "no",
    ],
    ids=["of a site", "of a data set", "a text", "deep", "no JSON"],
)
def test_what_a_manifest_of_another_program_lists_stays(hub, trained, manifest):
    hub.repositories["user/site"] = repository = Repository()
    others = {"manifest.json": manifest.encode(), "main.js": b"alert()"}
    add(repository, others)
    pushed(hub, trained / "transcoder", to="user/site")
    assert others.items() <= repository.files().items()
    assert any(name.startswith("transcoder/") for name in repository.files())


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


def test_circuit_tracer_is_shown_only_with_a_model_that_it_loads(trained):
    """It said `from_pretrained("None", ...)`, and by a name it loads the newest revision."""
    config = PushConfig(repository="user/clt", license="mit", base_model="user/model")
    facts = gather(config, trained / "converted", trained, None)
    assert 'from_pretrained("user/model", "user/clt/exports/circuit-tracer"' in written(facts)
    assert "from_pretrained" not in written(attrs.evolve(facts, base_model=None))
    of_revision = {**facts.described, "model": {**facts.described["model"], "revision": "step3"}}
    text = written(attrs.evolve(facts, described=of_revision))
    assert 'AutoModelForCausalLM.from_pretrained("user/model", revision="step3")' in text
    assert (
        '    "user/model", "user/clt/exports/circuit-tracer", hf_model=language_model, dtype=torch.float32\n)' in text
    )
    compile(text.split("```python")[2].split("```")[0], "README.md", "exec")
