"""The training loop: the only place that knows everything. A step reads from top to bottom."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from trainer import distributed
from trainer.derive import evaluation_interval
from trainer.evaluate.loss import mixed, validation_losses
from trainer.guard import faults
from trainer.guard.faults import fault
from trainer.guard.verdict import Verdict, agree, agree_to_stop
from trainer.model.flops import utilization
from trainer.model.init import module_seed
from trainer.model.loss import losses, token_count
from trainer.outcome import Outcome
from trainer.run import Run
from trainer.saving import checkpoint, prepare_saves, settle
from trainer.schedule import factor
from trainer.setbacks import applied, record_recomputation, roll_back, skip
from trainer.units import split_interval


def train(run: Run) -> tuple[Outcome, str]:
    """Train to the end, to the end of the data, to a signal, to the time limit, or to divergence; save at each of them."""
    stop = begin(run)
    while not stop and run.position < run.derived.available:
        run.trace.at(run.step + 1)
        verdict = step(run)
        if run.skips >= run.config.guard.max_skips and not roll_back(run):
            settle(run)
            return Outcome.DIVERGED, (
                f"{run.skips} steps in a row were skipped after {run.rollbacks} returns to the last good checkpoint, which is kept"
            )
        stop = border(run, verdict)
    return end(run, stop)


def begin(run: Run) -> str:
    """The first step border: rehearse a save if there is none yet; why the run should stop, if a signal came before."""
    prepare_saves(run)
    stop = meet(run)
    if not stop and run.saved_step < 0:
        error = checkpoint(run)  # of full size, before an hour is spent on what could not be kept
        if error is not None:
            raise error
        stop = meet(run)
    if not stop and run.step and run.step % evaluation_interval(run.config) == 0:
        stop = validate(run)  # a signal that came in between left it out
    if stop:
        return stop
    bound = run.config.guard.stop_timeout
    took = f"; the save took {run.save_seconds:.1f} s" if run.save_seconds else ""
    run.progress.say(f"a signal ends in a saved checkpoint within {bound:g} s (guard.stop_timeout){took}")
    if run.save_seconds > bound / 2:
        run.progress.say(
            f"guard.stop_timeout = {bound:g} s is short for such saves: make it {4 * run.save_seconds:.0f} s"
        )
    return ""


def step(run: Run) -> Verdict:
    """One optimizer step: gradients, agreement, update or skip, record."""
    faults.locate(step=run.step + 1)
    began = time.monotonic()
    count = min(run.derived.sequences_per_step, run.derived.available - run.position)
    rate = set_learning_rate(run)
    verdict = forward_backward(run, count)
    run.report_rejected(verdict.rejected)
    if not verdict.finite:
        first, verdict = verdict, again(run, count)
        record_recomputation(run, first, verdict)
    reason = run.detector.reason(verdict.loss, verdict.gradient_norm)
    if reason:
        skip(run, count, reason)
    else:
        update(run, verdict)
    run.strategy.clear(run.parameters)
    start, run.step, run.position = run.position, run.step + 1, run.position + count
    record(run, verdict, reason, start, count, rate, time.monotonic() - began)
    return verdict


def border(run: Run, verdict: Verdict) -> str:
    """Between two steps: validate and save where that is due; why the run should stop, the same on all ranks."""
    run.heart.beat("border", run.step, run.position)
    run.watch.border()
    run.watch.patience = run.config.guard.hang_timeout
    fault("step.border")
    if verdict.saved:
        settle(run)
    if run.position >= run.derived.available:
        return ""
    stop = verdict.stop
    if not stop and run.step % evaluation_interval(run.config) == 0:
        stop = validate(run)
    if not stop and verdict.save_due:
        checkpoint(run, wait=False)
        stop = meet(run)
    return stop


def end(run: Run, stop: str) -> tuple[Outcome, str]:
    """The last border: validate, save, and say how the run ended."""
    fault("end.begin")
    if not stop:
        stop = validate(run)
    error = checkpoint(run)
    if error is not None:
        return error.outcome, f"{stop or 'all steps are trained'}, and the last save failed: {error.what}"
    if stop:
        return Outcome.PREEMPTED, f"{stop}; saved at step {run.step}"
    if run.position < run.derived.sequences:
        done, epochs = run.step, run.config.data.max_epochs
        _, source = run.data.train.first_exhausted(epochs or 0)
        what = f"source {source}" if run.config.data.mixture else "data"
        return (
            Outcome.OUT_OF_DATA,
            f"data.max_epochs = {epochs} ends the {what} at step {done} of {run.derived.steps}; saved",
        )
    return Outcome.FINISHED, f"all {run.derived.steps} steps are trained and saved"


def meet(run: Run, phase: str = "border") -> str:
    """All ranks meet where they could leave; why the run should stop, if any of them was told to."""
    run.heart.beat(phase, run.step, run.position)
    stop = agree_to_stop(signal=run.watch.flag.signal is not None, timeout=run.out_of_time, device=run.device)
    run.watch.border()
    return stop


class Stopped(Exception):
    """All ranks were told to stop in the middle of something that can be left; the text says why."""


def go_on(run: Run) -> None:
    """Raises:
    Stopped: a rank was told to stop.
    """
    stop = meet(run, "validation")
    if stop:
        raise Stopped(stop)


def set_learning_rate(run: Run) -> float:
    """Set every group's rate for this step; returns the factor."""
    rate = factor(run.config.schedule, run.step, run.derived.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate
    return rate


def forward_backward(run: Run, count: int) -> Verdict:
    """Gradients of the step's summed loss over a constant, and what all ranks agree on about them."""
    expected = run.derived.sequences_per_step * run.config.data.sequence_length
    torch.manual_seed(module_seed(run.config.seed, f"step {run.step} rank {distributed.rank()}"))  # dropout
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    tokens = 0
    run.heart.beat("data")
    fault("step.data")
    asked = time.monotonic()
    micro_batches = run.batches.at(run.position, count)
    run.data_seconds = time.monotonic() - asked
    run.heart.beat("forward and backward")
    fault("step.forward")
    harm = fault("step.loss")
    for index, batch in enumerate(micro_batches):
        tokens += token_count(batch.targets)
        run.strategy.synchronize(last=index == len(micro_batches) - 1)
        moved = batch.to(run.device)
        against = run.lessons.about(moved, run.batches, run.position, count, index) if run.lessons else None
        with run.strategy.context():
            loss, objective = losses(run.strategy.forward, *moved, against=against)
        run.strategy.backward(objective * harm / expected)
        loss_sum += loss.detach().double() * harm
    gradients = run.strategy.gradients(run.parameters)
    harm = fault("step.gradient")
    if harm != 1.0:
        next(share for share, _ in gradients if share.numel()).mul_(harm)
    run.heart.beat("agreement")
    verdict = agree(
        gradients, float(loss_sum), tokens, expected,
        signal=run.watch.flag.signal is not None,
        timeout=run.out_of_time,
        save_due=save_is_due(run),
        saved=run.background is not None and run.background.done,
        rejected=run.optimizer.take_rejected(),
        device=run.device,
        parts=run.lessons.take() if run.lessons else (),
        facts={
            "step": run.step,
            "position": run.position,
            "learning rates": [group["lr"] for group in run.optimizer.param_groups],
            "parameters without a gradient": run.strategy.missing(run.parameters, run.names),
        },
    )  # fmt: skip
    fault("step.agreed")
    return verdict


def again(run: Run, count: int) -> Verdict:
    """The same step once more from the same batch: a fault that does not come back leaves no trace in the run."""
    run.strategy.clear(run.parameters)
    return forward_backward(run, count)


def update(run: Run, verdict: Verdict) -> None:
    """Divide by the true global token count, scale down to the clipping norm, in one pass, and apply."""
    run.heart.beat("update")
    limit = run.config.train.clip_norm
    clip = 1.0 if limit is None else min(1.0, limit / max(verdict.gradient_norm, 1e-12))
    with run.groups.measure(run.step, verdict.ratio):
        run.strategy.scale(run.parameters, verdict.ratio * clip)
        run.optimizer.step()
    applied(run, verdict)
    fault("step.updated")


def save_is_due(run: Run) -> bool:
    """Whether a save follows this step: by count on all ranks alike, by time when rank 0 says so."""
    interval, unit = split_interval(run.config.checkpoint.every)
    if unit == "steps":
        return (run.step + 1) % int(interval) == 0
    return distributed.rank() == 0 and time.monotonic() - run.saved_at >= interval


def record(run: Run, verdict: Verdict, skipped: str, start: int, count: int, rate: float, seconds: float) -> None:
    """One line of history and progress, on rank 0."""
    if distributed.rank() != 0:
        return
    report_passes(run, start)
    density = verdict.tokens / max(run.batches.bytes(start, count), 1)
    finite = verdict.finite
    parts = dict(zip(("cross_entropy", "distill_kl"), verdict.parts, strict=False))
    bits = parts.get("cross_entropy", verdict.loss) / math.log(2) * density
    mfu = utilization(run.flops_per_token, verdict.tokens / seconds, run.peak_flops, distributed.world())
    run.history.write(
        step=run.step,
        position=run.position,
        **epochs(run),
        loss=verdict.loss if finite else None,
        **{name: part if finite else None for name, part in parts.items()},
        bits_per_byte=bits if finite else None,
        gradient_norm=verdict.gradient_norm if finite else None,
        **({"skipped": skipped} if skipped else {}),
        learning_rate_factor=rate,
        tokens=verdict.tokens,
        tokens_per_second=round(verdict.tokens / seconds, 1),
        mfu="unknown" if mfu is None else round(mfu, 4),
        seconds=round(seconds, 4),
        data_seconds=round(run.data_seconds, 4),
        **run.groups.take(),
    )
    run.progress.step(run.step, verdict.loss, bits, verdict.tokens / seconds, mfu)


def epochs(run: Run) -> dict[str, Any]:
    """Passes over the data so far: one number, or one for each source of a mixture."""
    counts = {name: round(count, 6) for name, count in run.data.train.epochs(run.position).items()}
    return {"epochs": counts} if len(counts) > 1 else {"epoch": next(iter(counts.values()))}


def report_passes(run: Run, start: int) -> None:
    """Say which passes over which source ended since the position `start`."""
    before, now = run.data.train.epochs(start), run.data.train.epochs(run.position)
    for name, count in now.items():
        if int(count) > int(before[name]):
            of = f" over {name}" if len(now) > 1 else ""
            run.progress.say(f"step {run.step}: pass {int(count)}{of} is complete")
            run.event("pass", source=name, passes=int(count), step=run.step)


def validate(run: Run) -> str:
    """Validation loss over all ranks, into history and onto the screen, and text samples if prompts are given.

    Returns:
        Why the run should stop, if it was told to meanwhile: then the validation is dropped, and made after a resume.
    """
    if run.validated_step == run.step:
        return ""
    run.heart.beat("validation")
    try:
        results = validation_losses(run, lambda: go_on(run))
    except Stopped as stopped:
        return str(stopped)
    run.validated_step = run.step
    if distributed.rank() == 0:
        loss, value = mixed(results, run.data.measured)
        sources = {
            name: {"loss": r.loss, "bits_per_byte": r.bits_per_byte, "tokens": r.tokens} for name, r in results.items()
        }
        run.history.write(
            step=run.step,
            position=run.position,
            validation_loss=loss,
            validation_bits_per_byte=value,
            validation_tokens=sum(result.tokens for result in results.values()),
            **({"validation_sources": sources} if len(sources) > 1 else {}),
        )
        share = value / run.data.unigram_bits_per_byte
        each = "; ".join(f"{name} {result.loss:.4f}" for name, result in results.items()) if len(results) > 1 else ""
        run.progress.say(
            f"step {run.step}: validation loss {loss:.4f}, {value:.4f} bits per byte, {share:.1%} of the unigram entropy"
            + (f" ({each})" if each else "")
        )
    run.samples.take(run)
    return ""
