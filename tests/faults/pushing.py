"""`clt_plugins` in a process that sees the stand-in of the hub as the hub; run in place of `clt_plugins` itself."""

from __future__ import annotations

import os
from pathlib import Path

from clt_plugins.__main__ import main
from tests.support.hub.client import turned_to

if __name__ == "__main__":
    with turned_to(os.environ["CLT_STANDIN"], Path(os.environ["CLT_STANDIN_HOME"])):
        main()
