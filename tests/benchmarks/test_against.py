"""The table of a step against other systems, from records made by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.against import table


def record(ours: list[float], other: list[float], system: str, over: float, dtype: str = "fp32") -> str:
    return json.dumps(
        {
            "against": {"clt-plugins": {"seconds": ours}, system: {"seconds": other}},
            "over_roofline": over,
            "roofline": {"seconds": 0.5, "read_gb_per_s": 20.0},
            "settings": {"dtype": dtype},
            "commit": "abc",
        }
    )


def test_the_rows_are_medians_of_ratios_and_what_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "decode-clt-512.json").write_text(record([1.0, 2.0, 1.0], [8.0, 8.0, 6.0], "decode-clt", 1.2))
    (tmp_path / "dense-512.json").write_text(record([1.0], [9.0], "dense", 1.4))
    bf16 = record([1.0], [9.0], "decode-clt", 9.0, "bf16")
    (tmp_path / "decode-clt-bf16-512.json").write_text(bf16)
    made = table(tmp_path)
    assert [row[1:] for row in made["rows"]] == [
        ["6.0 × (4.0–8.0)", "not measured"],
        ["9.0 × (9.0–9.0)", "not measured"],
        ["9.0 × (9.0–9.0)", "not measured"],
        ["1.30 ×", "not measured"],  # of float32 alone
        ["16.0 ×", "not measured"],  # 8 s over 0.5 s
    ]
    assert "at 20 GB/s" in made["what"] and len(made["runs"]) == 3 and made["commit"] == "abc"
