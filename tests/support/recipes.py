"""A recipe with choices of a stub plugin, changes of it, and the faults that are found when it is read."""

from __future__ import annotations

from typing import Any

import pytest

from clt_plugins.errors import Faults
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.plugins import Plugins

STUB = """
from typing import Literal
from attrs import field, frozen, validators
from clt_plugins import HubOrPath, Spec, hookimpl

@frozen(kw_only=True)
class Activation:
    '''Keeps some.'''
    k: int = field(default=64, validator=validators.gt(0))
    '''How many.'''
    warmup: int = 0
    '''Steps.'''
    dtype: Literal["float32", "bfloat16"] = "float32"
    '''Type.'''

@frozen(kw_only=True)
class Loss:
    '''A term.'''
    layers: int | list[int] = 0
    '''Which.'''
    model: HubOrPath | None = None
    '''From where.'''

@hookimpl
def clt_activations():
    return [Spec("some", Activation, lambda config, context: config)]

@hookimpl
def clt_losses():
    return [Spec("layered", Loss, lambda config, context: config)]

@hookimpl
def clt_check(recipe):
    if recipe.activation.name == "some" and recipe.activation.config.k > recipe.transcoder.features:
        yield f"activation.k: must be <= transcoder.features ({recipe.transcoder.features})"
"""

GOOD: dict[str, Any] = {
    "name": "x",
    "source": "synthetic",
    "transcoder": {"features": 64},
    "activation": "some",
    "train": {"steps": 10},
}


def merged(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


def faults(recipe: Any, plugins: Plugins, *settings: str) -> list[str]:
    with pytest.raises(Faults) as caught:
        read_recipe(recipe, settings, plugins)
    lines = [str(fault) for fault in caught.value.faults]
    assert str(caught.value) == "\n".join(lines)
    return lines
