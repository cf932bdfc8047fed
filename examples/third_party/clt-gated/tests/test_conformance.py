"""Whether the plugin keeps the contract, and computes its formula."""

import math

import torch
from clt_gated.gated import Gated

from clt_plugins import Context, Single
from clt_plugins.testing import parametrize


@parametrize("clt-gated", settings={"gated": [{}, {"offset": 0.1}]})
def test_conforms(case):
    case.run()


def test_the_formula():
    context = Context(
        recipe=None,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=16,
        steps=100,
        parallel=Single(),
        n_layers=3,
        d_model=6,
        n_features=41,
    )
    gated = Gated(0.5, context)
    with torch.no_grad():
        gated.log_scale[1, 2] = math.log(3)
    pre, feature = torch.tensor([-1.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 41 + 2])
    torch.testing.assert_close(gated(pre, feature).detach(), torch.tensor([0, 0, 2.5, 6.5]))
