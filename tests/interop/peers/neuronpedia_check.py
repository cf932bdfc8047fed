"""Validate graphs, features and a bulk import against a checkout of Neuronpedia: its JSON schemas, and its database's
tables.

Runs in an environment with jsonschema; imports nothing of this repository. Prints one line of JSON.

    python neuronpedia_check.py CHECKOUT GRAPHS FEATURES IMPORT
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

from jsonschema import Draft7Validator

TABLES = {"features": "Neuron", "activations": "Activation", "release": "SourceRelease", "model": "Model"}
TABLES |= {"sourceset": "SourceSet", "source": "Source"}
TYPES = {"String": str, "Int": int, "Float": (int, float), "Boolean": bool, "Json": object, "Visibility": str}


def columns(prisma: str, table: str) -> dict[str, tuple[str, str, bool]]:
    """Of each column of a table its type, "" or "?" or "[]", and whether a row must give it."""
    body = re.search(rf"^model {table} \{{(.*?)^\}}", prisma, re.S | re.M)
    assert body is not None, f"the schema has no table {table}"
    out = {}
    for line in body[1].splitlines():
        match = re.match(r"\s+(\w+)\s+(\w+)(\?|\[\])?(.*)", line)
        if match and match[2] in TYPES:
            rest = match[4]
            needed = not match[3] and "@default" not in rest and "@updatedAt" not in rest
            out[match[1]] = (match[2], match[3] or "", needed)
    return out


def check_row(row: dict, known: dict[str, tuple[str, str, bool]], where: str) -> None:
    for name, (kind, many, needed) in known.items():
        assert name in row or not needed, f"{where}: no {name}"
        if name not in row:
            continue
        values = row[name] if many == "[]" else [row[name]]
        for value in values:
            good = isinstance(value, TYPES[kind]) and not (isinstance(value, bool) and kind != "Boolean")
            assert good, f"{where}: {name} is {value!r}, which is no {kind}"
            # Its database is PostgreSQL, which holds no NUL.
            assert not isinstance(value, str) or "\x00" not in value, f"{where}: {name} has a NUL"
    assert not row.keys() - known.keys(), f"{where}: {row.keys() - known.keys()} are no columns"


def main(checkout: str, graphs: str, features: str, imported: str) -> None:
    root = Path(checkout, "apps/webapp")
    count: Counter[str] = Counter()
    for folder, schema in ((graphs, "graph-schema.json"), (features, "feature-details-schema.json")):
        validator = Draft7Validator(json.loads((root / "app/api/graph" / schema).read_text(encoding="utf-8")))
        for file in sorted(Path(folder).glob("*.json")):
            if file.name not in ("graph-metadata.json", "report.json", "manifest.json"):
                validator.validate(json.loads(file.read_text(encoding="utf-8")))
                count[schema] += 1
    prisma = (root / "prisma/schema.prisma").read_text(encoding="utf-8")
    known = {name: columns(prisma, table) for name, table in TABLES.items()}
    sources = [path for path in Path(imported).glob("*/*") if path.is_dir()]
    for source in sources:
        rows = dict.fromkeys(TABLES, 0)
        for file in sorted(source.rglob("*.jsonl*")):
            name = file.parent.name if file.suffix == ".gz" else file.stem
            data = file.read_bytes()
            for line in (gzip.decompress(data) if file.suffix == ".gz" else data).splitlines():
                row = json.loads(line)
                check_row(row, known[name], str(file))
                rows[name] += 1
                assert row.get("layer", source.name) == source.name
        assert all(rows[name] == 1 for name in ("release", "model", "sourceset", "source")), rows
        count.update(rows)
    print(json.dumps(count), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
