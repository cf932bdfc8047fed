"""Plain data -> typed configs: every kind of fault, and what passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from attrs import field, frozen, validators

from clt_plugins import HubOrPath, Refused, Selected, Spec
from clt_plugins.contract.spec import Choice
from clt_plugins.contract.types import check_config
from clt_plugins.recipe.structure import Faults, converter


@frozen(kw_only=True)
class Inner:
    size: int = field(default=1, validator=validators.gt(0))


@frozen(kw_only=True)
class Everything:
    count: int = 1
    share: float = 0.5
    flag: bool = False
    word: str = "w"
    mode: Literal["fast", "slow"] = "fast"
    k: int | float = 1
    layers: int | list[int] = 1
    size: int | Literal["auto"] = "auto"
    limit: float | None = None
    where: Path = Path()
    model: HubOrPath | None = None
    inner: Inner = Inner()
    inners: list[Inner] = field(factory=list)
    options: dict[str, int | str] = field(factory=dict)
    wrapped: Annotated[Selected, "source"] | None = None


@frozen(kw_only=True)
class Pair:
    a: bool = False
    b: bool = False

    def __attrs_post_init__(self) -> None:
        if self.a and self.b:
            raise ValueError("a and b exclude each other")


@frozen(kw_only=True)
class Outer:
    pair: Pair


INNER = Spec("inner", Inner, lambda config, context: config)


def pick(slot: str, name: str) -> Choice:
    if (slot, name) != ("source", "inner"):
        raise Refused("", f"unknown name {name!r}")
    return Choice(INNER, slot)


def structure(data: Any, cls: type = Everything, folder: Path | None = None) -> Any:
    return converter(pick, folder).structure(data, cls)


def faults(data: Any, cls: type = Everything) -> list[str]:
    with pytest.raises(Faults) as caught:
        structure(data, cls)
    return [str(each) for each in caught.value.faults]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"count": "5"}, 'count: expected int, got "5"'),
        ({"count": 2.7}, "count: expected int, got 2.7"),
        ({"count": True}, "count: expected int, got true"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"flag": "True"}, 'flag: expected true or false, in small letters, got "True"'),
        ({"word": 3}, "word: expected str, got 3"),
        ({"share": False}, "share: expected float, got false"),
        ({"share": 10**400}, f"share: too large for a float: {10**400}"),
        ({"share": math.inf}, "share: must be finite: inf"),
        ({"k": -math.inf}, "k: must be finite: -inf"),
        ({"limit": math.nan}, "limit: must be finite: nan"),
        ({"mode": "fats"}, 'mode: expected one of "fast", "slow", got "fats", did you mean "fast"?'),
        ({"mode": 1}, 'mode: expected one of "fast", "slow", got 1'),
        ({"k": True}, "k: expected int or float, got true"),
        ({"layers": "x"}, 'layers: expected int or list of int, got "x"'),
        ({"layers": [1, "x"]}, 'layers[1]: expected int, got "x"'),
        ({"size": "atuo"}, 'size: expected int or "auto", got "atuo", did you mean "auto"?'),
        ({"limit": "no"}, 'limit: expected float, got "no"'),
        ({"where": 3}, "where: expected a path, got 3"),
        ({"where": ""}, 'where: expected a path, got ""'),
        ({"model": []}, "model: expected a hub id or a path, got []"),
        ({"inner": 3}, "inner: expected a table, got 3"),
        ({"inner": {"size": 0}}, "inner.size: must be > 0: 0"),
        ({"inner": {"sise": 1}}, "inner.sise: unknown key, did you mean 'size'?"),
        ({"inner": {"zzz": 1}}, "inner.zzz: unknown key (known: size)"),
        ({"inners": {"size": 1}}, "inners: expected list of a table, got {size = 1}"),
        ({"inners": [{}, {"size": -1}]}, "inners[1].size: must be > 0: -1"),
        ({"options": {"a b": [1]}}, "options.a b: expected int or str, got [1]"),
        ({"wrapped": "outer"}, "wrapped: unknown name 'outer'"),
        ({"wrapped": {"size": 1}}, "wrapped.name: required, but missing"),
        ({"wrapped": {"name": "inner", "size": "1"}}, 'wrapped.size: expected int, got "1"'),
    ],
)
def test_a_fault_is_named_by_its_path(data: dict[str, Any], line: str) -> None:
    assert faults(data) == [line]


def test_all_faults_come_at_once_in_the_order_of_the_data() -> None:
    data = {"inner": {"size": 0, "x": 1}, "count": None, "mode": "f", "layers": [True, 1, "x"]}
    assert faults(data) == [
        "inner.x: unknown key (known: size)",
        "inner.size: must be > 0: 0",
        'mode: expected one of "fast", "slow", got "f"',
        "layers[0]: expected int, got true",
        'layers[2]: expected int, got "x"',
    ]


def test_every_validator_is_heard_not_only_the_first() -> None:
    @frozen(kw_only=True)
    class Two:
        a: int = field(validator=validators.gt(0))
        b: list[int] = field(validator=validators.min_len(2))
        c: str = field(default="x", validator=validators.matches_re("[a-z]+"))

    assert faults({"a": 0, "b": [1], "c": "9"}, Two) == [
        "a: must be > 0: 0",
        "b: length must be >= 2: 1",
        "c: must match regex '[a-z]+' ('9' doesn't)",
    ]


def test_a_validator_that_looks_at_another_field_works_and_waits_while_that_is_faulty() -> None:
    @frozen(kw_only=True)
    class Range:
        high: int
        low: int = field()

        @low.validator
        def _below(self, attribute: Any, value: int) -> None:
            if value >= self.high:
                raise ValueError(f"'low' must be below high ({self.high}): {value}")

    assert faults({"low": 5, "high": 3}, Range) == ["low: must be below high (3): 5"]
    assert faults({"low": 5, "high": "x"}, Range) == ['high: expected int, got "x"']


def test_a_fault_of_the_whole_table_is_named_by_the_table() -> None:
    assert faults({"pair": {"a": True, "b": True}}, Outer) == ["pair: a and b exclude each other"]
    assert faults({}, Outer) == ["pair: required, but missing"]


def test_numbers_keep_their_kind_in_a_union_and_become_floats_where_only_a_float_will_do() -> None:
    made = structure({"k": 3, "share": 1, "limit": 2, "layers": [0, 2]})
    assert (type(made.k), made.k) == (int, 3)
    assert (type(made.share), made.share) == (float, 1.0)
    assert (type(made.limit), made.limit) == (float, 2.0)
    assert made.layers == [0, 2]
    assert type(structure({"k": 0.1}).k) is float


def test_a_choice_may_be_its_bare_name() -> None:
    assert structure({"wrapped": "inner"}).wrapped == structure({"wrapped": {"name": "inner"}}).wrapped
    assert structure({"wrapped": {"name": "inner", "size": 7}}).wrapped.config.size == 7


def test_paths_are_looked_for_beside_the_recipe_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes / "both", here / "both", here / "only"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)

    def found(text: str) -> tuple[Path, str]:
        made = structure({"where": text, "model": text}, folder=recipes)
        return made.where, made.model

    assert found("both") == (recipes / "both", str(recipes / "both"))
    assert found("only") == (here / "only", str(here / "only"))
    assert found("org/name") == (Path("org/name"), "org/name")
    assert found(str(here / "only")) == (here / "only", str(here / "only"))


def test_a_config_that_a_recipe_cannot_hold_is_refused_with_the_remedy() -> None:
    @frozen(kw_only=True)
    class Named:
        name: str = ""

    @frozen(kw_only=True)
    class Untyped:
        x = field(default=1)

    @frozen(kw_only=True)
    class Strange:
        x: set[int] = field(factory=set)

    class Plain:
        pass

    for cls, word in ((Named, "call the field otherwise"), (Untyped, "has no type"), (Strange, "use bool, int")):
        with pytest.raises(TypeError, match=word):
            check_config(cls)
    with pytest.raises(TypeError, match="must be an attrs class"):
        check_config(Plain)
    check_config(Everything)
