"""The stream source against transformers' own hooks, document by document."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

from clt_plugins import Batch, Refused
from clt_stream import StreamConfig, clt_check, clt_sources
from clt_stream.text.documents import document
from clt_stream.text.stdlib import is_held_out
from tests.support.language_models import CONFIGS, MLPS, Hooked, make_context, save_model, save_text

CONTEXT = 24


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    save_text(tmp_path / "text.jsonl", 40)
    return tmp_path / "text.jsonl"


def build(model: Path, text: Path | str, run: dict[str, Any] | None = None, **config: Any) -> Any:
    """The source, by the road a recipe takes."""
    (spec,) = clt_sources()
    settings = {"context": CONTEXT, "model_batch": 3, "buffer_tokens": 320, "held_out": 0.3} | config
    return spec.build(StreamConfig(text=str(text), **settings), make_context(model, **(run or {})))


def join(batches: list[Batch]) -> Batch:
    names = "inputs", "targets", "token_ids", "positions"
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in names))


def equal(one: Batch, two: Batch) -> bool:
    names = "inputs", "targets", "token_ids", "positions"
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


def block(source: Any) -> Batch:
    """The whole first block of a source."""
    return join([source.next() for _ in range(320 // 32)])


def segments(batch: Batch) -> list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]]:
    """Shuffled rows put back into runs of neighbouring positions: (tokens, inputs, targets) of each."""
    places = [tuple(place) for place in batch.positions.tolist()]
    order = sorted(range(len(places)), key=places.__getitem__)
    runs: list[list[int]] = []
    for row in order:
        context, position = places[row]
        if runs and places[runs[-1][-1]] == (context, position - 1):
            runs[-1].append(row)
        else:
            runs.append([row])
    return [(tuple(batch.token_ids[run].tolist()), batch.inputs[run], batch.targets[run]) for run in runs]


def pieces(truth: Hooked, texts: list[str], start: tuple[int, ...] = ()) -> list[list[int]]:
    """How documents must be cut: CONTEXT tokens each, and what remains."""
    room = CONTEXT - len(start)
    whole = [truth.tokens(text) for text in texts]
    return [[*start, *tokens[at : at + room]] for tokens in whole for at in range(0, len(tokens), room)]


def trained(texts: list[str], share: float = 0.3, *, held_out: bool = False) -> list[str]:
    return [text for text in texts if is_held_out(document(text, "", "")[0], share) == held_out]


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_and_padded_activations_equal_hooks_on_each_piece_alone(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    texts = save_text(tmp_path / "text.jsonl", 6)
    truth = Hooked(model, MLPS.get(family, "model.layers.{}.mlp"))
    expected = {tuple(piece[1:]): truth(piece) for piece in pieces(truth, texts) if len(piece) > 1}
    for pack in (True, False):
        source = build(model, tmp_path / "text.jsonl", held_out=0.0, pack=pack)
        assert source.packed == pack
        # The block may end within a piece; all pieces of the first epoch are whole.
        found = {tokens: rows for tokens, *rows in segments(block(source)) if tokens in expected}
        assert set(found) == set(expected)
        for tokens, rows in found.items():
            for got, wanted in zip(rows, expected[tokens], strict=True):
                # float32 on both sides, but sums over packed or padded shapes run in another order: what they lose
                # is in proportion to the layer's numbers (of size 1 to 10 here), whatever each of them comes to.
                size = wanted.square().mean((0, 2), keepdim=True).sqrt()
                torch.testing.assert_close(got / size[0], wanted[1:] / size[0], atol=1e-5, rtol=0)


def test_the_middle_layers_of_a_model_are_read_by_path(gpt2: Path, text: Path) -> None:
    chosen = {"layers": [1, 2], "inputs": "transformer.h.{}.ln_2.output", "outputs": "transformer.h.{}.mlp.c_proj"}
    by_path, by_structure = build(gpt2, text, chosen).next(), build(gpt2, text).next()
    assert torch.equal(by_path.inputs, by_structure.inputs[:, 1:])
    assert torch.equal(by_path.targets, by_structure.targets[:, 1:])


def test_sites_are_read_whatever_the_order_the_model_reaches_them_in(gpt2: Path, text: Path) -> None:
    """The targets lie before the inputs here."""
    swapped = {"inputs": "transformer.h.{}.mlp.output", "outputs": "transformer.h.{}.mlp.input"}
    one, two = build(gpt2, text, swapped).next(), build(gpt2, text).next()
    assert torch.equal(one.inputs, two.targets)
    assert torch.equal(one.targets, two.inputs)


def test_a_site_within_another_one_is_read(gpt2: Path, text: Path) -> None:
    """In evaluation nothing follows an MLP's last projection, so both ways read the same numbers."""
    within, whole = build(gpt2, text, {"outputs": "transformer.h.{}.mlp.c_proj"}).next(), build(gpt2, text).next()
    assert equal(within, whole)


