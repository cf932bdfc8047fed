"""Whether the plugin keeps the contract, and computes its formula."""

import math

import torch

from clt_plugins.testing import cases, parametrize


@parametrize("clt-gated", settings={"gated": [{}, {"offset": 0.1}]})
def test_conforms(case):
    case.run()


def test_the_formula():
    from clt_gated.gated import Gated

    from clt_plugins.testing.bench import Bench

    case = next(case for case in cases("clt-gated", settings={"gated": {"offset": 0.5}}))
    bench = Bench(case.plugins, "activation", "gated", case.settings, {}, None, None)
    gated = bench.parts(stirred=False).transcoder.activation
    assert isinstance(gated, Gated)
    with torch.no_grad():
        gated.log_scale[1, 2] = math.log(3)
    pre, feature = torch.tensor([-1.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 41 + 2])
    torch.testing.assert_close(gated(pre, feature).detach(), torch.tensor([0, 0, 2.5, 6.5]))
