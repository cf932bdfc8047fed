"""`python -m tests.interop`: make the environments of all tools, and run the tests marked `interop` in them.

    CLT_CIRCUIT_TRACER=/path/to/circuit-tracer python -m tests.interop
    python -m tests.interop --only sae-lens -- -k skip

`CLT_INTEROP_CACHE` names the folder of the environments, and variables such as `CLT_SAE_LENS_PYTHON` the interpreter of
one that is there already.

What cannot be installed is listed at the end, and then the exit code is not 0, even where all tests pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from tests.interop.environments import PEERS, ROOT, NotInstalled, cache, environment


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interop", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*PEERS], help="one tool; may be repeated")
    parser.add_argument("pytest", nargs="*", metavar="-- PYTEST", help="what pytest gets: -k graph, a file, --pdb")
    options = parser.parse_args()
    missing: dict[str, str] = {}
    variables: dict[str, str] = {}
    print(f"environments: {cache()}", flush=True)
    for name in options.only or PEERS:
        peer = PEERS[name]
        given = os.environ.get(peer.variable)
        print(f"{name}: {f'{peer.variable}={given}' if given else 'installing'} ...", flush=True)
        start = time.monotonic()
        try:
            variables[peer.variable] = given or str(environment(peer))
        except NotInstalled as why:
            missing[name] = str(why)
            print(f"{name}: NOT INSTALLED: {why}", flush=True)
        else:
            print(f"{name}: {variables[peer.variable]} ({time.monotonic() - start:.0f} s)", flush=True)
    code = 0
    if variables:
        # A tool that is left out must not be tried with the interpreter of the tests.
        others = {PEERS[name].variable: "" for name in PEERS if PEERS[name].variable not in variables}
        files = [] if any(word.startswith("tests/") for word in options.pytest) else ["tests/interop"]
        command = [sys.executable, "-m", "pytest", "-m", "interop", "-n", "0", "-rs", *files, *options.pytest]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **others, **variables}).returncode
    for name, why in missing.items():
        print(f"\n!!! NOT TESTED: {name}\n!!! {why}", flush=True)
    if missing:
        print(f"\n!!! {len(missing)} of {len(options.only or PEERS)} tools could not be installed", flush=True)
    return code or bool(missing)


if __name__ == "__main__":
    sys.exit(main())