@pytest.mark.parametrize("pack", [True, False])
def test_contexts_are_pieces_one_after_the_other(gpt2: Path, text: Path, pack: bool) -> None:
    """Against a loop over each context's pieces, token by token."""
    packer = build(gpt2, text, pack=pack, skip_first=2).packer
    special = packer.tokenizer.all_special_ids
    for number in range(0, 12, 3):
        contexts = packer.next()
        chosen = packer.chunk[number : number + 3]
        assert (packer.first, contexts.first, len(contexts.ids)) == (0, number, 3)
        length = max(sum(map(len, pieces)) for pieces in chosen)
        kept = []
        for row, pieces in enumerate(chosen):
            used = [(token, place) for piece in pieces for place, token in enumerate(piece)]
            padding = [(0, place) for place in range(length - len(used))]
            assert list(zip(contexts.ids[row].tolist(), contexts.position_ids[row].tolist(), strict=True)) == [
                *used,
                *padding,
            ]
            if not pack:
                assert contexts.attention_mask[row].tolist() == [1] * len(used) + [0] * len(padding)
            kept += [row * length + at for at, (token, place) in enumerate(used) if place >= 2 and token not in special]
        assert contexts.rows.tolist() == kept
        assert (contexts.attention_mask is None) == pack


def test_the_output_head_is_not_run(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)

    def refuse(*_: Any) -> None:
        raise AssertionError("the model ran to its end")

    source.model.lm_head.register_forward_hook(refuse)
    source.model.transformer.ln_f.register_forward_hook(refuse)
    assert source.next().tokens == 32


