"""What a plan holds; its JSON has these fields. Bytes are bytes, GB are 10^9 of them, times are seconds.

Of several ranks, all numbers are those of rank 0, unless they say otherwise.
"""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Memory:
    """Bytes of a rank's device, by what they hold. The last six are not all alive at the same time."""

    parameters: int
    """The transcoder's parameters."""
    gradients: int
    """One for each parameter."""
    optimizer: int
    """What the optimizer keeps beside the parameters, such as Adam's two moments of each."""
    plugins: int
    """What losses, metrics and callbacks keep: their parameters and buffers, averages of weights."""
    normalisation: int
    """The normalisation's numbers: a shift and a scale of inputs and targets, or matrices."""
    source: int
    """The block of activations and the held-out rows of the source."""
    language_model: int
    """Weights of the language model."""
    libraries: int
    """CUDA's context and the libraries' own memory; 0 where the plan is of no GPU."""
    batch: int
    """Inputs and targets, raw and normalised; what an encoder makes of inputs and weights; the reconstruction, its
    error, and gradients of it."""
    pre_activations: int
    """Pre-activations: of all layers where they are kept, else of one layer at a time."""
    selection: int
    """Candidates among the pre-activations, of all selections."""
    pairs: int
    """Indices and values of active pairs, and of those that losses select, with what these write; 0 where the
    transcoder runs dense."""
    written: int
    """The reconstruction, its error and a gradient, in a sparse step; a dense one has them in `batch`."""
    model_pass: int
    """A forward pass of the language model."""
    in_model: int = 0
    """What the language model, with the transcoder in it, keeps for a backward pass; 0 where no loss runs it."""
    statistics: int
    """What the normalisation gathers before the first step."""


@attrs.frozen(kw_only=True)
class Disk:
    """Bytes on disk, of all ranks together."""

    checkpoint: int
    """One checkpoint: parameters, moments, and what plugins keep."""
    run: int
    """The run's folder at its fullest: `train.keep_checkpoints` of them and one that is being written, and the
    transcoder."""
    activations: int
    """What `generate` would store of the same tokens in bfloat16, held-out ones included."""


@attrs.frozen(kw_only=True)
class Flops:
    """Floating-point operations of a training step; a multiplication and an addition count as two."""

    encoder: int
    """Pre-activations, and their gradients where they are dense; and what an encoder computes for them."""
    sparse: int
    """Decoding active pairs, the gradients of values and decoder rows, and of the encoder's rows."""
    optimizer: int
    """Adam's update."""


@attrs.frozen(kw_only=True)
class Device:
    """What the times are for."""

    name: str
    gpus: int
    """How many of them work together; 1 for a machine that was measured."""
    basis: str
    """Where its speed is from: published ceilings and assumed efficiencies, or a measurement."""
    memory: int | None = None
    """Bytes of each; None if it is not known."""


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a training step."""

    name: str
    seconds: float
    share: float
    """Of the step."""
    bound: str
    """What takes the time: a product, memory, instructions, the network."""


@attrs.frozen(kw_only=True)
class Step:
    """A training step, and the source's work for its tokens."""

    seconds: float
    pieces: list[Piece]


@attrs.frozen(kw_only=True)
class Advice:
    """A change of the recipe that makes it faster."""

    set: str
    """As `--set` takes it; or an option of `plan`."""
    times: float
    """Tokens per second with it, over those without."""
    total_bytes: int
    """Memory with it."""
    cost: str
    """What it changes besides."""


@attrs.frozen(kw_only=True)
class Speed:
    """How long the recipe takes on a device."""

    device: Device
    first: Step
    """At the start, where a k that falls is largest."""
    last: Step
    """At the end."""
    seconds: float
    """Per step, the mean of the run."""
    tokens_per_s: float
    hours: float
    """Of all training steps, the source's work included; without evaluations and checkpoints."""
    if_dead: float
    """Seconds that a step takes longer at most while features are dead (AuxK)."""
    fits: bool | None = None
    """Whether the device's memory holds it; None if that is not known."""
    smallest_gpus: int | None = None
    """How many of these GPUs hold the recipe if its features are split over them (`parallel.tensor`); None if not even
    1,024 do, or the device's memory is not known."""
    take: str = ""
    """What to give to `plan` for that number."""
    to_fit: list[str] = attrs.field(factory=list)
    """Settings that together make it fit into one of them, if it does not; empty if there are none."""
    advice: list[Advice] = attrs.field(factory=list)
    """The most useful first."""


@attrs.frozen(kw_only=True)
class Plan:
    """What a run will need."""

    n_layers: int = attrs.field(alias="layers")
    """L."""
    d_model: int
    """D."""
    n_features: int = attrs.field(alias="features")
    """F, per layer, of all ranks together."""
    parameters: int
    """How many numbers are trained in the transcoder, on this rank."""
    parameters_by_name: dict[str, int]
    """The same for each parameter."""
    ranks: int
    """Of how many ranks."""
    bytes: Memory
    """Memory by what it holds."""
    total_bytes: int
    """What is needed at the peak: less than the sum of `bytes`, since not all of it is alive at the same time."""
    host_bytes: int
    """Memory of the CPU that the source keeps its activations in, if they are not on the device."""
    flops: Flops
    """Arithmetic of a training step by part."""
    total_flops: int
    """The sum of `flops`."""
    tokens: int
    """Tokens that the run trains on, of all ranks together."""
    disk: Disk
    speed: Speed | None = None
    """Times, where a device is given or measured."""
