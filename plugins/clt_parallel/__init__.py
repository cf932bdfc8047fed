"""How features and tokens are split over processes: single."""

from __future__ import annotations

from typing import Any

from attrs import frozen

from clt_plugins import Spec, hookimpl


@frozen(kw_only=True)
class SingleConfig:
    """One process has it all; no process group."""


def build_single(config: SingleConfig, context: None) -> Any:
    from clt_parallel.single import Single

    return Single()


@hookimpl
def clt_parallel() -> list[Spec]:
    return [Spec("single", SingleConfig, build_single)]
