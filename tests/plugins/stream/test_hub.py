"""A hub that refuses: every answer of it reaches the user of `run` as one line, on the setting that caused it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

GATED = "is gated: ask for access on its page of the hub, then log in with `hf auth login`"

SETTINGS: dict[str, tuple[list[str], str]] = {
    "gated model": (["model.path=gated/x"], f"model.path: 'gated/x' {GATED}"),
    "no model": (["model.path=none/x"], "model.path: 'none/x' is no local path, and the hub has none of that name"),
    "no revision": (
        ["model.path=rev/x", "model.revision=v9"],
        "model.revision: the hub has no such revision of 'rev/x'",
    ),
    "no model inside": (["model.path=empty/x"], "model.path: 'empty/x' has no tokenizer: set model.tokenizer"),
    "no GGUF file": (
        ["model.path=empty/x", "model.gguf_file=m.gguf"],
        "model.path: cannot load the tokenizer of '",
    ),
    "gated tokenizer": (["model.tokenizer=gated/x"], f"model.tokenizer: 'gated/x' {GATED}"),
    "no tokenizer": (["model.tokenizer=none/x"], "model.tokenizer: 'none/x' is no local path, and the hub has none"),
    "gated text": (["source.text=gated/x"], f"source.text: 'gated/x' {GATED}"),
    "no text": (["source.text=none/x"], "source.text: cannot load 'none/x': "),
    "gated text, streamed": (["source.text=gated/x", "source.streaming=true"], f"source.text: 'gated/x' {GATED}"),
    "no text, streamed": (["source.text=none/x", "source.streaming=true"], "source.text: cannot load 'none/x': "),
}
"""Name of a case: changes of the recipe, and how the error begins."""

SCRIPT = """
import json, sys
from click.testing import CliRunner
from clt_plugins.cli.main import main_group
recipe, cases = sys.argv[1], json.loads(sys.argv[2])
answers = {}
for name, settings in cases.items():
    changes = [part for setting in settings for part in ("--set", setting)]
    done = CliRunner().invoke(main_group, ["run", recipe, *changes, "--out", f"{recipe}-{name}"])
    answers[name] = done.exit_code, done.stderr
print(json.dumps(answers))
"""


class Refusing(BaseHTTPRequestHandler):
    """Answers as the hub does, by the first part of the repository's name."""

    def answer(self) -> None:
        code, name = 404, "RepoNotFound"
        if "gated/" in self.path:
            code, name = 403, "GatedRepo"
        elif "rev/" in self.path:
            name = "RevisionNotFound"
        elif "empty/" in self.path:
            name = "EntryNotFound"
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def answers(endpoint: str, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of `run` for each case, all in one process: only a new one asks another hub."""
    folder = tmp_path_factory.mktemp("hub")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""
        name = "refused"
        model = {{ path = "{gpt2}" }}
        source = {{ name = "stream", context = 24 }}
        transcoder = {{ features = 16 }}
        activation = {{ name = "topk", k = 4 }}
        train = {{ steps = 2, batch_tokens = 32 }}
        """
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'plugins'}",
    }
    cases = json.dumps({name: settings for name, (settings, _) in SETTINGS.items()})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(recipe), cases],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", SETTINGS)
def test_a_refusal_of_the_hub_is_one_line_on_its_setting(case: str, answers: dict[str, tuple[int, str]]) -> None:
    code, stderr = answers[case]
    (line,) = [line for line in stderr.splitlines() if "recipe.toml" in line]
    assert code == 2, stderr
    assert line == stderr.splitlines()[-1]
    assert line.split(": ", 1)[1].startswith(SETTINGS[case][1])
