"""The report `site`: a static site of all features, which opens from disk."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clt_plugins import Refused
from clt_reports.site.data.features import write_layer
from clt_reports.site.data.graphs import Graph, read_graph
from clt_reports.site.data.pack import packed, put
from clt_reports.site.data.run import layer_summary, site
from clt_reports.site.data.search import LIMIT, Search
from clt_reports.site.data.text import write_text
from clt_reports.site.data.words import Words

if TYPE_CHECKING:
    from clt_plugins import Collected, Context, CrossLayerTranscoder, Facts
    from clt_reports import SiteConfig

ASSETS = Path(__file__).parent / "assets"


class Site:
    """A `Report` that also `Checks`. It reads and writes one layer at a time: memory does not grow with the layers."""

    def __init__(self, config: SiteConfig, context: Context):
        self.config = config

    def check(self, transcoder: CrossLayerTranscoder) -> list[str]:
        """Complaints about graphs that cannot be shown."""
        complaints, taken = [], set[str]()
        for file in self.config.graphs:
            try:
                read_graph(file, transcoder.n_layers, transcoder.n_features, taken)
            except Refused as error:
                complaints.append(f"graphs: {error}")
        return complaints

    def write(self, collected: Collected, facts: Facts, folder: Path) -> None:
        """Write the site into an empty folder.

        Raises:
            Refused: a graph cannot be shown; nothing is written then.
        """
        info, config = collected.info, self.config
        graphs = self._graphs(info.n_layers, info.n_features)
        spelled = collected.vocabulary.arrays()
        words = Words(spelled["token"], spelled["start"], spelled["bytes"])
        copy_assets(folder)
        put(folder, "vocabulary", packed(words.arrays()))
        text = collected.text
        rows = write_text(folder, text.ids, text.context, text.position, words)
        search = Search(words, info.n_features)
        layers, columns = [], []
        for layer in range(info.n_layers):
            arrays = collected.layer(layer)
            columns = write_layer(folder, layer, arrays, text.ids, info.tokens, words, config.shard)
            search.add(layer, arrays, text.ids)
            layers.append(layer_summary(arrays, info.tokens))
        firsts = search.write(folder)
        for graph in graphs:
            graph.write(folder)
        rest = {
            "shard": config.shard,
            "text": {"rows": rows},
            "vocabulary": len(words),
            "columns": columns,
            "search": {"first": firsts, "keys": len(search.keys), "limit": LIMIT},
            "graphs": [graph.summary() for graph in graphs],
            "layers": layers,
        }
        value = site(info, facts, rest)
        # Labels in a browser belong to the transcoder: its name must be the same in each of its sites.
        value["id"] = value["id"] or hashlib.sha256((folder / "data/list/00.js").read_bytes()).hexdigest()[:16]
        put(folder, "site", value)

    def _graphs(self, n_layers: int, n_features: int) -> list[Graph]:
        taken: set[str] = set()
        return [read_graph(file, n_layers, n_features, taken) for file in self.config.graphs]


def copy_assets(folder: Path) -> None:
    """Copy the page, its scripts and styles."""
    page = ASSETS / "index.html"
    shutil.copyfile(page, folder / "index.html")
    for file in sorted(ASSETS.rglob("*")):  # not `copytree`: its error lists every file of a full disk
        if file.is_file() and file != page:
            copy = folder / "assets" / file.relative_to(ASSETS)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
