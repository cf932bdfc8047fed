"""Cases: one cause gives one failure, a default that does not fit is skipped, pytest shows one message."""

from __future__ import annotations

import builtins
import subprocess
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import pytest

from clt_plugins import Refused
from clt_plugins.testing import Case, Nonconformance, cases, parametrize
from clt_plugins.testing.registry import needed
from tests.support.commands import python
from tests.support.faulty import HEADER, LOSS

if TYPE_CHECKING:
    from tests.conftest import Distributions

LOSS = LOSS.replace("DETACH", "")
BROKEN = HEADER + LOSS.replace("values = ", "print('noise'); 1 / 0; values = ")
QUICK = ("terms", "sparse_is_dense", "bf16", "determinism", "no_sync", "gradient_features", "own_gradient")


def said(case: Case) -> str:
    try:
        case.run()
    except SkipTest as reason:
        return f"skip: {reason}"
    except Nonconformance as error:
        return f"FAIL: {error}"
    return "pass"


def results(module: str, settings: Any = None) -> dict[str, str]:
    return {str(case): said(case) for case in cases(module, settings=settings) if case.check in QUICK}


def failed(found: dict[str, str]) -> list[str]:
    return [name for name, text in found.items() if text.startswith("FAIL")]


def test_the_others_are_skipped_where_a_basic_check_failed(distributions: Distributions) -> None:
    distributions.module("plugin_under_test", BROKEN)
    found = results("plugin_under_test")
    assert failed(found) == ["mine/terms"]
    assert "ZeroDivisionError: division by zero\n look at: " in found["mine/terms"]
    assert "plugin_under_test.py:18 in __call__" in found["mine/terms"]
    text = "skip: mine/terms failed, perhaps for the same cause: mend that first"
    assert {found[f"mine/{name}"] for name in QUICK[1:]} == {text}


