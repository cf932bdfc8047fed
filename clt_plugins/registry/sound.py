"""Whether what was loaded is sound: what a hook returned, and where engine and plugins come from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clt_plugins.contract.spec import Spec
from clt_plugins.contract.types import check_config
from clt_plugins.registry.discovery import OWN, ROOT
from clt_plugins.registry.info import Info, name_of

logger = logging.getLogger(__name__)


def check_spec(spec: Any) -> None:
    """
    Raises:
        TypeError: it is no `Spec`, or one that no recipe could use.
    """
    if not isinstance(spec, Spec):
        raise TypeError(f"must return a list of Spec, got {spec!r} in it")
    if not isinstance(spec.name, str) or not spec.name:
        raise TypeError(f"the name of a Spec must be a non-empty str, got {spec.name!r}")
    if not callable(spec.build):
        raise TypeError(f"{spec.name!r}: build must be callable, got {spec.build!r}")
    try:
        check_config(spec.config)
    except TypeError as error:
        raise TypeError(f"{spec.name!r}: {error}") from error


def warn_of_mixed_install(infos: Sequence[Info]) -> None:
    """Warn where the engine comes from one place and its own plugins from another: `python -m` in a checkout
    takes the engine from the working directory, whatever is installed."""
    own = [info for info in infos if info.status == "active" and info.file and name_of(info.distribution) == OWN]
    strays = [info for info in own if Path(info.file).resolve().parents[1] not in (ROOT, ROOT / "plugins")]
    if strays:
        logger.warning(
            "mixed installation: the engine is %s, but plugin %r is %s; install the checkout (pip install -e .) "
            "or start elsewhere",
            ROOT / "clt_plugins",
            strays[0].name,
            strays[0].file,
        )
