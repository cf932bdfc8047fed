"""Whether the plugin keeps the contract: one test for each check of the conformance kit."""

from clt_plugins.testing import parametrize

SETTINGS = {"bias_nudge": {"norm": 0.3, "rise": 0.1, "after_tokens": 16, "every": 1}}


@parametrize("clt_training_ideas", settings=SETTINGS)
def test_conforms(case):
    case.run()
