"""The training loop: the only place that knows everything. A step reads from top to bottom."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from trainer import config as configuration
from trainer import distributed, runfolder
from trainer.checkpoint.retention import prune
from trainer.checkpoint.save import save
from trainer.derive import evaluation_interval
from trainer.evaluate.loss import mixed, validation_losses
from trainer.guard.verdict import Verdict, agree
from trainer.model.flops import utilization
from trainer.model.init import module_seed
from trainer.model.loss import losses, token_count
from trainer.outcome import Outcome
from trainer.schedule import factor
from trainer.setup import Run
from trainer.units import split_interval


def train(run: Run) -> tuple[Outcome, str]:
    """Train to the end, to the end of the data, to a signal, to the time limit, or to divergence; save at each of them."""
    while run.position < run.derived.available:
        run.trace.at(run.step + 1)
        began = time.monotonic()
        count = min(run.derived.sequences_per_step, run.derived.available - run.position)
        rate = set_learning_rate(run)
        verdict = forward_backward(run, count)
        report_rejected(run, verdict.rejected)
        if verdict.finite:
            with run.groups.measure(run.step, verdict.ratio):
                clip_gradients(run, verdict)
                run.optimizer.step()
            run.bad_steps = 0
        else:
            skip(run, verdict, count)
        run.strategy.clear(run.parameters)
        start, run.step, run.position = run.position, run.step + 1, run.position + count
        record(run, verdict, start, count, rate, time.monotonic() - began)

        if run.bad_steps > run.config.train.max_bad_steps:
            return (
                Outcome.DIVERGED,
                f"{run.bad_steps} steps in a row were not finite; the last checkpoint is older than they",
            )
        if run.position >= run.derived.available:
            break
        if run.step % evaluation_interval(run.config) == 0:
            validate(run)
        if verdict.stop:
            checkpoint(run)
            return Outcome.PREEMPTED, f"{verdict.stop}; saved at step {run.step}"
        if verdict.save_due:
            checkpoint(run)

    validate(run)
    checkpoint(run)
    if run.position < run.derived.sequences:
        done, epochs = run.step, run.config.data.max_epochs
        _, source = run.data.train.first_exhausted(epochs or 0)
        what = f"source {source}" if run.config.data.mixture else "data"
        return (
            Outcome.OUT_OF_DATA,
            f"data.max_epochs = {epochs} ends the {what} at step {done} of {run.derived.steps}; saved",
        )
    return Outcome.FINISHED, f"all {run.derived.steps} steps are trained and saved"


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
    asked = time.monotonic()
    micro_batches = run.batches.at(run.position, count)
    run.data_seconds = time.monotonic() - asked
    for index, batch in enumerate(micro_batches):
        tokens += token_count(batch.targets)
        run.strategy.synchronize(last=index == len(micro_batches) - 1)
        with run.strategy.context():
            loss, objective = losses(run.strategy.forward, *batch.to(run.device))
        run.strategy.backward(objective / expected)
        loss_sum += loss.detach().double()
    limit = run.config.train.time_limit
    return agree(
        run.strategy.gradients(run.parameters), float(loss_sum), tokens, expected,
        signal=run.flag.signal is not None,
        timeout=limit is not None and time.monotonic() - run.started > limit,
        save_due=save_is_due(run),
        rejected=run.optimizer.take_rejected(),
        device=run.device,
        facts={
            "step": run.step,
            "position": run.position,
            "learning rates": [group["lr"] for group in run.optimizer.param_groups],
            "parameters without a gradient": run.strategy.missing(run.parameters, run.names),
        },
    )  # fmt: skip


def clip_gradients(run: Run, verdict: Verdict) -> None:
    """Divide by the true global token count, and scale down to the clipping norm, in one pass."""
    limit = run.config.train.clip_norm
    clip = 1.0 if limit is None else min(1.0, limit / max(verdict.gradient_norm, 1e-12))
    run.strategy.scale(run.parameters, verdict.ratio * clip)


def skip(run: Run, verdict: Verdict, count: int) -> None:
    """No rank applies an update from a gradient that is not finite on any rank; the window is passed over."""
    run.bad_steps += 1
    run.skipped.append([run.position, count])
    run.progress.say(f"step {run.step + 1} is skipped: loss {verdict.loss}, gradient norm {verdict.gradient_norm}")
    if distributed.rank() == 0:
        runfolder.record_event(run.folder, "skipped", step=run.step, position=run.position, count=count)


def report_rejected(run: Run, count: int) -> None:
    """Say how many matrices the last step left as they were; known with the next agreement, or at a save."""
    if count:
        run.progress.say(f"step {run.step}: {count} matrices had no sound update and were left as they were")
        if distributed.rank() == 0:
            runfolder.record_event(run.folder, "rejected", step=run.step, matrices=count)


def save_is_due(run: Run) -> bool:
    """Whether a save follows this step: by count on all ranks alike, by time when rank 0 says so."""
    interval, unit = split_interval(run.config.checkpoint.every)
    if unit == "steps":
        return (run.step + 1) % int(interval) == 0
    return distributed.rank() == 0 and time.monotonic() - run.saved_at >= interval


def record(run: Run, verdict: Verdict, start: int, count: int, rate: float, seconds: float) -> None:
    """One line of history and progress, on rank 0."""
    if distributed.rank() != 0:
        return
    report_passes(run, start)
    density = verdict.tokens / max(run.batches.bytes(start, count), 1)
    finite = verdict.finite
    mfu = utilization(run.flops_per_token, verdict.tokens / seconds, run.peak_flops, distributed.world())
    run.history.write(
        step=run.step,
        position=run.position,
        **epochs(run),
        loss=verdict.loss if finite else None,
        bits_per_byte=verdict.loss / math.log(2) * density if finite else None,
        gradient_norm=verdict.gradient_norm if finite else None,
        learning_rate_factor=rate,
        tokens=verdict.tokens,
        tokens_per_second=round(verdict.tokens / seconds, 1),
        mfu="unknown" if mfu is None else round(mfu, 4),
        seconds=round(seconds, 4),
        data_seconds=round(run.data_seconds, 4),
        **run.groups.take(),
    )
    run.progress.step(run.step, verdict.loss, verdict.loss / math.log(2) * density, verdict.tokens / seconds, mfu)


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
            runfolder.record_event(run.folder, "pass", source=name, passes=int(count), step=run.step)


def validate(run: Run) -> None:
    """Validation loss over all ranks, into history and onto the screen, and text samples if prompts are given."""
    results = validation_losses(run)
    if distributed.rank() == 0:
        loss, value = mixed(results, run.data.weights)
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


def checkpoint(run: Run) -> None:
    """Save a new generation, unless this step has one, and drop old ones."""
    if run.saved_step == run.step:
        return
    began = time.monotonic()
    report_rejected(run, int(distributed.sum_over_ranks([float(run.optimizer.take_rejected())], run.device)[0]))
    folder = save(
        run.checkpoints, run.step, run.position, run.tensors(),
        config=configuration.resolved(run.config), state=run.state(),
        lineage={**run.lineage(), "run": run.config.name},
        attempt=run.attempt,
    )  # fmt: skip
    run.saved_step, run.saved_at = run.step, time.monotonic()
    if distributed.rank() == 0:
        prune(run.checkpoints, run.config.checkpoint.keep)
        runfolder.record_event(run.folder, "saved", step=run.step, position=run.position, checkpoint=folder.name)
    run.progress.say(f"step {run.step}: saved {folder.name} in {time.monotonic() - began:.1f} s")