def test_a_basic_check_is_made_first_and_once(distributions: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only another one was asked for."""
    counting = "import builtins; builtins.calls = getattr(builtins, 'calls', 0) + 1; values = "
    source = LOSS.replace("values = ", counting).replace("return {", "return {1: 0, ")
    distributions.module("plugin_under_test", HEADER + source)
    by_name = {case.check: case for case in cases("plugin_under_test")}
    monkeypatch.setattr(builtins, "calls", 0, raising=False)
    assert said(by_name["bf16"]).startswith("skip: mine/terms failed")
    assert builtins.calls == 1  # type: ignore[attr-defined]
    assert said(by_name["terms"]).startswith("FAIL")
    assert builtins.calls == 1  # type: ignore[attr-defined]
    assert said(by_name["terms"]).startswith("FAIL")
    assert builtins.calls == 2  # type: ignore[attr-defined]  # asked for again


def test_the_same_error_in_another_check_is_not_told_again(distributions: Distributions) -> None:
    in_float64 = "        if forward.targets.dtype.itemsize == 8: 1 / 0\n        values = "
    distributions.module("plugin_under_test", HEADER + LOSS.replace("        values = ", in_float64))
    found = results("plugin_under_test")
    assert failed(found) == ["mine/sparse_is_dense"]
    assert found["mine/gradient_features"] == "skip: it fails as mine/sparse_is_dense does: mend that first"


def test_what_is_meant_to_fail_does_not_stop_others(distributions: Distributions) -> None:
    distributions.module("plugin_under_test", HEADER + LOSS.replace(".values", ".values * float('nan')"))
    mark = parametrize("plugin_under_test", expected_failures={"mine/terms": "NaN on purpose"})
    by_name = {parameter.values[0].check: parameter.values[0] for parameter in mark.args[1]}
    assert said(by_name["bf16"]).startswith("FAIL")


@pytest.mark.parametrize("way", ["build", "clt_check"])
def test_a_default_that_does_not_fit_the_bench_is_skipped_and_settings_that_do_not_fail_once(
    distributions: Distributions, way: str
) -> None:
    source = LOSS
    if way == "build":
        refuse = "def build(config, context):\n    if config.weight < 3:\n"
        refuse += "        raise Refused('losses[0].weight', 'too light')\n    return Loss()\n\n"
        source = source.replace("@hookimpl", f"{refuse}@hookimpl")
        source = source.replace("lambda config, context: Loss()", "build")
    else:
        source += (
            "\n@hookimpl\ndef clt_check(recipe):\n    return [f'losses[0].weight: too light' for loss in recipe.losses "
        )
        source += "if loss.name == 'mine' and loss.config.weight < 3]\n"
    distributions.module("plugin_under_test", HEADER + source)
    found = results("plugin_under_test")
    assert failed(found) == []
    assert all(text.startswith("skip: the default is refused: ") for text in found.values()), found
    assert all("losses[0].weight: too light" in text for text in found.values())
    found = results("plugin_under_test", {"mine": [{"weight": 2.0}, {"weight": 4.0}]})
    assert failed(found) == ["mine#1/terms"]
    assert "losses[0].weight: too light" in found["mine#1/terms"]
    assert found["mine#2/terms"] == "pass"


def test_an_unknown_case_names_the_nearest_and_all(distributions: Distributions) -> None:
    distributions.module("plugin_under_test", HEADER + LOSS)
    settings = {"mine": [{"weight": 2.0}, {"weight": 4.0}]}
    with pytest.raises(Refused) as caught:
        parametrize("plugin_under_test", settings=settings, expected_failures={"mine/terms": "why"})
    assert "there is no case 'mine/terms', did you mean 'mine#" in str(caught.value)
    assert "(known: plugin_under_test/imports, " in str(caught.value)
    assert "mine#2/terms" in str(caught.value)


def test_pytest_shows_one_message(distributions: Distributions) -> None:
    distributions.module("plugin_under_test", BROKEN)
    test = "from clt_plugins.testing import parametrize\n\n@parametrize('plugin_under_test')\ndef test_it(case):\n"
    (distributions.folder / "test_it.py").write_text(test + "    if case.check == 'terms': case.run()\n")
    # Where `CI` is set, pytest shows the whole message in its summary too: without that part of it.
    flags = ("-q", "-rN", "-p", "no:cacheprovider")
    done = python("-m", "pytest", *flags, "test_it.py", cwd=distributions.folder)
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 1
    assert done.stdout.count("expected: the check runs through") == 1
    assert done.stdout.count("ZeroDivisionError: division by zero") == 1
    assert "The above exception" not in done.stdout
    assert "clt_plugins/testing" not in done.stdout.replace("clt_plugins.testing", "")


def test_without_pytest_what_is_printed_is_kept_back(distributions: Distributions) -> None:
    distributions.module("plugin_under_test", BROKEN)
    arguments = ("-m", "clt_plugins.testing", "plugin_under_test", "-k", "mine/terms")
    done = python(*arguments, cwd=distributions.folder)
    assert "FAIL  mine/terms" in done.stdout
    assert "noise" not in done.stdout + done.stderr
    done = python(*arguments, "-v", cwd=distributions.folder)
    assert "noise" in done.stdout
    assert "in __call__" in done.stdout
    assert "Traceback" in done.stdout


def test_what_a_check_needs() -> None:
    assert needed("losses", "terms") == []
    assert needed("losses", "config") == []
    assert needed("activation", "own_gradient") == ["selection", "sparse_is_dense", "gradient"]
    assert needed("plugin", "commands") == ["imports"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["-k", "mine/tems"], "-k: no case's name holds 'mine/tems': did you mean 'mine/terms'"),
        (["-k", "nothing"], "-k: no case's name holds 'nothing': there are plugin_under_test/imports, "),
        (["--settings", '{"min": {"weight": 2}}'], "settings: plugin_under_test offers no choice 'min', did you mean"),
        (["--settings", '{"mine": {"wieght": 2}}'], "settings.mine.wieght: unknown key, did you mean 'weight'?"),
        (["--settings", '{"mine": [{}, {"weight": "2"}]}'], 'settings.mine#2.weight: expected float, got "2"'),
        (["--settings", '{"mine": 2}'], "settings: of 'mine': expected a table, or a list of tables, got 2"),
        (["--settings", "[]"], '--settings: expected {"CHOICE": {"SETTING": value}}, got []'),
        (["--settings", "{"], "--settings: no JSON: Expecting property name"),
    ],
)
def test_what_does_not_exist_is_told_in_one_line(distributions: Distributions, arguments: list[str], text: str) -> None:
    distributions.module("plugin_under_test", HEADER + LOSS)
    done = python("-m", "clt_plugins.testing", "plugin_under_test", *arguments, cwd=distributions.folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(text)
    assert done.stderr.count("\n") == 1


def test_a_plugin_that_cannot_be_loaded_is_told_whatever_was_asked_for(distributions: Distributions) -> None:
    done = python("-m", "clt_plugins.testing", "not_there", "-k", "terms", cwd=distributions.folder)
    assert done.returncode == 1
    assert "FAIL  not_there/load\nnot_there cannot be loaded" in done.stdout
