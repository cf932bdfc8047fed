"""`python -m tests.faults --minutes M [--only NAME] [--seed S] [--json FILE] [--replay TRY] [--write]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.faults.campaign import FAMILIES, Campaign
from tests.faults.report import CAMPAIGN, README, as_table, written
from tests.faults.tries import Try


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="A campaign of faults.")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long; every family gets its share")
    parser.add_argument("--only", action="append", default=[], help="families, commands or faults that contain this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows and what was found into this file")
    parser.add_argument("--replay", metavar="TRY", help="repeat one try, and show all that it said")
    parser.add_argument("--thorough", action="store_true", help="end every command as an interpreter does; slower")
    parser.add_argument("--write", action="store_true", help=f"write the table of {CAMPAIGN.name} into {README.name}")
    options = parser.parse_args()
    if options.write:
        README.write_text(written(README.read_text(), json.loads(CAMPAIGN.read_text())))
        return 0
    campaign = Campaign(seed=options.seed, thorough=options.thorough)
    try:
        if options.replay:
            return campaign.replay(Try.parse(options.replay))
        unknown = [name for name in options.only if not campaign.knows(name)]
        if unknown:
            parser.error(f"--only {unknown[0]}: no family ({', '.join(FAMILIES)}), command or fault has it")
        campaign.run(options.minutes * 60, options.only)
    finally:
        campaign.close()
    print(as_table(campaign.rows.values()))
    if options.json:
        options.json.write_text(json.dumps(campaign.as_json(sys.argv[1:]), indent=1) + "\n")
    return int(any(row.lost for row in campaign.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
