"""Whether the plugin keeps the contract, and what it gives to wandb. Offline: nothing is sent."""

import pytest
import torch

from clt_plugins.testing import parametrize


@parametrize("clt-wandb", settings={"wandb": {"mode": "offline"}})
def test_conforms(case, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if str(case) == "wandb/resume":
        pytest.skip("wandb has one run in a process; the check lets the killed run live on beside the resumed one")
    case.run()


def test_numbers_layers_and_histograms():
    from clt_wandb import WandbConfig
    from clt_wandb.logger import Wandb

    class Run:
        def log(self, found):
            self.found = found

    logger = Wandb(WandbConfig(), None)
    logger.run = Run()
    by_layer, spread = torch.tensor([0.5, 0.25]), torch.tensor([[0.0, 1.0, 1.0], [2.0, float("nan"), 2.0]])
    logger.log(7, {"loss/total": 0.5, "eval/nmse_by_layer": by_layer, "eval/density": spread})
    found = logger.run.found
    assert (found["step"], found["loss/total"]) == (7, 0.5)
    assert (found["eval/nmse_by_layer/00"], found["eval/nmse_by_layer/01"]) == (0.5, 0.25)
    assert sum(found["eval/density/00"].histogram) == 3
    assert sum(found["eval/density/01"].histogram) == 2
