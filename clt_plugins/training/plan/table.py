"""A plan for people."""

from __future__ import annotations

from collections.abc import Iterator

from clt_plugins.files.records import as_data
from clt_plugins.training.plan.records import Plan, Speed


def as_table(needs: Plan) -> str:
    """GiB of memory, GB of disk, GFLOP and milliseconds of a training step."""
    held = {name: size for name, size in as_data(needs.bytes).items() if size}
    ranks = f" on each of {needs.ranks} ranks" if needs.ranks > 1 else ""
    lines = [
        f"layers {needs.n_layers}, d_model {needs.d_model}, features {needs.n_features:,} per layer",
        f"parameters {needs.parameters:,}{ranks}",
        *(f"  {name} {count:,}" for name, count in needs.parameters_by_name.items()),
        f"memory {needs.total_bytes / 2**30:.3f} GiB{ranks}",
        *(f"  {name} {size / 2**30:.3f} GiB" for name, size in held.items()),
        *([f"  and on the CPU {needs.host_bytes / 2**30:.3f} GiB"] if needs.host_bytes else []),
        f"disk {needs.disk.run / 1e9:,.1f} GB for the run, {needs.disk.checkpoint / 1e9:,.1f} of it a checkpoint; "
        f"{needs.disk.activations / 1e9:,.1f} GB if activations are stored",
        f"arithmetic {needs.total_flops / 1e9:,.1f} GFLOP per step",
        *(f"  {name} {count / 1e9:,.1f}" for name, count in as_data(needs.flops).items()),
    ]
    lines += _times(needs, needs.speed) if needs.speed is not None else ["times: --gpu NAME, or --measure here"]
    return "\n".join(lines)


def _times(needs: Plan, speed: Speed) -> Iterator[str]:
    device = speed.device
    several = f"{device.gpus} x " if device.gpus > 1 else ""
    yield f"time on {several}{device.name} ({device.basis})"
    last = {piece.name: piece for piece in speed.last.pieces}
    changes = abs(speed.first.seconds - speed.last.seconds) > 0.01 * speed.last.seconds
    for piece in speed.first.pieces:
        later = f" -> {last[piece.name].seconds * 1e3:,.1f}" if changes and piece.name in last else ""
        yield f"  {piece.name} {piece.seconds * 1e3:,.1f}{later} ms, {piece.share:.0%}: {piece.bound}"
    later = f" -> {speed.last.seconds * 1e3:,.1f}" if changes else ""
    yield f"  a step {speed.first.seconds * 1e3:,.1f}{later} ms" + (
        f"; up to {speed.if_dead * 1e3:,.1f} more while features are dead" if speed.if_dead else ""
    )
    hours = f"{speed.hours:,.1f} hours" if speed.hours >= 1 else f"{speed.hours * 60:,.0f} minutes"
    yield f"  {speed.tokens_per_s:,.0f} tokens/s, {hours} for {needs.tokens:,} tokens"
    largest = max(speed.last.pieces, key=lambda piece: piece.seconds)
    yield f"  {largest.name} is {largest.share:.0%} of {'the last' if changes else 'a'} step"
    for advice in speed.advice[:4]:
        yield f"  {advice.set} gives {advice.times:.2g} x tokens/s ({advice.cost})"
    if speed.fits is False:
        yield f"  does not fit: {refusal(needs, speed)}"
    elif speed.smallest_gpus is not None and device.gpus > speed.smallest_gpus:
        yield f"  the smallest number that holds it is {speed.smallest_gpus}: {speed.take}"


def refusal(needs: Plan, speed: Speed) -> str:
    """Why a plan does not fit, and what to do."""
    assert speed.device.memory is not None
    remedies = []
    if speed.to_fit:
        remedies.append("set " + " and ".join(speed.to_fit))
    if speed.take:
        remedies.append(f"take {speed.take}")
    text = f"needs {needs.total_bytes / 1e9:.0f} GB of {speed.device.memory / 1e9:.0f}"
    return f"{text}: {', or '.join(remedies) or 'take fewer features, or another tying'}"
