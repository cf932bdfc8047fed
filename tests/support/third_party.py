"""How the sources of third parties' plugins begin that tests install, and a recipe with the loss `mine` of one."""

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
RECIPE = """
name = "x"
activation = { name = "topk", k = 4 }
loggers = []

[source]
name = "synthetic"

[transcoder]
features = 16
device = "cpu"

[[losses]]
name = "mse"

[[losses]]
name = "mine"
weight = 2.0

[train]
statistics_tokens = 64
steps = 2
batch_tokens = 32
eval_tokens = 32
"""
