"""How the sources of third parties' plugins begin that tests install."""

from __future__ import annotations

HEADER = '''
from attrs import frozen
import torch
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """Third-party."""
    weight: float = 1.0
    """A number."""
'''
