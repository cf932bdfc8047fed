"""Whether the plugin keeps the contract: one test for each check of the conformance kit."""

from clt_plugins.testing import parametrize


@parametrize("clt_model_ideas", settings={"robust": [{}, {"sample": 8}], "jensen_shannon": {"contexts": 2}})
def test_conforms(case):
    case.run()
