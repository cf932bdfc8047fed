"""The stage and the command `collect`: what is in the store is what the model and the transcoder say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from clt_collect import log as log_module
from clt_collect import reading
from clt_plugins import Collected, Refused
from clt_plugins.cli.main import main_group
from clt_plugins.model.assemble import Parts, assemble
from tests.support.collect_truth import check, collect
from tests.support.helpers import ACTIVATIONS, parts, plugins, recipe, stir, tables
from tests.support.language_models import MLPS, Hooked, save_model, save_text

SMALL = {"top": 4, "groups": 2, "per_group": 2, "window": 3, "distinct": 1, "coactive": 3, "coactive_tokens": 9}
SOURCE = {"name": "stream", "context": 24, "held_out": 0.3, "model_batch": 3, "buffer_tokens": 64}
TOKENS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collect")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 40)
    return folder


def changes(folder: Path, activation: str = "batchtopk", **others: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(folder / "gpt2")},
        "source": {**SOURCE, "text": str(folder / "text.jsonl")},
        "activation": ACTIVATIONS[activation],
        "transcoder": {"features": 11},
        "train": {"batch_tokens": 32},
    } | others


def built(folder: Path, activation: str = "batchtopk", **others: Any) -> Parts:
    made = assemble(recipe(**changes(folder, activation, **others)))
    stir(made.transcoder)
    made.transcoder.eval()
    return made


def values_of(made: Parts, batches: Any) -> Any:
    """Values of all features at all rows, in the order of the text, as the transcoder gives them batch by batch."""
    batches = list(batches)
    with torch.no_grad():
        dense = torch.cat([made.transcoder.encode(batch.inputs).dense() for batch in batches])
    positions = torch.cat([batch.positions for batch in batches])
    order = np.lexsort((positions[:, 1], positions[:, 0]))
    return dense.float().numpy()[order]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_store_holds_what_the_transcoder_does(folder: Path, tmp_path: Path, activation: str) -> None:
    made = built(folder, activation)
    store = collect(made, tmp_path / "store", tokens=TOKENS, **SMALL)
    assert store.info.tokens == TOKENS
    check(store, values_of(made, made.source.held_out(TOKENS)))
    assert store.info.thresholds == (activation in ("relu", "jumprelu"))
    if activation == "jumprelu":
        threshold = made.transcoder.activation.threshold().detach()  # type: ignore[attr-defined]
        assert all(np.array_equal(store.layer(n)["threshold"], threshold[n]) for n in range(store.info.n_layers))


def test_values_are_those_of_the_model_read_by_plain_hooks(folder: Path, tmp_path: Path) -> None:
    made = built(folder, "jumprelu")
    store = collect(made, tmp_path / "store", tokens=TOKENS, **SMALL)
    truth = Hooked(folder / "gpt2", MLPS["gpt2"])
    text = store.text
    checked = 0
    start = 0
    while start < store.info.tokens:
        (_,), (stop,) = text.around(np.array([start]), 0, TOKENS)
        # A piece of text: its first token has no row, so it is not known; the second row on would depend on it.
        start, first = int(stop), start
        words = [word for word in json_texts(folder) if tokens_of(truth, word, store.ids[first:stop])]
        if not words:
            continue
        inputs, _ = truth(truth.tokens(words[0])[: stop - first + 1])
        with torch.no_grad():
            dense = made.transcoder.encode(inputs).dense()[1:].numpy()
        for layer in range(store.info.n_layers):
            for feature in range(store.info.n_features):
                found = store.examples(layer, feature)
                for example in [*found.top, *(one for group in found.groups for one in group)]:
                    if first <= example.row < stop:
                        near = dense[example.start - first : example.stop - first, layer, feature]
                        np.testing.assert_allclose(example.values, near, atol=1e-5)
                        np.testing.assert_allclose(example.value, near[example.row - example.start], atol=1e-5)
                        checked += 1
    assert checked > 50


def json_texts(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]


def tokens_of(truth: Hooked, text: str, ids: Any) -> bool:
    """Whether a document begins with one token and then these."""
    return truth.tokens(text)[1 : len(ids) + 1] == ids.tolist()


def test_tokens_are_spelled_in_bytes(folder: Path, tmp_path: Path) -> None:
    made = built(folder)
    store = collect(made, tmp_path / "store", tokens=40, **SMALL)
    assert store.info.spelled
    truth = Hooked(folder / "gpt2", MLPS["gpt2"])
    assert store.show(0, 40) == truth.tokenizer.decode(store.ids.tolist())


def test_training_text(folder: Path, tmp_path: Path) -> None:
    made, other = built(folder), built(folder)
    store = collect(made, tmp_path / "store", tokens=TOKENS, text="training", **SMALL)
    assert store.info.tokens == 160  # whole batches
    check(store, values_of(other, [other.source.next() for _ in range(5)]))


@pytest.mark.parametrize("text", ["held_out", "training"])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_killed_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, after: int
) -> None:
    """Killed after some shards, with more in the files than was committed: the result has the same bytes."""
    monkeypatch.setattr(log_module, "SHARD", 1)
    whole = collect(built(folder), tmp_path / "whole", tokens=TOKENS, text=text, **SMALL)
    original, shards = log_module.Log._append, 0

    def killed(log: Any) -> Any:
        nonlocal shards
        commit = original(log)
        if shards == after:
            raise KeyboardInterrupt  # the shard is in the files, but not committed
        shards += 1
        return commit

    monkeypatch.setattr(log_module.Log, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(built(folder), tmp_path / "other", tokens=TOKENS, text=text, **SMALL)
    work = tmp_path / ".other.work"
    assert work.is_dir()
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(log_module.Log, "_append", original)
    read = []
    encode = reading._Rounds._encode
    monkeypatch.setattr(reading._Rounds, "_encode", lambda *args: (read.append(1), encode(*args))[1])
    other = collect(built(folder), tmp_path / "other", tokens=TOKENS, text=text, **SMALL)
    assert len(read) == 5 - after
    assert same_bytes(whole, other)
    assert not work.exists()


def same_bytes(one: Collected, other: Collected) -> bool:
    names = [path.name for path in sorted(one.folder.iterdir())]
    return all((one.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in names)


def test_killed_after_the_pass(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect(built(folder), tmp_path / "whole", tokens=TOKENS, **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr("clt_collect.stage.sort_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            collect(built(folder), tmp_path / "other", tokens=TOKENS, **SMALL)
    made = built(folder)
    monkeypatch.setattr(made.transcoder, "encode", None)  # nothing is read again
    assert same_bytes(whole, collect(made, tmp_path / "other", tokens=TOKENS, **SMALL))


@pytest.mark.parametrize("text", ["held_out", "training"])
@pytest.mark.parametrize("name", ["ids", "value", "row", "start", "commits"])
def test_a_damaged_log_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, name: str, text: str
) -> None:
    """A digit of a number is another after a crash: what it is part of is read again, and the result is the same."""
    monkeypatch.setattr(log_module, "SHARD", 1)
    whole = collect(built(folder), tmp_path / "whole", tokens=TOKENS, text=text, **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr("clt_collect.stage.sort_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            collect(built(folder), tmp_path / "other", tokens=TOKENS, text=text, **SMALL)
    (path,) = (tmp_path / ".other.work").rglob(f"{name}-0.*")
    data = bytearray(path.read_bytes())
    at = data.index(b'"rows":') + 8 if name == "commits" else len(data) - 4
    data[at] ^= 1
    path.write_bytes(data)
    other = collect(built(folder), tmp_path / "other", tokens=TOKENS, text=text, **SMALL)
    assert same_bytes(whole, other)
    assert "damaged" in caplog.text


def test_a_log_of_other_settings_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("clt_collect.stage.sort_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            collect(built(folder), tmp_path / "store", tokens=TOKENS, **SMALL)
    assert collect(built(folder), tmp_path / "store", tokens=60, **SMALL).info.tokens == 60


@pytest.mark.parametrize("text", ["held_out", "training"])
def test_a_log_of_other_text_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The file has the same name: the rows of both were in one store."""
    shutil.copytree(folder, tmp_path / "data")
    monkeypatch.setattr(log_module, "SHARD", 1)
    original, shards = log_module.Log._append, 0

    def killed(log: Any) -> Any:
        nonlocal shards
        commit = original(log)
        if shards == 2:
            raise KeyboardInterrupt
        shards += 1
        return commit

    with monkeypatch.context() as patched:
        patched.setattr(log_module.Log, "_append", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(built(tmp_path / "data"), tmp_path / "store", tokens=TOKENS, text=text, **SMALL)
    save_text(tmp_path / "data/text.jsonl", 40, seed=7)
    resumed = collect(built(tmp_path / "data"), tmp_path / "store", tokens=TOKENS, text=text, **SMALL)
    whole = collect(built(tmp_path / "data"), tmp_path / "whole", tokens=TOKENS, text=text, **SMALL)
    assert same_bytes(whole, resumed)


def test_geometry_is_in_the_store(folder: Path, tmp_path: Path) -> None:
    made = built(folder)
    with_model = collect(made, tmp_path / "store", tokens=40, **SMALL, logits=2, virtual=1)
    assert with_model.info.geometry is not None
    assert with_model.info.geometry.logits == 2
    # Also those of tokens that are not in the text are spelled.
    with_model.spell(with_model.layer(0)["logits_up_id"][:, -1].ravel())
    without = collect(made, tmp_path / "other", tokens=40, **SMALL, geometry=False)
    assert without.info.geometry is None
    assert "norms" not in without.layer(0)


def test_what_cannot_be_collected_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="does not say which tokens"):
        collect(parts(), tmp_path / "synthetic", **SMALL)
    made = built(folder)
    with torch.no_grad():
        made.transcoder.encoder.b_enc[0, 0] = torch.inf  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="not finite"):
        collect(made, tmp_path / "inf", tokens=40, **SMALL, geometry=False)
    monkeypatch.setattr(reading, "free_bytes", lambda path: 1000)
    with pytest.raises(Refused, match=r"stages\.collect\.tokens: 9,000,000 tokens .* GB free: read fewer"):
        collect(built(folder), tmp_path / "full", tokens=9_000_000, **SMALL)
    assert not (tmp_path / "full").exists()


