"""The page of a transcoder of the shipped model, against the model itself: tokens read off the page go through plain
transformers, and what 100 features do there is computed from the transcoder's matrices."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from clt_plugins import CrossLayerTranscoder, run
from tests.support.site_data import SiteData

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "examples/models/stdlib-gpt2"
K, TOP, TOKENS = 96, 20, 8192


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteData, CrossLayerTranscoder]:
    recipe = tomllib.loads((ROOT / "examples/quickstart.toml").read_text())
    recipe["model"]["path"] = str(MODEL)
    recipe["source"] |= {"pack": False, "skip_first": 0}  # so that the page has all that the model reads at once
    recipe["activation"] = {"name": "topk", "k": K}
    recipe["train"] |= {"steps": 30, "checkpoint_every": 30, "eval_every": 30}
    recipe["stages"] = [{"name": "collect", "tokens": TOKENS, "top": TOP}, {"name": "report"}]
    folder = tmp_path_factory.mktemp("run") / "run"
    run(recipe, out=folder)
    (site,) = [path.parent for path in folder.rglob("index.html")]
    return SiteData(site), CrossLayerTranscoder.load(folder / "transcoder")


@torch.no_grad()
def brute_force(site: SiteData, transcoder: CrossLayerTranscoder) -> np.ndarray:
    """The value of every feature at every row of the page's text, [T, L, F]."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for block in model.transformer.h:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    text, ids = site.text(), site.arrays("vocabulary")["id"]
    rows = []
    for context in dict.fromkeys(text["context"].tolist()):
        chosen = text["context"] == context
        assert text["position"][chosen].tolist() == list(range(chosen.sum()))
        seen.clear()
        model(torch.tensor([ids[text["word"][chosen]].tolist()]))
        rows.append(torch.stack(seen, 1))
    x = transcoder.normaliser.inputs(torch.cat(rows))
    pre = torch.einsum("tld,lfd->tlf", x, transcoder.W_enc) + transcoder.b_enc
    best = pre.flatten(1).topk(K)
    values = torch.zeros_like(pre).flatten(1).scatter_(1, best.indices, best.values.relu())
    return values.view(pre.shape).numpy()


@pytest.mark.slow
def test_a_hundred_features_do_on_the_page_what_they_do_in_the_model(made) -> None:
    site, transcoder = made
    values = brute_force(site, transcoder)
    text = site.text()
    assert len(values) == len(text["word"]) > TOKENS / 2
    # float32 sums in another order; and a K-th best that changes places with the next one.
    close = {"rtol": 1e-4, "atol": 1e-4}
    shown = 0
    draw = random.Random(0)
    for _ in range(100):
        layer, feature = draw.randrange(values.shape[1]), draw.randrange(values.shape[2])
        of_page, truth = site.feature(layer, feature), values[:, layer, feature]
        assert abs(int(of_page["active"]) - int((truth > 0).sum())) <= 1
        if not truth.any():
            continue
        top = of_page["top_row"][of_page["top_row"] >= 0]
        np.testing.assert_allclose(of_page["top_value"][: len(top)], truth[top], **close)
        # Each of them is among the highest: only a repeated context may be left out of the list.
        distinct = {text["word"][max(0, row - 5) : row + 6].tobytes() for row in np.flatnonzero(truth > 0)}
        assert len(top) >= min(TOP, len(distinct)) - 1
        np.testing.assert_allclose(of_page["top_value"][0], truth.max(), **close)
        rows = np.concatenate([of_page["top_row"], of_page["group_row"].ravel()])
        counts, start = of_page["window_count"], 0
        for row, count in zip(rows.tolist(), counts.ravel().tolist(), strict=True):
            offsets, kept = (of_page[f"window_{name}"][start : start + count] for name in ("offset", "value"))
            start += count
            if row >= 0:
                np.testing.assert_allclose(kept, truth[row + offsets.astype(int)], **close)
                shown += 1
    assert shown > 500
