"""Mutations of a stranger's source, logger and command that the kit once let pass: each is found, by one failure."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.support.faulty import HEADER, LOGGER, SOURCE, assert_only


def test_a_source_whose_statistics_are_not_numbers(check: Any) -> None:
    statistics = """
    def statistics(self):
        shapes = {"mean": (2, 4), "std": (2, 4), "rms": (2,)}
        names = [(side, name) for side in ("inputs", "targets") for name in shapes]
        found = {f"{side}.{name}": torch.ones(shapes[name]) for side, name in names}
        found["inputs.mean"][0, 0] = NUMBER
        return found

    def old(self):"""
    source = (HEADER + SOURCE).replace("    def statistics(self):", statistics)
    assert check(source, ("statistics",), OFFSET="0", NUMBER="1.0") == {"statistics": "pass"}
    found = check(source, ("batches", "statistics"), OFFSET="0", NUMBER="float('nan')")
    assert_only(found, "statistics", "source 'mine' of plugin 'plugin_under_test'")
    assert "finite inputs.mean" in found["statistics"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("return rows[:, 0]", "a clt_plugins.Batch\n     got: Tensor"),
        ("return Batch(rows[1:, 0], rows[1:, 1])", "batch 0"),
    ],
)
def test_a_source_that_gives_no_batch_or_a_short_one(check: Any, line: str, text: str) -> None:
    checks = ("batches", "determinism", "resume", "exactly_once", "held_out", "ranks", "epochs")
    found = check(HEADER + SOURCE.replace("return Batch(rows[:, 0], rows[:, 1])", line, 1), checks, OFFSET="0")
    assert_only(found, "batches", text)


def test_held_out_batches_that_are_cut_by_a_rank_s_share(check: Any) -> None:
    cut = """for rows in self.rows[-tokens:].split(self.context.SIZE):
            yield Batch(rows[:, 0], rows[:, 1])

    def statistics"""
    source = HEADER + SOURCE[: SOURCE.index("rows = self.rows[-tokens:]")] + cut + SOURCE.partition("def statistics")[2]
    assert check(source, ("held_out",), OFFSET="0", SIZE="batch_tokens") == {"held_out": "pass"}
    found = check(source, ("batches", "held_out", "ranks"), OFFSET="0", SIZE="batch_share()")
    assert_only(found, "held_out", "on two ranks, as on one")


LOGGER_PARTS = {
    "START": "kept = [line for line in lines if int(line.split()[0]) <= step]",
    "MODE": '"w"',
    "DRAW": "pass",
    "FLUSH": "self.file.flush()",
}
DRAWING = (
    LOGGER.replace(
        'self.file = (self.folder / "log.txt").open("a")',
        """path = self.folder / "log.txt"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        START
        self.file = path.open(MODE)
        self.file.writelines(kept)
        self.file.flush()""",
    )
    .replace("sorted(metrics)", "metrics.get('loss/total')")
    .replace("        SLOW\n", "        DRAW\n")
    .replace("\n    def close", "        FLUSH\n\n    def close")
    .replace("CLOSE", "self.file.close()")
)
LOGGER_CHECKS = ("protocol", "resume", "prompt")


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({}, "", ""),
        ({"START": "kept = []"}, "resume", "step 1 in the files after a resume from step 4\n     got: it is lost"),
        ({"START": "kept = lines"}, "resume", "step 5 once in a file after a resume from step 4"),
        ({"START": "kept = []", "MODE": '"a"'}, "resume", "step 5 once in a file"),
        ({"START": "kept = [line for line in lines if int(line.split()[0]) < step]"}, "resume", "step 4 in the files"),
        ({"FLUSH": "pass"}, "resume", "step 1 in the files"),
        ({"DRAW": "time.sleep(0.06 * (step % 100 == 0))"}, "prompt", "s at step "),
        ({"DRAW": "assert step < 50, 'far'"}, "prompt", "AssertionError: far"),
    ],
    ids=["right", "overwrite", "notrunc", "dup", "loses the last", "noflush", "syncdraw", "lograise"],
)
def test_a_logger_that_is_wrong_in_one_way(check: Any, part: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + DRAWING, LOGGER_CHECKS, **{**LOGGER_PARTS, **part})
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}


def test_a_logger_may_begin_a_file_with_each_start(check: Any) -> None:
    source = (HEADER + DRAWING).replace('"log.txt"', 'f"log{step}.txt"')
    assert check(source, ("resume",), **LOGGER_PARTS) == {"resume": "pass"}


@pytest.mark.parametrize(("seconds", "text"), [("0.5", "pass"), ("60", "or by a thread within 4 s")])
def test_a_logger_whose_thread_writes_what_has_gathered(check: Any, seconds: str, text: str) -> None:
    thread = """        self.end = __import__("threading").Event()
        self.thread = __import__("threading").Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        while not self.end.wait(SECONDS):
            self.file.flush()

    def log("""
    source = (HEADER + DRAWING).replace("\n    def log(", thread, 1)
    closed = {"self.file.close()": "self.end.set(); self.thread.join(); self.file.close()", "FLUSH": "pass"}
    found = check(source, ("resume",), **{**LOGGER_PARTS, **closed, "SECONDS": seconds})
    assert text in found["resume"]


def test_a_logger_that_writes_no_file_is_not_asked_for_its_history(check: Any) -> None:
    source = (HEADER + LOGGER).replace('(self.folder / "log.txt").open("a")', "__import__('io').StringIO()")
    found = check(source, ("resume",), SLOW="", CLOSE="pass")
    assert found == {"resume": "skip: its files do not hold the numbers that it was given"}


LIGHT = """
import click
from clt_plugins import hookimpl
TOP

@click.command(NAME)
def histogram():
    HELP
    import torch

@hookimpl
def clt_commands():
    return [histogram]

@hookimpl
def clt_check(recipe):
    return COMPLAINTS
"""
LIGHT_RIGHT = {"TOP": "", "NAME": '"histogram"', "HELP": '"""Draw a histogram."""', "COMPLAINTS": "[]"}


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({}, "", ""),
        ({"TOP": "import torch"}, "imports", "a module that imports nothing heavy\n     got: "),
        ({"TOP": "import matplotlib"}, "imports", "matplotlib"),
        ({"TOP": "import time; time.sleep(1.6)"}, "imports", "an import of at most 0.15 s"),
        ({"TOP": "sum(range(30_000_000))"}, "imports", "an import of at most 0.15 s"),
        ({"NAME": '"run"'}, "commands", "'run' is the engine's, which is found first"),
        ({"HELP": "pass"}, "commands", "help of 'histogram'"),
        ({"COMPLAINTS": "None"}, "complaints", "`clt_check` to return a list"),
        ({"COMPLAINTS": "'text'"}, "complaints", "must return a list of str, got 'text'"),
        ({"COMPLAINTS": "['transcoder.features: must be even']"}, "", ""),
    ],
)
def test_a_module_its_commands_and_its_complaints(check: Any, part: dict[str, str], name: str, text: str) -> None:
    if "matplotlib" in part.get("TOP", ""):
        pytest.importorskip("matplotlib")
    found = check(LIGHT, ("imports", "commands", "complaints"), **{**LIGHT_RIGHT, **part})
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}
    assert sys.modules["plugin_under_test"].__name__ == "plugin_under_test"
