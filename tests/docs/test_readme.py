"""What the README shows is run, with few steps: the first command, the Python code, the recipe; and all metrics of a
run are explained.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from clt_plugins import CrossLayerTranscoder, read_recipe, run
from tests.support.commands import python
from tests.support.helpers import plugins
from tests.support.tables import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
METRICS = (ROOT / "examples" / "guides" / "metrics.md").read_text(encoding="utf-8")
MODEL = ROOT / "examples" / "models" / "stdlib-gpt2"
SMALL = {
    "steps = 600": "steps = 2\nstatistics_tokens = 128",
    "batch_tokens = 1024": "batch_tokens = 64",
    "eval_tokens = 16384": "eval_tokens = 128",
    "buffer_tokens = 32768": "buffer_tokens = 512",
    "features = 1024": "features = 16",
    "k = 96 ": "k = 8 ",
    '"models/stdlib-gpt2"': json.dumps(str(MODEL)),
}
"""The quickstart in some seconds."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the quickstart is small."""
    text = (ROOT / "examples" / "quickstart.toml").read_text(encoding="utf-8")
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "quickstart.toml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_command_installs_and_trains(checkout: Path) -> None:
    install, train = next(block for block in blocks("bash") if "quickstart" in block).strip().split(" && ")
    assert shlex.split(install) == ["python", "-m", "pip", "install", "-c", "constraints.txt", "-e", "."]
    done = python(*shlex.split(train)[1:])
    assert done.returncode == 0, done.stderr
    assert "transcoder saved in runs/quickstart/transcoder" in done.stderr


def test_the_python_code_runs(checkout: Path) -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    transcoder, outputs, dense = names["transcoder"], names["outputs"], names["dense"]
    assert isinstance(transcoder, CrossLayerTranscoder)
    assert outputs.shape == (32, transcoder.n_layers, transcoder.d_model)  # type: ignore[attr-defined]
    assert dense.shape == (32, transcoder.n_layers, transcoder.n_features)  # type: ignore[attr-defined]


def test_the_test_command_is_what_ci_runs() -> None:
    after = README[README.index("<!-- test-command -->") :]
    command = re.search(r"```bash\n(.*?)```", after, re.S)
    assert command
    assert command[1] == "python -m pip install -c constraints.txt -e '.[dev]' && python -m pytest -q\n"


def test_the_recipe_trains_and_every_metric_of_a_run_is_explained(checkout: Path) -> None:
    """With all losses and an evaluation besides, so that all metrics appear."""
    (recipe,) = blocks("toml")
    documents = [{"text": f"def f{n}(x):\n    return x + {n}  # the sum of x and {n}\n" * 20} for n in range(40)]
    (checkout / "notes").mkdir()
    (checkout / "notes" / "corpus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    more = '[[losses]]\nname = "tanh_sparsity"\n[[losses]]\nname = "preactivation"\n'
    more += '[[losses]]\nname = "mse"\n[[losses]]\nname = "auxk"\n'
    more += '[[stages]]\nname = "evaluate"\n'
    more += "tokens = 256\nmodel_tokens = 64\n"
    (checkout / "mine.toml").write_text(recipe + more, encoding="utf-8")
    changes = {
        "model.path": str(MODEL),
        "source.held_out": 0.3,
        "source.buffer_tokens": 512,
        "transcoder.features": 16,
        "train.statistics_tokens": 128,
        "activation.k": 8,
        "train.steps": 2,
        "train.batch_tokens": 64,
        "train.eval_tokens": 128,
        "loggers": '["jsonl"]',
    }
    flags = [f"{key}={value}" for key, value in changes.items()]
    run(read_recipe("mine.toml", flags, plugins()), out="runs/mine")
    logged: set[str] = set()
    for file in ("metrics.jsonl", "evaluation/metrics.jsonl"):
        for line in (checkout / "runs" / "mine" / file).read_text().splitlines():
            logged |= json.loads(line).keys()
    assert {"loss/auxk_pull", "eval/l0_by_layer", "evaluate/kl_zero", "evaluate/ce_recovered"} <= logged
    explained = set(re.findall(r"`([^`]+)`", METRICS))
    # Of the evaluation after training, `_by_layer` is explained for all at once; and so are the variants of the model.
    explained |= {f"{name}_by_layer" for name in explained if name.startswith("evaluate/")}
    variant = re.compile(r"^(evaluate/(?:cross_entropy|kl|top1))_(model|transcoder|with_errors|mean|zero)$")
    assert {variant.sub(r"\1_VARIANT", name) for name in logged} - explained == set()
