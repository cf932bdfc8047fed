"""The data of a site, read by the documented schema alone, against the store."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from clt_plugins import Collected, Curve, Facts, Refused
from clt_plugins.finished.provenance import Origin
from clt_plugins.testing.stores import HOSTILE, make_store
from clt_reports import SiteConfig
from clt_reports.site.data import search, text
from clt_reports.site.data.text import cuts
from clt_reports.site.write import Site
from tests.support.site_data import SiteData

FACTS = Facts(
    name="</script><b>run\u2028",
    folder="run",
    recipe={"name": "x", "model": {"path": "</script>"}, "source": {"name": "stream"}},
    recipe_text='name = "<!--"\n',
    transcoder=Origin(folder="transcoder", sha256="ab" * 32, step=3, tokens=30),
    curves={
        "eval/nmse": Curve(step=[1, 2], value=[0.5, None]),
        "eval/l0_by_layer": Curve(step=[1], value=[[float("nan"), 2.0]]),
    },
    evaluation={"nmse": float("inf"), "by_layer": {"nmse": [None]}},
)


def write(collected: Collected, folder: Path, facts: Facts = FACTS, **settings: Any) -> SiteData:
    folder.mkdir()
    Site(SiteConfig(**settings), None).write(collected, facts, folder)  # type: ignore[arg-type]
    return SiteData(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Collected, SiteData]:
    folder = tmp_path_factory.mktemp("site")
    # Most ids of a large vocabulary do not occur: a word is another number than its token id.
    make_store(folder / "store", layers=3, features=70, tokens=3000, contexts=40, vocabulary=4000)
    collected = Collected.open(folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "ROWS", 500)
        patch.setattr(search, "SHARD", 200)
        return collected, write(collected, folder / "site", shard=32)


def test_every_number_of_every_feature_is_that_of_the_store(built: tuple[Collected, SiteData]) -> None:
    collected, data = built
    ids = data.arrays("vocabulary")["id"]
    shown = 0
    for layer in range(3):
        stored = collected.layer(layer)
        for feature in range(70):
            page = data.feature(layer, feature)
            for name, value in page.items():
                if name.startswith("window_"):
                    continue
                shown += 1
                if name.endswith("_word"):
                    expected = stored[name.replace("_word", "_id")][feature]
                    np.testing.assert_array_equal(ids[value], expected)
                else:
                    np.testing.assert_array_equal(value, stored[name][feature])
    left_out = {"window_start", "window_count", "window_offset", "window_value"}
    assert shown == 3 * 70 * len(stored.keys() - left_out)


def test_examples_are_those_of_the_reader_with_their_tokens(built: tuple[Collected, SiteData]) -> None:
    """The windows, put together from sparse values as the schema says."""
    collected, data = built
    rows = data.text()
    window = data.site["examples"]["window"]
    count = 0
    for layer, feature in [(0, 0), (0, 31), (0, 32), (1, 69), (2, 5), (2, 64)]:
        page, stored = data.feature(layer, feature), collected.examples(layer, feature)
        groups = [one for group in stored.groups for one in group]
        of_page = np.concatenate([page["top_row"], page["group_row"].ravel()])
        values = np.concatenate([page["top_value"], page["group_value"].ravel()])
        begin = 0
        expected = iter([*stored.top, *groups])
        for row, value, entries in zip(of_page, values, page["window_count"], strict=True):
            offsets, around = page["window_offset"][begin:][:entries], page["window_value"][begin:][:entries]
            begin += entries
            if row < 0:
                assert entries == 0
                continue
            one = next(expected)
            assert (row, value) == (one.row, one.value) and abs(offsets).max() <= window
            dense = np.zeros(one.stop - one.start, np.float32)
            dense[row + offsets - one.start] = around
            np.testing.assert_array_equal(dense, one.values)
            # Neighbours of a row are rows of the same context.
            assert (rows["context"][one.start : one.stop] == rows["context"][row]).all()
            spelled = data.bytes_of(rows["word"][one.start : one.stop])
            assert spelled == collected.spell(collected.ids[one.start : one.stop])
            count += 1
        assert next(expected, None) is None
    assert count > 20


def test_the_text_is_whole_and_contexts_are_not_divided(built: tuple[Collected, SiteData]) -> None:
    collected, data = built
    rows = data.text()
    assert len(data.site["text"]["rows"]) > 4
    assert data.arrays("vocabulary")["id"][rows["word"]].tolist() == collected.ids.tolist()
    np.testing.assert_array_equal(rows["context"], collected.text.context)
    np.testing.assert_array_equal(rows["position"], collected.text.position)
    assert all(rows["context"][cut - 1] != rows["context"][cut] for cut in data.site["text"]["rows"][1:-1])


@pytest.mark.parametrize("read", [1, 7, 64, 5000])
def test_where_text_files_begin_does_not_depend_on_how_much_is_read_together(
    read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "ROWS", 60)
    context = np.repeat(np.arange(90), np.random.default_rng(0).integers(1, 40, 90))
    expected, starts = [0], np.flatnonzero(np.diff(context)) + 1
    for start in starts.tolist():  # the first start of a context that leaves 60 rows behind it
        if start >= expected[-1] + 60:
            expected.append(start)
    monkeypatch.setattr(text, "READ", read)
    assert cuts(context) == [*expected, len(context)]
    assert cuts(context[:0]) == [0]


def test_columns_of_the_list(built: tuple[Collected, SiteData]) -> None:
    collected, data = built
    for layer in range(3):
        stored, listed = collected.layer(layer), data.arrays(f"list/{layer:02}")
        assert list(listed) == data.site["columns"]
        np.testing.assert_array_equal(listed["density"], collected.density(layer).astype(np.float32))
        np.testing.assert_array_equal(listed["maximum"], stored["maximum"])
        np.testing.assert_allclose(listed["norm"], np.linalg.norm(stored["norms"].astype(float), axis=1), rtol=1e-6)
        tokens = [int(collected.ids[row]) if row >= 0 else -1 for row in stored["top_row"][:, 0]]
        ids = data.arrays("vocabulary")["id"]
        assert [int(ids[word]) if word >= 0 else -1 for word in listed["word"]] == tokens


def by_hand(spelled: bytes) -> str:
    """The key of a token without spaces around it, by the schema."""
    return spelled.decode("utf-8", "backslashreplace").strip().lower()[:64]


def test_every_token_finds_the_features_that_have_it(built: tuple[Collected, SiteData]) -> None:
    """Against a count over all examples, by dictionaries."""
    collected, data = built
    expected: dict[str, Counter[int]] = {}
    promoted: dict[str, dict[int, int]] = {}
    for layer in range(3):
        arrays = collected.layer(layer)
        for feature in range(70):
            number = layer * 70 + feature
            for row in arrays["top_row"][feature]:
                if row >= 0:
                    (spelled,) = collected.spell([int(collected.ids[row])])
                    expected.setdefault(by_hand(spelled), Counter())[number] += 1
            for place, token in enumerate(arrays["logits_up_id"][feature, -1].tolist()):
                (spelled,) = collected.spell([token])
                promoted.setdefault(by_hand(spelled), {}).setdefault(number, place)
    assert len(data.site["search"]["first"]) > 3
    words = [key for key in expected.keys() | promoted.keys() if key]
    assert len(words) > 500
    for key in words:
        found = data.find(key)
        assert dict(found["active"]) == expected.get(key, {})
        assert [share for _, share in found["active"]] == sorted(expected.get(key, {}).values(), reverse=True)
        assert dict(found["promotes"]) == promoted.get(key, {})
    assert data.find("no such word") == {}


def test_a_long_list_keeps_the_best_and_says_how_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LIMIT", 5)
    monkeypatch.setattr(search, "TOGETHER", 40)
    make_store(tmp_path / "store", vocabulary=22, hostile=True, features=60, tokens=4000)
    collected = Collected.open(tmp_path / "store")
    data = write(collected, tmp_path / "site")
    counts: Counter[int] = Counter()
    active = {}
    for layer in range(2):
        arrays = collected.layer(layer)
        for feature in range(60):
            active[layer * 60 + feature] = int(arrays["active"][feature])
            rows = [row for row in arrays["top_row"][feature] if row >= 0]
            same = sum(collected.spell([int(collected.ids[row])]) == [b"</script>"] for row in rows)
            if same:
                counts[layer * 60 + feature] = same
    best = sorted(counts, key=lambda one: (-counts[one], active[one], one))
    found = data.find("</script>")["active"]
    assert len(best) > 5 and found == [(one, counts[one]) for one in best[:5]]
    keys = data.value("search/0000")["keys"]
    assert data.arrays("search/0000", "packed")["active_count"][keys.index("</script>")] == len(best)


@pytest.mark.parametrize(
    ("spelled", "key"),
    [
        (b" The", "the"),
        ("\u0130x".encode(), "i\u0307x"),
        (b"\n\n", "\\n\\n"),
        (b" \t", "\\s\\t"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u00e9".encode()[:1], "\\xc3"),
        (b"x" * 100_000, "x" * 64),
        ("\U0001f9d1".encode() * 50, "\U0001f9d1" * 32),
        (("a" + "\U0001f9d1" * 50).encode(), "a" + "\U0001f9d1" * 31),
        (b"", ""),
        (b"</SCRIPT>", "</script>"),
    ],
)
def test_keys(spelled: bytes, key: str) -> None:
    from clt_reports.site.data.words import key as key_of

    assert key_of(spelled) == key


def test_keys_are_in_the_order_of_javascript() -> None:
    """An emoji is two units from U+D800 on, so it stands before U+FF41, though its code point is higher."""
    from clt_reports.site.data.words import Words

    pieces = [one.encode() for one in ("\uff41", "\U0001f9d1", "z")]
    start = np.cumsum([0, *map(len, pieces)])
    keys, of_word = Words(np.arange(3), start, np.frombuffer(b"".join(pieces), np.uint8)).keys()
    assert keys == ["z", "\U0001f9d1", "\uff41"] and of_word.tolist() == [2, 1, 0]


def test_hostile_tokens_are_whole(built: tuple[Collected, SiteData]) -> None:
    _, data = built
    rows = data.text()
    assert data.bytes_of(rows["word"][: len(HOSTILE)]) == HOSTILE


def test_the_run(built: tuple[Collected, SiteData]) -> None:
    collected, data = built
    site = data.site
    assert site["title"] == "</script><b>run\u2028" and site["id"] == "ab" * 8
    assert site["run"]["recipe"] == 'name = "<!--"\n' and site["run"]["model"] == {"path": "</script>"}
    assert site["run"]["curves"] == {"eval/nmse": {"step": [1, 2], "value": [0.5, None]}}
    assert site["run"]["curves_by_layer"] == {"eval/l0_by_layer": {"step": [1], "value": [[None, 2.0]]}}
    assert site["run"]["evaluation"] == {"nmse": None, "by_layer": {"nmse": [None]}}
    for layer, one in enumerate(site["layers"]):
        arrays = collected.layer(layer)
        density = arrays["active"] / 3000
        assert one["dead"] == (density == 0).sum() and one["dense"] == (density > 0.1).sum()
        assert one["l0"] == pytest.approx(density.sum())
        assert sum(one["density"]) == 70 - one["dead"]
        low, high = site["density_edges"][12:14]
        assert one["density"][12] == ((density >= 10**low) & (density < 10**high)).sum()
        assert sum(one["threshold"]["counts"]) == 70


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    make_store(tmp_path / "store")
    collected = Collected.open(tmp_path / "store")
    digests = []
    for name in ("one", "two"):
        write(collected, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(str(f.relative_to(tmp_path / name)), hashlib.sha256(f.read_bytes()).digest()) for f in files])
    assert digests[0] == digests[1] and len(digests[0]) > 10


def test_without_geometry_thresholds_or_run(tmp_path: Path) -> None:
    make_store(tmp_path / "store", geometry=False, thresholds=False)
    data = write(Collected.open(tmp_path / "store"), tmp_path / "site", Facts())
    assert data.site["columns"] == ["density", "maximum", "mean", "word"]
    assert data.site["run"] == {} and data.site["title"] == "transcoder" and len(data.site["id"]) == 16
    assert all(layer["threshold"] is None for layer in data.site["layers"])
    assert {"norms", "threshold", "similar"}.isdisjoint(data.feature(1, 3))
    assert set(data.find("word30")) <= {"active"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_a_browser_engine_reads_the_same(built: tuple[Collected, SiteData]) -> None:
    """Every file is run as the classic script that it is, and puts its own key; node sorts keys as JavaScript does."""
    _, data = built
    keys = sorted(str(path.relative_to(data.folder).with_suffix("")) for path in data.folder.rglob("*.js"))
    program = """
        const vm = require('vm'), fs = require('fs'), seen = {};
        const context = vm.createContext({CLT: {put: (key, value) => { seen[key] = value; }}});
        for (const key of JSON.parse(process.argv[2])) vm.runInContext(
            fs.readFileSync(process.argv[1] + '/' + key + '.js', 'utf8'), context);
        const keys = Object.keys(seen).filter(k => k.startsWith('search/')).sort().flatMap(k => [...seen[k].keys]);
        const sorted = keys.every((k, n) => n == 0 || keys[n - 1] < k);
        console.log(JSON.stringify({keys: Object.keys(seen).sort(), sorted, site: seen['site']}));
    """
    done = subprocess.run(
        ["node", "-e", program, str(data.folder), json.dumps(keys)], check=True, capture_output=True, text=True
    )
    seen = json.loads(done.stdout)
    assert seen["keys"] == keys and seen["sorted"] and seen["site"] == data.site


def test_ids_beyond_any_tokenizer_are_refused() -> None:
    from clt_reports.site.data.words import Words

    with pytest.raises(Refused, match="larger than those of any tokenizer"):
        Words(np.array([3, 2**30]), np.array([0, 1, 2]), np.zeros(2, np.uint8))


def test_the_labels_of_a_transcoder_are_kept_by_its_digest(built: tuple[Collected, SiteData], tmp_path: Path) -> None:
    """Two sites of one transcoder share their labels; without a digest the data name it."""
    collected, _ = built
    bare = attrs.evolve(FACTS, transcoder=None)
    by_data = write(collected, tmp_path / "a", bare).site["id"]
    assert write(collected, tmp_path / "b", bare).site["id"] == by_data
    make_store(tmp_path / "store", features=7)
    assert write(Collected.open(tmp_path / "store"), tmp_path / "c", bare).site["id"] != by_data
    named = write(collected, tmp_path / "d", FACTS).site["id"]
    assert named != by_data and named == write(Collected.open(tmp_path / "store"), tmp_path / "e", FACTS).site["id"]
