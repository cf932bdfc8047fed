"""Transcoders of EleutherAI's sparsify and of clt-training, its fork for cross-layer ones.

A folder for each layer, named by its module ("h.0.mlp"), with `cfg.json` and `sae.safetensors`:

| tensor | shape |
| --- | --- |
| `encoder.weight`, `encoder.bias` | [F, D], [F] |
| `W_dec`, `b_dec`, and `W_skip` with a skip path, applied as W_skip x | [F, D], [D], [D, D] |
| `post_enc`, `post_enc_scale`: added to active features, and multiplied with them | [F] |
| the same as `W_decs.i`, `b_decs.i`, `W_skips.i`, `post_encs.i`, `post_enc_scales.i` for the layer `i` later | |
| `in_norm`, `out_norm`, with `normalize_io`: mean norms | [1] |

Decoders: a matrix for each pair of layers; one for each source layer (`per_source_tied`); or one for each target layer
(`coalesce_topk = "concat"`). With `cross_layer = n`, features write to n layers. (sparsify at cf9821f,
`sparse_coder.py`, `runner.py`.)

`groupmax` keeps the highest of each of k groups of neighbouring features. Where it was trained on several tensor ranks,
features used the decoder rows of others (`fused_encoder.py` adds rank · k / ranks to their numbers instead of
rank · F / ranks), and what is read here computes something else. The files do not say on how many it was.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_exporters.hooks import HOOKS
from clt_exporters.reading.files import Weights, described, text, whole
from clt_exporters.reading.layers import Layers
from clt_exporters.reading.on_disk import Rows, no_rows
from clt_plugins import Imported, Refused

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


class CLTTraining:
    """Reads the folders."""

    def recognises(self, folder: Path) -> bool:
        """Whether folders in it have a configuration and weights under sparsify's names."""
        return folder.is_dir() and bool(_folders(folder))

    def read(self, folder: Path) -> Imported:
        """Read the folders.

        Raises:
            Refused: a file or tensor is missing, damaged or of another shape; or it is an autoencoder, or mixes layers
                in another way than above.
        """
        coders = [_Coder(path, index) for index, path in enumerate(_folders(folder))]
        for coder in coders[1:]:
            coder.check_like(coders[0])
        first, L = coders[0], len(coders)
        for index, coder in enumerate(coders):
            if coder.targets > L - index:
                raise Refused(
                    coder.path, f"n_targets is {coder.targets}, and there are folders of {L - index} layers from it on"
                )
        crossing = any(coder.targets > 1 for coder in coders)
        plain = all(coder.rows(L)[1] for coder in coders)
        tied = {"concat": "per_target", "per_source": "per_source"}.get(first.form) if crossing and plain else None
        if tied is not None and any(coder.targets < L - index for index, coder in enumerate(coders)):
            tied = None  # rows of 0 for the layers that they do not reach

        def rows(source: int) -> Rows:
            if tied is not None:
                return Rows([coders[source].weights.get("W_dec", [first.F, first.D])[:, None]])
            if first.form == "concat" and crossing:
                pieces = [coder.weights.get("W_dec", [first.F, first.D])[:, None] for coder in coders[source:]]
                reached = coders[source].targets
                return coders[source].tuned(pieces[:reached], L)
            return coders[source].rows(L if crossing else source + 1)[0]

        all_rows = [rows(source) for source in range(L)]
        scale = [coder.scales() for coder in coders]
        layers = Layers(
            folder=folder,
            n_layers=L,
            d_model=first.D,
            n_features=first.F,
            W_enc=lambda i: coders[i].weights.get("encoder.weight", [first.F, first.D]),
            b_enc=lambda i: coders[i].weights.get("encoder.bias", [first.F]),
            b_dec=lambda t: _bias(coders, t, crossing),
            W_skip=(lambda i: coders[i].skip().T) if first.said.get("skip_connection") else None,
            rows=lambda i: all_rows[i],
            own_layer=not crossing,
            tied=tied,
            input_scale=torch.stack([one for one, _ in scale]),
            target_scale=torch.stack([other for _, other in scale]),
            only_on_disk=any(one.offsets is not None for one in all_rows),
        )
        kind = f"{'clt-training' if crossing else 'sparsify'} folders, {first.said.get('activation', 'topk')}"
        size = sum(coder.weights.path.stat().st_size for coder in coders)
        model, hooks = _described(folder, coders)
        return layers.imported(kind, first.activation(L), model, size, hooks=hooks)


