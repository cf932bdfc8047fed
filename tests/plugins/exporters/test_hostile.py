"""Folders of other tools that were made to do harm: refused, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clt_plugins import Faults
from tests.support.exports import ACTIVATIONS, export, load, make
from tests.support.format_truth import D, F, L
from tests.support.formats import transcoder_set
from tests.support.trainer_formats import llamascopium


class Harm:
    """What makes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A folder of llamascopium with a pickled file, which can be read."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    llamascopium(folder, act_fn="jumprelu", pickled=True)
    assert load(folder).n_layers == L
    return folder


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(pickled: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for content in (Harm(proof), {"sae": {"W_E": Harm(proof)}}):
        torch.save(content, pickled / "sae_weights.pt")
        with pytest.raises(Faults, match="not a file of tensors alone"):
            load(pickled)
    (pickled / "sae_weights.pt").write_bytes(pickle.dumps(Harm(proof)))
    with pytest.raises(Faults, match=r"not a file of torch\.save's present format"):
        load(pickled)
    assert not proof.exists()
    torch.load(_harmful(tmp_path / "control.pt", proof), weights_only=False)
    assert proof.exists(), "the file would have done it"


def _harmful(path: Path, proof: Path) -> Path:
    torch.save(Harm(proof), path)
    return path


def test_a_pickle_that_would_fill_the_memory_is_refused(pickled: Path) -> None:
    path = pickled / "sae_weights.pt"
    few = torch.zeros(1).expand(10**6, 10**6, 10)
    torch.save({"sae": {"W_E": few, "b_E": few}}, path)
    with pytest.raises(Faults, match=r"'W_E' has the shape \[1000000, 1000000, 10\], and fewer numbers"):
        load(pickled)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(Faults, match=r"is compressed, which torch.save does not do"):
        load(pickled)
    torch.save([1, 2], path)
    with pytest.raises(Faults, match="expected tensors under 'sae'"):
        load(pickled)


@pytest.mark.parametrize("name", ["layer_1.safetensors", "config.yaml"])
def test_a_pipe_is_refused_and_does_not_block(name: str, tmp_path: Path) -> None:
    transcoder_set(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name == "config.yaml":  # no file: the folder has no description, and its activation is told by its tensors
        assert load(tmp_path).choices["activation"].name == "relu"
        return
    with pytest.raises(Faults, match="not a regular file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 50_000, "not a readable YAML file"),
        ("a: !!python/object/apply:os.mkdir [PROOF]", "not a readable YAML file"),
        ("- 1\n- 2\n", "expected a table, got list"),
        ("# " + "x" * 2**22, "larger than"),
        ("activation: topk\nk: 10000000000000\n", "is more than the 10 features in scope"),
        ("activation: topk\nk: [1]\n", "k must be a whole number above 0"),
        ("activation: gelu\n", "unknown activation 'gelu'"),
    ],
)
def test_a_harmful_description_is_refused(text: str, said: str, tmp_path: Path) -> None:
    folder, proof = tmp_path / "set", tmp_path / "proof"
    folder.mkdir()
    transcoder_set(folder, kind="relu")
    (folder / "config.yaml").write_text(text.replace("PROOF", str(proof)))
    with pytest.raises(Faults, match=said):
        load(folder)
    assert not proof.exists()


def test_two_files_of_one_layer_and_absurd_numbers_are_refused(tmp_path: Path) -> None:
    one = {"w_enc": torch.zeros(D, F), "b_enc": torch.zeros(F), "threshold": torch.zeros(F)}
    save_file(one, tmp_path / "params_layer_0.safetensors")
    save_file(one, tmp_path / "params_layer_00.safetensors")
    with pytest.raises(Faults, match="not a transcoder"):
        load(tmp_path)
    (tmp_path / "params_layer_00.safetensors").rename(tmp_path / "params_layer_123456789.safetensors")
    with pytest.raises(Faults, match=r"lacks tensor 'w_dec'"):  # a file whose number is no layer's is not looked at
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"n_layers": 10**12}))
    with pytest.raises(Faults, match=r"lacks tensor 'w_dec'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("stored", "told"), [("W_enc", "W_enc"), ("b_dec", "b_dec"), ("threshold", "log_threshold"), ("W_dec.00", "W_dec")]
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, stored: str, told: str) -> None:
    folder = export(make(ACTIVATIONS["jumprelu"]), "safetensors", tmp_path / "out")
    path = folder / "clt.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert load(folder).n_layers
    tensors[stored].view(-1)[0] = torch.nan
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(Faults, match=f"tensor '{told}.*' holds numbers that are not finite"):
        load(folder)