def test_special_and_first_positions_are_left_out(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", adds_bos=True)
    texts = ["a model <eos> reads text", *save_text(tmp_path / "text.jsonl", 6)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    truth = Hooked(model, "model.layers.{}.mlp")
    rows = block(build(model, tmp_path / "text.jsonl", held_out=0.0, skip_first=3))
    assert not torch.isin(rows.token_ids, torch.tensor([0, 1, 2])).any()
    # Every piece begins with <bos>, at position 0; positions 1 and 2 are the other ones left out.
    kept = [tuple(piece[3:]) for piece in pieces(truth, texts[1:], start=(0,)) if len(piece) > 3]
    assert set(kept) <= {tokens for tokens, *_ in segments(rows)}
    before, after = truth.tokens("a model "), truth.tokens(" reads text")
    assert {tuple(before[2:]), tuple(after)} <= {tokens for tokens, *_ in segments(rows)}
    for tokens, inputs, _ in segments(rows):
        if tokens == kept[0]:
            piece = next(piece for piece in pieces(truth, texts[1:], start=(0,)) if tuple(piece[3:]) == tokens)
            torch.testing.assert_close(inputs, truth(piece)[0][3:], atol=1e-5, rtol=1e-5)


def test_an_epoch_holds_every_row_once(gpt2: Path, text: Path, tmp_path: Path) -> None:
    texts = save_text(tmp_path / "text.jsonl", 40)
    truth = Hooked(gpt2, MLPS["gpt2"])
    wanted = sorted(tuple(piece[1:]) for piece in pieces(truth, trained(texts)) if len(piece) > 1)
    source = build(gpt2, text, buffer_tokens=4096)
    rows = join([source.next() for _ in range(4096 // 32)])
    epoch = sum(map(len, wanted))
    contexts = sorted(segments_by_context(rows).items())
    found: list[tuple[int, ...]] = []
    for _, held in contexts:
        if sum(map(len, found)) < epoch:
            found += held
    assert sorted(found) == wanted


def segments_by_context(rows: Batch) -> dict[int, list[tuple[int, ...]]]:
    """The token runs of each context, by its number."""
    grouped: dict[int, list[tuple[int, ...]]] = {}
    for context in sorted(set(rows.positions[:, 0].tolist())):
        chosen = rows.rows(rows.positions[:, 0] == context)
        grouped[context] = [tokens for tokens, *_ in segments(chosen)]
    return grouped


def test_held_out_documents_never_occur_in_training_batches(gpt2: Path, tmp_path: Path) -> None:
    texts = save_text(tmp_path / "text.jsonl", 40)
    truth = Hooked(gpt2, MLPS["gpt2"])
    source = build(gpt2, tmp_path / "text.jsonl")
    held = join(list(source.held_out(100_000)))
    seen = join([source.next() for _ in range(100)])
    kept_apart = {tuple(piece[1:]) for piece in pieces(truth, trained(texts, held_out=True)) if len(piece) > 1}
    assert {tokens for tokens, *_ in segments(held)} == kept_apart
    # Runs of a few tokens occur in many of these documents of 19 words.
    long = {tokens for tokens in kept_apart if len(tokens) > 8}
    assert len(long) > 5
    assert not long & {tokens for tokens, *_ in segments(seen)}


def test_held_out_batches_are_the_same_at_each_call_and_as_many_as_asked(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    first = list(source.held_out(100))
    source.next()
    assert [batch.tokens for batch in first] == [32, 32, 32, 4]
    assert equal(join(first), join(list(source.held_out(100))))
    assert equal(join(first), join(list(build(gpt2, text).held_out(100))))
    assert equal(join(first).rows(slice(0, 40)), join(list(source.held_out(40))))
    (spec,) = clt_sources()
    other = make_context(gpt2, seed=4)
    config = StreamConfig(text=str(text), context=CONTEXT, model_batch=3, buffer_tokens=320, held_out=0.3)
    assert equal(join(first), join(list(spec.build(config, other).held_out(100))))


@pytest.mark.parametrize("config", [{}, {"pack": False}, {"streaming": True}, {"buffer_tokens": 32, "model_batch": 8}])
def test_a_stream_resumes_bit_for_bit(gpt2: Path, text: Path, config: dict[str, Any]) -> None:
    unbroken = build(gpt2, text, **config)
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(unbroken.state()))
        batches.append(unbroken.next())
    assert max(map(len, states)) < 1000
    # 40 documents are 3 blocks, so these places lie in three epochs.
    assert json.loads(states[45])["cursor"]["mark"]["epoch"] > 0
    resumed = build(gpt2, text, **config)
    for stop in (45, 0, 3, 10, 17):
        resumed.load_state(json.loads(states[stop]))
        assert json.dumps(resumed.state()) == states[stop]
        for wanted in batches[stop : stop + 15]:
            assert equal(resumed.next(), wanted)


@pytest.mark.parametrize("model_batch", [2, 5])
def test_two_data_ranks_are_disjoint_and_together_complete(gpt2: Path, text: Path, model_batch: int) -> None:
    alone = build(gpt2, text, {"batch_tokens": 64}, buffer_tokens=640, model_batch=model_batch)
    ranks = [
        build(gpt2, text, {"batch_tokens": 64, "rank": rank, "ranks": 2}, model_batch=model_batch) for rank in (0, 1)
    ]
    for _ in range(3):
        whole = join([alone.next() for _ in range(10)])
        shares = [join([rank.next() for _ in range(10)]) for rank in ranks]
        assert [share.tokens for share in shares] == [320, 320]
        assert ranks[0].state() == ranks[1].state()
        sides = [{tuple(place) for place in share.positions.tolist()} for share in shares]
        assert not sides[0] & sides[1]
        both = join(shares)
        order, wanted = order_of(both), order_of(whole)
        assert equal(both.rows(order), whole.rows(wanted))


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_data_ranks_it_goes_on_with_the_next_block(
    gpt2: Path, text: Path, before: int, after: int
) -> None:
    """No row is read twice; what was left of the block is left out."""

    def sources(count: int) -> list[Any]:
        runs = [{"batch_tokens": 64, "rank": rank, "ranks": count} for rank in range(count)]
        return [build(gpt2, text, run) for run in runs]

    started, others = sources(before), sources(after)
    for source in started:
        for _ in range(3):
            source.next()
    for source in others:
        source.load_state(json.loads(json.dumps(started[0].state())))
    for source in started:  # to the end of its first block
        for _ in range(320 * before // 64 - 3):
            source.next()
    first, second = (
        join([source.next() for source in each for _ in range(320 * len(each) // 64)]) for each in (started, others)
    )
    # Both begin at the same row; a block of two ranks is twice as long.
    assert equal(first.rows(order_of(first)[:320]), second.rows(order_of(second)[:320]))


def order_of(batch: Batch) -> torch.Tensor:
    return torch.argsort(batch.positions[:, 0] * 1000 + batch.positions[:, 1])


def test_a_batch_mixes_documents(gpt2: Path, text: Path) -> None:
    source = build(gpt2, text)
    assert source.next().positions[:, 0].unique().numel() > 8


def test_epochs_come_in_different_orders(gpt2: Path, text: Path) -> None:
    """A block of exactly one epoch, twice."""
    source = build(gpt2, text)
    rows = source.packer.rows_in_epoch(10**9)
    source = build(gpt2, text, {"batch_tokens": rows}, buffer_tokens=rows)
    one, two = source.next(), source.next()
    assert sorted(one.token_ids.tolist()) == sorted(two.token_ids.tolist())
    assert not torch.equal(one.token_ids, two.token_ids)


def test_another_seed_gives_another_order(gpt2: Path, text: Path) -> None:
    one = build(gpt2, text)
    (spec,) = clt_sources()
    other = make_context(gpt2, seed=4)
    config = StreamConfig(text=str(text), context=CONTEXT, model_batch=3, buffer_tokens=320, held_out=0.3)
    assert not torch.equal(one.next().token_ids, spec.build(config, other).next().token_ids)


def test_activations_come_in_the_models_type(gpt2: Path, text: Path) -> None:
    half = build(gpt2, text, {"dtype": "bfloat16"}).next()
    full = build(gpt2, text).next()
    assert half.inputs.dtype == torch.bfloat16
    assert torch.equal(half.token_ids, full.token_ids)
    error = (half.targets.float() - full.targets).norm() / full.targets.norm()
    # bfloat16 keeps 8 bits: a few roundings of 1/256 each.
    assert 1e-4 < error < 0.03


def test_a_model_that_cannot_pack_gets_a_context_per_piece(
    gpt2: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that ignores the restart of positions lets packed documents see each other."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with caplog.at_level(logging.WARNING):
        source = build(gpt2, text)
    assert not source.packed
    assert "cannot keep packed documents apart" in caplog.text
    assert equal(source.next(), build(gpt2, text, pack=False).next())


class TestBadInput:
    def test_a_missing_model_folder(self, text: Path, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"^model\.path: no folder '.*nowhere'$"):
            build(tmp_path / "nowhere", text)

    def test_a_folder_without_a_model(self, text: Path, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=r"^model\.path: '.*' holds no model: there is no config\.json in it$"):
            build(tmp_path, text)

    def test_a_missing_gguf_file(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(Refused, match=r"^model\.gguf_file: no file 'x\.gguf' in "):
            build(gpt2, text, {"gguf_file": "x.gguf"})

    def test_a_truncated_model_file(self, text: Path, tmp_path: Path) -> None:
        model = save_model(tmp_path / "model")
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(Refused, match=r"^model\.path: cannot load '.*model': .+$"):
            build(model, text)

    def test_a_hub_model_while_offline(self, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            Refused, match=r"^model\.path: cannot get 'nobody/nothing': .* is the network there"
        ) as raised:
            build("nobody/nothing", text)  # type: ignore[arg-type]
        assert len(str(raised.value).splitlines()) == 1

    def test_a_batch_larger_than_the_data(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(
            Refused, match=r"^train\.batch_tokens: a batch of 9999 tokens is larger than the data: .* has \d+$"
        ):
            build(gpt2, text, {"batch_tokens": 9999}, buffer_tokens=9999)

    def test_a_buffer_smaller_than_a_batch(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(Refused, match=r"^source\.buffer_tokens: 16 is less than a batch of 32 tokens$"):
            build(gpt2, text, buffer_tokens=16)

    def test_a_batch_that_ranks_cannot_share(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(Refused, match=r"^train\.batch_tokens: 32 cannot be divided among 3 data ranks$"):
            build(gpt2, text, {"ranks": 3})

    def test_a_context_longer_than_the_model(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(Refused, match=r"^source\.context: 65 is longer than the model's 64 positions$"):
            build(gpt2, text, context=65)

    def test_a_text_of_empty_documents(self, gpt2: Path, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
        with pytest.raises(Refused, match=r"^source\.text: '.*empty\.jsonl' holds no text to train on$"):
            build(gpt2, tmp_path / "empty.jsonl", held_out=0.0)

    def test_nothing_held_out(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(
            Refused, match=r"^source\.held_out: no held-out text in '.*' at a share of 0: raise the share"
        ):
            list(build(gpt2, text, held_out=0.0).held_out(10))

    def test_one_document_of_which_none_can_be_held_out(self, gpt2: Path, tmp_path: Path) -> None:
        (tmp_path / "one.txt").write_text("a feature of a layer writes to each later one " * 100)
        share = 0.9 if trained([(tmp_path / "one.txt").read_text()], 0.9) else 1e-9
        with pytest.raises(Refused, match=r"^source\.held_out: no held-out text in '.*one\.txt' at a share of "):
            build(gpt2, tmp_path / "one.txt", held_out=share)

    def test_a_device_that_is_not_there(self, gpt2: Path, text: Path) -> None:
        with pytest.raises(Refused, match=r"^source\.buffer_device: 'gpu' cannot be used here: "):
            build(gpt2, text, buffer_device="gpu")
        with pytest.raises(Refused, match=r"^model\.device: 'gpu' cannot be used here: "):
            build(gpt2, text, {"device": "gpu"})

    def test_a_recipe_without_a_model_or_with_nothing_left_of_a_context(self) -> None:
        config = StreamConfig(context=8, skip_first=8)
        recipe = SimpleNamespace(source=SimpleNamespace(config=config), model=None)
        assert [fault.partition(":")[0] for fault in clt_check(recipe)] == ["model", "source.skip_first"]

    def test_a_tokenizer_of_another_model(self, gpt2: Path, text: Path, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        small = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=64, n_embd=8, n_layer=1, n_head=1))
        small.save_pretrained(tmp_path / "small")
        with pytest.raises(
            Refused, match=r"^model\.tokenizer: gives token \d+, but the model has 100: name the right one$"
        ):
            build(tmp_path / "small", text, {"tokenizer": str(gpt2)})

    def test_bos_always_without_a_bos_token(self, text: Path, tmp_path: Path) -> None:
        model = save_model(tmp_path / "model")
        settings = json.loads((model / "tokenizer_config.json").read_text())
        del settings["bos_token"]
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(Refused, match=r"^source\.bos: the tokenizer has no beginning-of-sequence token"):
            build(model, text, bos="always")


@pytest.mark.slow
@pytest.mark.skipif("CLT_TEST_GGUF" not in os.environ, reason="CLT_TEST_GGUF names no GGUF file of a language model")
def test_a_gguf_file_is_read() -> None:
    source = build(Path(os.environ["CLT_TEST_GGUF"]), "python-stdlib", held_out=0.05, context=64)
    batch = source.next()
    assert batch.inputs.shape == (32, source.n_layers, source.d_model)
    assert torch.isfinite(batch.targets).all()
    assert batch.inputs.std() > 0.01
