"""The commands as they are typed: `generate`, `serve` with TLS, uploads, `inspect`."""

from __future__ import annotations

import os
import ssl
import subprocess
import urllib.request
from pathlib import Path

from tests.support.commands import python
from tests.support.serving import make_certificate, serving_process

RECIPE = """
name = "numbers"
source = { name = "synthetic", layers = 2, d_model = 4, features = 8, active = 2.0 }
transcoder = { features = 8 }
activation = { name = "topk", k = 2 }
loggers = []
train = { steps = 4, batch_tokens = 16, eval_tokens = 32 }
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "clt_plugins", *arguments, env=os.environ | environment)


def test_generate_uploads_over_tls_what_inspect_verifies(tmp_path: Path) -> None:
    recipe, (certificate, key) = tmp_path / "recipe.toml", make_certificate(tmp_path)
    recipe.write_text(RECIPE)
    (tmp_path / "token").write_text("sesame\n")
    (tmp_path / "root").mkdir()
    tls = ["--certificate", certificate, "--key", key, "--token-file", tmp_path / "token"]
    with serving_process(tmp_path / "root", *tls) as (url, _):
        trusted = {"SSL_CERT_FILE": str(certificate), "CLT_TOKEN": "sesame"}
        done = command("generate", recipe, "--out", tmp_path / "data", "--to", url, **trusted)
        assert done.returncode == 0, done.stderr
        # Complete already, so only the upload is tried. Waiting changes neither certificate nor token.
        again = ["generate", recipe, "--out", tmp_path / "data", "--to", url]
        untrusting = command(*again, CLT_TOKEN="sesame")
        assert untrusting.returncode == 2
        assert (
            "the server's certificate is not trusted: self-signed certificate: if you made it yourself"
            in untrusting.stderr
        )
        thief = command(*again, **(trusted | {"CLT_TOKEN": "open"}))
        assert thief.returncode == 2
        assert "give the server's token in CLT_TOKEN" in thief.stderr
        context = ssl.create_default_context(cafile=certificate)
        with urllib.request.urlopen(f"{url}/healthz", context=context, timeout=30) as answer:
            assert answer.read() == b'{"status": "ok"}'
    found = command("inspect", tmp_path / "root" / "data", "--verify")
    assert found.returncode == 0, found.stderr
    assert "64 tokens to train on, 32 held out" in found.stdout
    assert found.stdout.splitlines()[-1] == "checked: all rows; no fault"
    (tmp_path / "root" / "data" / "train_00000.h5").write_bytes(b"")
    broken = command("inspect", tmp_path / "root" / "data", "--verify")
    assert broken.returncode == 1
    assert "train_00000.h5" in broken.stdout
