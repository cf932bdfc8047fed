"""What runs read: stored activations to train on, and two held-out sets of different documents.

A document is held out by a hash: one that is held out at a share is held out at every larger one (`is_held_out`). So
the documents below half of a setup's share are the set `report`, and the other held-out ones are the set `choose`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins import toml_text
from tests.benchmarks.quality.setups import ROOT, Setup

if TYPE_CHECKING:
    from clt_plugins import Batch, Source

SETS = ("choose", "report")


def python(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python program in the project's folder."""
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **options)


@attrs.frozen
class Stored:
    """Where a setup's activations are, in a lot's folder."""

    setup: Setup
    folder: Path

    @property
    def train(self) -> Path:
        """The data set."""
        return self.folder / "data" / self.setup.name

    def held_out(self, which: str) -> Path:
        """The file of a held-out set: `inputs` and `targets`, [tokens, L, D] float32."""
        return self.folder / "data" / f"{self.setup.name}-{which}.h5"

    def prepare(self) -> None:
        """Store what is missing, in processes of their own: a language model would stay in the memory of this one.

        Raises:
            SystemExit: a data set of other tokens or another text is there, or it could not be stored.
        """
        self.train.parent.mkdir(parents=True, exist_ok=True)
        manifest = self.train / "manifest.json"
        if not manifest.is_file():
            self._generate()
        self._check(json.loads(manifest.read_text()))
        if not all(self.held_out(which).is_file() for which in SETS):
            told = json.dumps({"setup": attrs.asdict(self.setup), "folder": str(self.folder.absolute())})
            process = python("-m", "tests.benchmarks.quality.data", stdin=subprocess.PIPE)
            process.communicate(told.encode())
            if process.returncode:
                sys.exit(process.returncode)

    def hold_out(self) -> None:
        """Store the held-out sets."""
        for which in SETS:
            if not self.held_out(which).is_file():
                self._write(which, self._read(which))

    def batches(self, which: str) -> list[Batch]:
        """A held-out set, in batches of the setup's size."""
        import h5py
        import torch

        from clt_plugins import Batch

        with h5py.File(self.held_out(which)) as file:
            inputs, targets = (torch.from_numpy(file[side][()]) for side in ("inputs", "targets"))
        size = self.setup.batch
        return [Batch(*pair) for pair in zip(inputs.split(size), targets.split(size), strict=True)]

    def reporting_source(self) -> Source:
        """The stream whose held-out documents are those of the set `report`; it has the language model."""
        return self._stream(self.setup.source["text"], self.setup.source["held_out"] / 2)

    # -- how it is stored -----------------------------------------------------------------------------------------

    def _generate(self) -> None:
        """Activations in float32, in the order in which the stream yields them."""
        setup = self.setup
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".generate-") as work:
            recipe = Path(work) / "generate.toml"
            recipe.write_text(toml_text({**setup.tables(512, 1), **setup.stream()}))
            command = ["-m", "clt_plugins", "generate", str(recipe), "--out", str(self.train.absolute())]
            command += ["--tokens", str(setup.tokens), "--held-out", "4096", "--dtype", "float32"]
            if status := python(*command).wait():
                sys.exit(status)

    def _check(self, manifest: dict[str, Any]) -> None:
        setup, source = self.setup, manifest["about"]["source"]
        same = {name: source.get(name) for name in setup.source} == setup.source
        if not same or (manifest["tokens"]["train"], manifest["dtype"]) != (setup.tokens, "float32"):
            sys.exit(f"{self.train}: holds other data than {setup.name!r} needs: remove it, or name another --folder")

    def _read(self, which: str) -> list[Batch]:
        """The tokens of a held-out set."""
        from clt_stream.text.stdlib import is_held_out, python_stdlib

        setup = self.setup
        if which == "report":
            return list(self.reporting_source().held_out(setup.report_tokens))
        share = setup.source["held_out"]
        documents = [
            text for name, text in python_stdlib() if is_held_out(name, share) and not is_held_out(name, share / 2)
        ]
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".choose-") as work:
            file = Path(work) / "choose.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
            # Of a text of their own, they are what a source trains on. One block is an epoch.
            return list(_first(self._stream(str(file), 0.0), setup.choose_tokens))

    def _stream(self, text: str, held_out: float) -> Source:
        from clt_plugins import build_source, read_recipe

        setup = self.setup
        tables = {**setup.tables(), **setup.stream(held_out)}
        tables["source"] = {**tables["source"], "text": text}
        tables["train"]["eval_tokens"] = setup.report_tokens
        return build_source(read_recipe(tables))

    def _write(self, which: str, batches: list[Batch]) -> None:
        import h5py
        import torch

        path = self.held_out(which)
        needed = getattr(self.setup, f"{which}_tokens")
        tokens = sum(batch.tokens for batch in batches)
        if tokens < needed:
            sys.exit(f"{self.setup.name}: the set {which!r} has {tokens} tokens, {needed} are needed")
        partial = path.with_name(f".{path.name}.partial")
        with h5py.File(partial, "w") as file:
            for side in ("inputs", "targets"):
                file[side] = torch.cat([getattr(batch, side) for batch in batches]).numpy()
        partial.replace(path)


def _first(source: Source, tokens: int) -> Iterator[Batch]:
    """The first rows that a source trains on."""
    while tokens > 0:
        batch = source.next()
        yield batch.rows(slice(0, tokens)) if batch.tokens > tokens else batch
        tokens -= batch.tokens


if __name__ == "__main__":
    told = json.load(sys.stdin)
    Stored(Setup(**told["setup"]), Path(told["folder"])).hold_out()
