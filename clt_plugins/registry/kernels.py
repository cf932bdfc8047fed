"""The choice `kernels = "auto"`: the kernels that prefer the run's device most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from attrs import frozen

from clt_plugins.contract.model.kernels import Preferred
from clt_plugins.contract.spec import Choice, Selected, Spec, __version__
from clt_plugins.errors import PluginError, Refused
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.kernels import Kernels

logger = logging.getLogger(__name__)


@frozen(kw_only=True)
class AutoConfig:
    """The fastest kernels for the device."""


def auto(others: Callable[[], Iterable[Choice]]) -> Choice:
    """The choice `auto`.

    Args:
        others: returns all other choices for `[kernels]`.
    """

    def fastest(config: AutoConfig, context: Context) -> Kernels:
        built: list[tuple[int, Kernels]] = []
        reasons = []
        for choice in others():
            try:
                kernels = build(Selected(choice, choice.spec.config()), context)
                preference = kernels.preference(context.device) if isinstance(kernels, Preferred) else 0
                built.append((preference, kernels))
            except (Refused, ImportError) as error:
                reasons.append(f"{choice.spec.name}: {error}")
            except PluginError as error:
                # One broken plugin must not take the default away from everybody.
                logger.warning("kernels = auto passes over %r: %s", choice.spec.name, error)
                reasons.append(f"{choice.spec.name}: {error}")
        if not built:
            text = f"none serves {context.device} ({'; '.join(reasons) or 'no kernels plugin is loaded'})"
            raise Refused("kernels", text)
        return max(built, key=lambda pair: pair[0])[1]

    return Choice(Spec("auto", AutoConfig, fastest), "kernels", "clt_plugins", f"clt-plugins {__version__}", __file__)