def test_a_run_and_its_command(folder: Path, tmp_path: Path) -> None:
    """A stage of a recipe; the command keeps its store, and makes another one where settings differ."""
    from clt_plugins import run

    out = tmp_path / "run"
    stage = {"name": "collect", "tokens": 60, **SMALL}
    train = {"batch_tokens": 32, "steps": 4, "eval_every": 4, "checkpoint_every": 2, "log_every": 2}
    run(tables(**changes(folder, train=train, stages=[stage])), out=out, plugins=plugins())
    first = Collected.open(out / "collected")
    assert first.info.made_from is not None
    assert first.info.made_from.transcoder.step == 4
    assert first.info.model is not None

    def command(*arguments: str, code: int = 0) -> Any:
        result = CliRunner().invoke(main_group, ["collect", *arguments], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result

    stamp = (out / "collected" / "collected.json").stat().st_mtime_ns
    assert "there already" in command(str(out)).stderr
    assert (out / "collected" / "collected.json").stat().st_mtime_ns == stamp
    shown = command(str(out), "--json", "--set", "stages[0].tokens=50").stdout
    assert json.loads(shown[shown.index("{") :])["tokens"] == 50
    assert Collected.open(out / "collected").info.tokens == 50
    command(str(out / "checkpoints" / "step_000002"))
    assert (out / "stages" / "step_000002" / "collected" / "collected.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("notes")
    assert "already there, and no store" in command(str(out), "--out", str(tmp_path / "mine"), code=2).stderr
    # A store in another place, made twice, has the same bytes.
    command(str(out), "--out", str(tmp_path / "again"), "--set", "stages[0].tokens=50")
    assert same_bytes(Collected.open(out / "collected"), Collected.open(tmp_path / "again"))
