"""The training loop.

One step, from left to right through the code, with the file of each part:

    source.next            raw MLP inputs and outputs, [B, L, D]          a plugin's Source; distributed/reading
    transform              numbers or rows, where the recipe says so      a plugin's Transform; distributed/transformed
    normalise              a shift and a scale, fitted before the run     a plugin's Normalisation
    encode + select        a layer's [B, F] at a time; k pairs are kept   model/encoder, model/selection
    activate               pre-activation -> feature value, [N]           a plugin's Activation
    decode                 the features' rows, summed over ranks          a plugin's Tying; model/sparse -> Kernels
    in the model           the language model with the transcoder in it   model/in_model; if a loss asks for it
    losses                 scalar terms of one forward pass, added up     training/objective, step/shares; plugins' Loss
    steer                  weights of penalties, where L0 has a target    training/between/steering
    backward               gradients of values and rows, sparse           model/sparse -> Kernels
    reduce                 average over ranks that share tokens           a plugin's Parallel
    check                  stop if a rank could not read                  distributed/reading
    guard                  stop before a NaN reaches a weight or a file   training/step/guard
    clip                   scale gradients to a norm                      training/optimizers/clip
    step                   at the scheduled rate                          plugins' Schedule and Optimizer

Nothing in a step reads a number back from a GPU, except at the log interval. On a CPU, where reading is free, a loss
that is not finite stops the run at its own step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from clt_plugins.contract.model.activation import Scheduled
from clt_plugins.distributed.reading import Reading
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.model.in_model.passes import InModel
from clt_plugins.model.scores import score
from clt_plugins.training import learned
from clt_plugins.training.between.steering import Steering, aims
from clt_plugins.training.host.threads import Threads
from clt_plugins.training.kept.moments import moments
from clt_plugins.training.kept.state import Watch
from clt_plugins.training.metrics import of_pass, of_step, passes, step_of
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.clip import clip_gradients, forget_squares, gradient_norm
from clt_plugins.training.optimizers.rate import set_rate
from clt_plugins.training.saved.checkpoint import Progress, save_checkpoint
from clt_plugins.training.step.guard import guard
from clt_plugins.training.step.stopwatch import Stopwatch

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import TrainConfig
    from clt_plugins.contract.results.logger import Logger
    from clt_plugins.contract.results.scores import Scores
    from clt_plugins.contract.training.schedule import Schedule
    from clt_plugins.model.assemble import Parts
    from clt_plugins.training.between.calls import Calls


def train(
    parts: Parts,
    config: TrainConfig,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    progress: Progress,
    loggers: list[Logger],
    folder: Path,
    wants_stop: Callable[[], bool],
    at_checkpoint: Callable[[int, Callable[[Mapping[str, Any]], None]], None],
    calls: Calls | None = None,
    *,
    silent: bool = False,
) -> Generator[None, None, Scores | None]:
    """Train from `progress.step` to `config.steps`; returns the last held-out scores, None if no step was left.

    It yields once in each step, when the weights are new and what is due is logged, but not saved. So a caller may let
    several runs take turns: what each of them does is the same as if it was alone.

    Args:
        schedule: of the learning rate, which `config` has.
        folder: where checkpoints go.
        wants_stop: asked in each step; if so, a checkpoint is written and the run stops after it, with several ranks
            perhaps after the next.
        calls: the callbacks, which act between steps and at the end; None if there are none.
        at_checkpoint: called with a step and a way to log when its checkpoint is written, and for the one to go on
            from: what was broken off there is done first.

    Raises:
        Stopped: interrupted (after a checkpoint), or the loss was not finite (the last good checkpoint stays).
        OSError: a checkpoint could not be written; earlier ones are untouched.
    """
    transcoder, source, device = parts.transcoder, parts.source, parts.context.device
    parallel = parts.context.parallel
    activation = transcoder.activation
    anneal = activation.schedule if isinstance(activation, Scheduled) else None
    assert config.lr is not None
    schedule_steps = config.schedule_steps or config.steps
    parameters = list(learned.parameters(parts).values())
    in_model = InModel(transcoder, parts.losses, source)
    steering = Steering(parts, schedule_steps, progress.steering) if aims(parts) else None
    reading = Reading(source, parallel, device)
    held = Watch(parts)
    watch = Stopwatch()
    # Several ranks, or the members of a sweep, wait for each other, which is no sign of a busy machine.
    threads = Threads(fixed=silent or device.type != "cpu" or parallel.world > 1)
    evaluated: Scores | None = None
    first = saved_step = progress.step
    quiet = True if silent or parallel.rank > 0 else None
    bar = tqdm(total=config.steps, initial=progress.step, unit="step", disable=quiet, dynamic_ncols=True)

    def log(metrics: Mapping[str, Any]) -> None:
        for record in [metrics] if calls is None else calls.records(metrics):
            for logger in loggers:
                logger.log(progress.step, {"tokens": progress.tokens, **record})
            if calls is not None:
                calls.note(record)

    def read_text(wanted: list[bool]) -> None:
        progress.texts = in_model.read(wanted, progress.texts)

    def checkpoint() -> None:
        nonlocal saved_step
        reading.compare()
        held.check()
        save_checkpoint(folder, progress, parts, optimizer, config.keep_checkpoints)
        saved_step = progress.step

    if progress.step:
        at_checkpoint(progress.step, log)
    while progress.step < config.steps and not progress.stopped:
        due = _due(config, progress.step + 1)
        if calls is not None:
            calls.before()
            watch.skip()
        before = parallel.sent()

        done = min(1.0, progress.step / schedule_steps)
        wanted = in_model.wanted(progress.step + 1, done)
        batch = reading.next(lambda wanted=wanted: read_text(wanted))  # type: ignore[misc]
        if any(wanted):
            reading.check()  # a rank that could not read has another text than the others, or none
        tokens = batch.tokens * parallel.data_ranks
        watch.lap("data_s")
        threads.begin()

        # The rate and the activation's schedule depend on the step alone: a checkpoint need not hold them.
        lr = schedule(progress.step, schedule_steps, config.lr)
        set_rate(optimizer, lr)
        # None instead of zeros: the sparse products then write the first gradient over the buffer, without adding.
        optimizer.zero_grad(set_to_none=True)
        if anneal is not None:
            anneal(done)
        of_model = in_model.passes(wanted)
        factor = None if steering is None else steering.factor()
        outcome = objective(transcoder, parts.losses, batch, progress.idle_tokens, done, of_model, factor)
        # Losses of which none has a gradient in this step (AuxK alone, while no feature is dead) change no weight.
        if outcome.total.requires_grad:
            outcome.total.backward()
        # Tensor ranks have different rows and need no reduction; data ranks average theirs.
        parallel.reduce_gradients(parameters)
        if parallel.data_ranks > 1:
            forget_squares(parameters)
        # The host has queued all of the pass by now. So it waits here for hosts that are slower, not for its device.
        reading.check()
        norm = gradient_norm(parameters, parallel) if config.clip_norm is not None or any(due.values()) else None
        # Before the clip: a NaN norm would make every gradient NaN, and the message could not name where it began. On a
        # GPU the loss is read only where the step reads numbers anyway, and always before a file is written.
        guarded = device.type == "cpu" or due["log"] or due["checkpoint"] or due["eval"]
        if guarded:
            guard(parts, outcome, norm, batch, progress.step, saved_step)
        if config.clip_norm is not None and norm is not None:
            clip_gradients(parameters, norm, config.clip_norm, optimizer)
        optimizer.step()
        if progress.step == 0:
            moments(parts, optimizer)  # what checkpoints cannot hold is refused now, not hours later

        # A feature that was active for another data rank's tokens is not idle, so counts are summed over tokens.
        counts = parallel.total(outcome.features.counts(), over="tokens")
        progress.idle_tokens.add_(tokens).masked_fill_(counts > 0, 0)
        if steering is not None:
            steering.update(counts, tokens, done)
            progress.steering = steering.state
        progress.tokens += tokens
        progress.step += 1
        # Saved with the transcoder, so that reports can say what they judge.
        transcoder.step, transcoder.tokens = progress.step, progress.tokens
        sent = parallel.sent()
        bar.update()
        if any(due.values()):
            # What was queued is the time of these steps. The device is waited for where numbers are read anyway.
            torch.get_device_module(device).synchronize()
        watch.lap("step_s")
        threads.end()
        if progress.step == first + 1:
            held.check()  # what would be lost is told before hours of training
        if calls is not None:
            calls.after(partial(step_of, parts, progress, batch, outcome, counts, norm, lr))
            due = calls.decide(due)
            if any(due.values()) and not (guarded and norm is not None):
                norm = gradient_norm(parameters, parallel) if norm is None else norm
                guard(parts, outcome, norm, batch, progress.step - 1, saved_step)
                guarded = True

        if due["log"] or due["eval"]:
            reading.compare()
        if due["log"]:
            own = {**watch.means(tokens), **_traffic(before, sent)}
            left_out = transcoder.capacity.read(parallel)
            if left_out is not None:
                own["train/pairs_left_out"] = left_out
            if isinstance(source, TransformedSource):
                own.update(source.take_counts())
            if steering is not None:
                own.update(steering.metrics())
            metrics = of_step(parts.metrics, step_of(parts, progress, batch, outcome, counts, norm, lr), own)
            # Sparse or dense is chosen by measured density, and only here, where the number is read anyway.
            l0 = float(parallel.total(counts.sum())) / (batch.tokens * parallel.data_ranks)
            transcoder.settle(l0 / (transcoder.n_layers * transcoder.n_features))
            loss = float(parallel.total(outcome.total, over="tokens")) / parallel.data_ranks
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            log(metrics)
        if due["eval"]:
            held_out = passes(parts.metrics)
            with calls.evaluating() if calls is not None else nullcontext():
                evaluated = score(transcoder, source.held_out(config.eval_tokens), held_out)
            metrics = of_pass(held_out, evaluated)
            if calls is not None:
                calls.evaluated(metrics)
                due = calls.decide(due)
            log(metrics)
        if calls is not None and calls.waiting:
            log({})
        # Others may have their turn now: what this step has made is released before, but for the loss and gradients.
        unseen = None if guarded and norm is not None else outcome.totals()
        del batch, outcome, counts, of_model
        yield
        # A signal reaches ranks at different steps: all stop after the same one.
        stopping = reading.stops(wants_stop()) and progress.step < config.steps
        if stopping and unseen is not None:
            guard(parts, unseen, gradient_norm(parameters, parallel), None, progress.step - 1, saved_step)
        if due["checkpoint"] or stopping:
            checkpoint()
        if stopping:
            bar.close()
            text = f"interrupted at step {progress.step}, checkpoint written: go on with --resume"
            raise Stopped(ExitCode.INTERRUPTED, text if parallel.rank == 0 else "")
        if due["checkpoint"]:
            at_checkpoint(progress.step, log)
        watch.skip()  # evaluation and checkpoints are no part of the next step's time
    bar.close()
    if calls is not None:
        changed = calls.finish()
        if progress.step > first:  # else it was logged when the run came to its end
            if changed:
                held_out = passes(parts.metrics)
                evaluated = score(transcoder, source.held_out(config.eval_tokens), held_out)
                log(of_pass(held_out, evaluated))
            elif calls.waiting:
                log({})
    return evaluated


def _due(config: TrainConfig, step: int) -> dict[str, bool]:
    """What happens after this step (counted from 1)."""
    last = step == config.steps  # the last step always logs, evaluates and saves
    every = {"log": config.log_every, "eval": config.eval_every, "checkpoint": config.checkpoint_every}
    return {name: last or step % interval == 0 for name, interval in every.items()}


def _traffic(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """Bytes that each rank sent in a step, by what they were for; nothing on one rank."""
    sent = {what: count - before.get(what, 0) for what, count in after.items() if count > before.get(what, 0)}
    return {f"parallel/{what}_bytes": count for what, count in sent.items()}
