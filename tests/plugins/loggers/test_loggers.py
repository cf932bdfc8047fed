"""What all loggers have in common."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from clt_plugins import Refused
from tests.support.helpers import plugins
from tests.support.logged import (
    RECIPE,
    in_a_process,
    lines,
    log_steps,
    logger,
    read_events,
    scalars,
)

NAMES = ["tensorboard", "jsonl", "console"]


@pytest.mark.parametrize("name", NAMES)
def test_closing_before_the_start_and_closing_twice_do_no_harm(name, context, tmp_path):
    logger(name, context, tmp_path).close("failed")
    sink = logger(name, context, tmp_path)
    sink.start(RECIPE, 0)
    log_steps(sink, 1, 3)
    sink.close("failed")
    sink.close("failed")


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_missing_folder_is_named(name, context, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        logger(name, context, tmp_path / "nowhere").start(RECIPE, 0)


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_run_without_a_folder_is_refused(name, context):
    spec = plugins().pick("loggers", name).spec
    with pytest.raises(Refused, match=f"loggers: {name} needs a folder"):
        spec.build(spec.config(), attrs.evolve(context, folder=None))


@pytest.mark.parametrize(
    ("name", "file", "settings"), [("tensorboard", "events", "flush_seconds=0"), ("jsonl", "metrics", "")]
)
def test_a_full_disk_is_reported_by_the_call_that_meets_it_and_names_the_file(name, file, settings, tmp_path):
    done = in_a_process(
        f"""
        sink = logger({name!r}, context, folder, {settings})
        sink.start(RECIPE, 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(1, 1000):
            try:
                sink.log(step, metrics(step))
            except OSError as error:
                print(step, error.filename)
                break
        sink.close("failed")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no thread died with a stack trace"
    step, path = done.stdout.split()
    assert file in Path(path).name
    if name == "jsonl":
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text.count("\n") == int(step) - 1, "each line before is there"
    else:
        assert len(scalars(read_events(tmp_path), "loss/total")) >= int(step) - 1


@pytest.mark.parametrize(("name", "settings"), [("tensorboard", "flush_seconds=0"), ("jsonl", "")])
def test_what_was_logged_outlives_a_process_that_dies_without_a_word(name, settings, tmp_path):
    script = f"""
        sink = logger({name!r}, context, folder, {settings})
        sink.start(RECIPE, 0)
        log_steps(sink, 1, 5)
        os._exit(7)
        """
    assert in_a_process(script, tmp_path).returncode == 7
    found = lines(tmp_path) if name == "jsonl" else scalars(read_events(tmp_path), "loss/total")
    assert len(found) == 5