def _folders(folder: Path) -> list[Path]:
    """The folders of the layers, by the first number in their names."""
    inner = [path for path in folder.iterdir() if (path / CONFIG).is_file() and (path / WEIGHTS).is_file()]
    return sorted(
        inner, key=lambda path: [int(part) if part.isdecimal() else 0 for part in re.split(r"(\d+)", path.name)]
    )


def _described(folder: Path, coders: Sequence[_Coder]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The language model, as in `[model]`, and the hooks, from the modules that the folders are named by."""
    _, said = described(folder, "config.json")
    name = text(said.get("model"))
    model: dict[str, Any] = {} if name is None else {"path": name}
    numbers = [re.findall(r"\d+", coder.path.name) for coder in coders]
    if all(len(found) == 1 for found in numbers):
        layers = [int(found[0]) for found in numbers]
        if layers != list(range(len(layers))) and len(set(layers)) == len(layers):
            model["layers"] = layers
    module = coders[0].path.name
    others = said.get("hookpoints_in")  # modules whose inputs are read instead
    reads = others[0] if isinstance(others, list) and others and isinstance(others[0], str) else module
    hooks = [HOOKS.get(path.rpartition(".")[2], (None, None)) for path in (reads, module)]
    return model, {"input": hooks[0][0], "output": hooks[1][1]}


def _bias(coders: Sequence[_Coder], target: int, crossing: bool) -> Tensor:
    """The sum of the biases that a target gets."""
    if not crossing or coders[0].form == "concat":
        return coders[target].bias(0)
    sources = [s for s in range(target + 1) if target - s < coders[s].targets]
    return torch.stack([coders[s].bias(target - s).double() for s in sources]).sum(0)


class _Coder:
    """The folder of one layer.

    Args:
        index: its number.

    Raises:
        Refused: it cannot be loaded; says why.
    """

    def __init__(self, path: Path, index: int):
        self.path, self.index = path, index
        config, self.said = described(path, CONFIG)
        self.config = config
        self.weights = Weights(path / WEIGHTS)
        self.F, self.D = self.weights.sizes("encoder.weight", "features, d_model")
        if not self.said.get("transcode"):
            raise Refused(config, "an autoencoder (transcode is false), not a transcoder")
        for setting in ("divide_cross_layer", "secondary_target_tied", "topk_coalesced"):
            if self.said.get(setting):
                raise Refused(config, f"{setting} is true: such a decoder cannot be loaded")
        coalesced = self.said.get("coalesce_topk", "none")
        if coalesced not in ("none", "concat"):
            raise Refused(config, f"coalesce_topk is {coalesced!r}: such a decoder cannot be loaded")
        self.form = "concat" if coalesced == "concat" else "per_source" if self.said.get("per_source_tied") else "pairs"
        stated = self.said.get("n_targets", 0)
        if type(stated) is not int or stated < 0:
            raise Refused(config, f"n_targets must be a whole number, got {stated!r}")
        self.crossing, self.targets = stated > 0, max(1, stated)
        if self.targets > len(self.weights.shapes):
            raise Refused(config, f"n_targets is {stated}, and the weights are {len(self.weights.shapes)} tensors")

    def check_like(self, first: _Coder) -> None:
        """Refuse a layer of another form than the first one's."""
        mine, others = (
            (x.F, x.D, x.form, x.activation(1), x.said.get("skip_connection", False)) for x in (self, first)
        )
        if mine != others:
            raise Refused(self.config, f"its sizes and settings are {mine}, those of {first.path.name} {others}")

    def activation(self, n_layers: int) -> dict[str, Any]:
        """The table `[activation]` of that many layers like this one."""
        name = self.said.get("activation", "topk")
        if name not in ("topk", "batchtopk", "groupmax"):
            raise Refused(self.config, f"activation is {name!r}: only topk, batchtopk and groupmax can be loaded")
        k = whole(self.said.get("k"), self.config, "k")
        if name != "groupmax":
            return {"name": name, "k": k, "scope": "layer", "ranking": "raw"}
        if self.F % k:
            raise Refused(
                self.config, f"groupmax needs groups of the same size: k = {k} does not divide {self.F} features"
            )
        return {"name": name, "k": k * n_layers}

    def of_target(self, name: str, later: int, shape: list[int]) -> Tensor | None:
        """A tensor for the layer `later` layers after this one; None if there is none.

        Where tensors shared memory, files have only one of `W_dec` and `W_decs.0`.
        """
        for candidate in [f"{name}s.{later}", *([name] if later == 0 else [])]:
            if candidate in self.weights:
                return self.weights.get(candidate, shape)
        return None

    def _needed(self, name: str, later: int, shape: list[int]) -> Tensor:
        value = self.of_target(name, later, shape)
        if value is None:
            raise Refused(self.weights.path, f"lacks tensor '{name}s.{later}'")
        return value

    def rows(self, n_layers: int) -> tuple[Rows, bool]:
        """What the features write to this layer and all later ones; and whether that is matrices alone."""
        shape = [self.F, self.D]
        if self.form == "pairs":
            pieces = [self._needed("W_dec", i, shape)[:, None] for i in range(self.targets)]
        else:
            own = self.weights.get("W_dec", shape)
            pieces = [own[:, None].expand(-1, self.targets, -1)]
        rows = self.tuned(pieces, n_layers)
        return rows, rows.factors is None and rows.offsets is None

    def tuned(self, pieces: Sequence[Tensor], n_layers: int) -> Rows:
        """Rows with their factors and offsets, and rows of 0 for layers that they do not reach."""
        beyond = n_layers - self.index - self.targets
        parts = [*pieces, *([no_rows(self.F, beyond, self.D)] if beyond > 0 else [])]
        stacked: dict[str, Tensor | None] = {}
        for name, neutral in (("post_enc", 0), ("post_enc_scale", 1)):
            values = [self.of_target(name, i, [self.F]) for i in range(self.targets)]
            found = [torch.full((self.F,), float(neutral)) if one is None else one.float() for one in values]
            found += [torch.full((self.F,), float(neutral))] * max(beyond, 0)
            value = torch.stack(found, 1)
            stacked[name] = None if bool((value == neutral).all()) else value
        return Rows(parts, factors=stacked["post_enc_scale"], offsets=stacked["post_enc"])

    def bias(self, later: int) -> Tensor:
        """What is added to the layer `later` layers after this one, [D]."""
        return self._needed("b_dec", later, [self.D])

    def skip(self) -> Tensor:
        """The skip path to its own layer, [D, D].

        Raises:
            Refused: there is one to a later layer.
        """
        for later in range(1, self.targets):
            other = self.of_target("W_skip", later, [self.D, self.D])
            if other is not None and bool(other.any()):
                raise Refused(
                    self.weights.path,
                    f"has a skip path from layer {self.index} to layer {self.index + later}: only skip paths within a "
                    "layer can be loaded",
                )
        return self._needed("W_skip", 0, [self.D, self.D])

    def scales(self) -> tuple[Tensor, Tensor]:
        """What inputs are divided by, and reconstructions multiplied by."""
        if not self.said.get("normalize_io"):
            return torch.ones(()), torch.ones(())
        norms = [self.weights.get(name, [1])[0].float() / self.D**0.5 for name in ("in_norm", "out_norm")]
        if not all(bool(norm > 0) and bool(norm.isfinite()) for norm in norms):
            raise Refused(self.weights.path, "in_norm and out_norm must be above 0 and finite")
        return norms[0], norms[1]
