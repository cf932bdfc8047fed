"""The stage `recovery`, and what it measures of features; `hops` has the measure of chains.

    correlation   Pearson's correlation over held-out tokens of a true feature's value and a transcoder's feature's
    MCC           the mean over computed true features of |correlation| under the one-to-one matching that maximises it:
                  the mean correlation coefficient of identifiability (Hyvarinen and Morioka 2016, arXiv 1605.06336)
    recovered     the share of true features whose match has |correlation| > 0.9
    closest       as MCC, where several true features may share one: the mean of the highest |correlation|
    decoder MCC   as MCC, of cosines of what features write in the layer that computes the true one, in the place of
                  correlations (as for decoders of sparse autoencoders on synthetic data)
    absorption    (Chanin et al. 2024, arXiv 2409.14507) over pairs of a parent and a child that is active only with it,
                  the share of tokens with the child at which the parent's match is not active, and the child's match
                  writes at least a quarter of the parent's value itself: z u >= h / 4, u the parent's coordinate
    splitting     the share of true features that are split: two or more features write at least a tenth each of what
                  is written of it while it is active, and are active without it at no more than a tenth of their own
                  tokens. One that is more correlated with another true feature does not count: that is absorption

Shapes: L layers, F features per layer of the transcoder, C computed true features.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_planted.activity_sums import ActivitySums
from clt_planted.families import AbsorptionSums, splitting
from clt_planted.hops import HopSums, shares
from clt_planted.matching import match
from clt_planted.source import KnowsTruth
from clt_planted.weights import reads, writes
from clt_plugins import Provenance, Refused, StageInfo, defined, raw_encoder, score, write_json

if TYPE_CHECKING:
    from clt_planted import RecoveryConfig
    from clt_plugins import CrossLayerTranscoder, Job

RECOVERED = 0.9
"""|correlation| above which a true feature is recovered."""


@attrs.frozen(kw_only=True)
class Hop:
    """An edge B -> C of a chain A -> B -> C; see `hops` for the shares."""

    parent: int
    """B's number."""
    child: int
    """C's number."""
    gate: str
    """What computes C."""
    kept: float
    direct: float
    rewritten: float
    other: float
    written: float


@attrs.frozen(kw_only=True)
class Report:
    """How much of a planted model a transcoder has; the content of `recovery.json`. The module says what each is."""

    tokens: int
    """Held-out tokens."""
    nmse: float | None
    l0: float
    true_features: int
    """How many there are to be recovered: those that MLPs compute."""
    mcc: float
    recovered: float
    closest: float
    decoder_mcc: float
    kept: float | None = None
    """Of all chains; None where there are none, or nothing is written of them."""
    direct: float | None = None
    rewritten: float | None = None
    other: float | None = None
    written: float | None = None
    absorption: float | None = None
    """None where no feature is active only with another."""
    splitting: float
    hops: list[Hop] = attrs.field(factory=list)
    made_from: Provenance | None = None
    """The transcoder that is judged, and the settings."""


class Recovery:
    """Writes `recovery.json`, and logs its numbers as `recovery/NAME`."""

    def __init__(self, config: RecoveryConfig):
        self.config = config
        self.info = StageInfo(folder=config.folder, every=config.every, record="recovery.json", keeps_older=True)

    def check(self, job: Job) -> None:
        for layer in range(job.transcoder.n_layers):
            # Refused where encoder or normalisation cannot be folded into weights on raw activations.
            raw_encoder(job.transcoder, layer, job.transcoder.device)
        if job.source is not None:
            _known(job)

    def run(self, job: Job) -> None:
        report = attrs.evolve(measure(job.transcoder, _known(job), self.config.tokens), made_from=job.made_from)
        job.show(as_table(report), report)
        write_json(job.folder / "recovery.json", report)
        job.log({f"recovery/{name}": value for name, value in _numbers(report).items() if value is not None})


def _known(job: Job) -> KnowsTruth:
    """
    Raises:
        Refused: the source does not know what is true.
    """
    if not isinstance(job.source, KnowsTruth):
        text = 'needs a source that knows its true features: use "planted", or leave the stage out'
        raise Refused("stages.recovery", text)
    return job.source


def measure(transcoder: CrossLayerTranscoder, source: KnowsTruth, tokens: int) -> Report:
    """Compare a transcoder with the planted model, on held-out tokens; it is in eval mode.

    Raises:
        Refused: the weights cannot be written for raw activations; or there are too few tokens.
    """
    truth = source.truth()
    coordinates, cosines = writes(transcoder, truth)
    sums = ActivitySums(source, coordinates.shape[1])
    hop_sums = HopSums(source, reads(transcoder, truth), coordinates, transcoder.n_features)
    scores = score(transcoder, source.held_out(tokens), [sums, hop_sums])
    correlation = sums.correlation().abs()
    matches = match(correlation)
    matched = _matched(correlation, matches)
    absorption = None
    if truth.families:
        pairs = AbsorptionSums(source, coordinates, matches)
        score(transcoder, source.held_out(tokens), [pairs])
        absorption = pairs.mean()
    by_chain = hop_sums.by_chain()
    of_chains = shares(by_chain[hop_sums.seen()])
    return Report(
        tokens=scores.tokens,
        nmse=defined(torch.tensor([scores.nmse], dtype=torch.float64))[0],
        l0=scores.l0,
        true_features=len(matched),
        mcc=statistics.fmean(matched),
        recovered=statistics.fmean(value > RECOVERED for value in matched),
        closest=float(correlation.max(1).values.mean()),
        decoder_mcc=statistics.fmean(_matched(cosines.abs(), match(cosines.abs()))),
        kept=of_chains["kept"],
        direct=of_chains["direct"],
        rewritten=of_chains["rewritten"],
        other=of_chains["other"],
        written=of_chains["written"],
        absorption=absorption,
        splitting=splitting(sums, coordinates),
        hops=[
            Hop(
                parent=chain.parent,
                child=chain.child,
                gate=truth.features[chain.child].gate,
                **dict(zip(("kept", "direct", "rewritten", "other", "written"), row, strict=True)),
            )
            for chain, row in zip(hop_sums.chains, by_chain.tolist(), strict=True)
        ],
    )


def _matched(scores: Tensor, matches: list[int | None]) -> list[float]:
    """The score of each row with its match; 0 without one."""
    return [0.0 if column is None else float(row[column]) for row, column in zip(scores, matches, strict=True)]


def _numbers(report: Report) -> dict[str, float | None]:
    left_out = ("hops", "made_from", "tokens", "true_features")
    return {a.name: getattr(report, a.name) for a in attrs.fields(Report) if a.name not in left_out}


def as_table(report: Report) -> str:
    """For people: a line for each number."""
    lines = [f"{report.true_features} true features, {report.tokens} held-out tokens"]
    lines += [f"{name:12} {value:.4f}" for name, value in _numbers(report).items() if value is not None]
    return "\n".join(lines)
