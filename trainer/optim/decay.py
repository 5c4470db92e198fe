"""Weight decay as a time: how many epochs a weight takes to forget. Imports no torch.

Decoupled decay takes lr * weight_decay of a weight away in a step, so a weight is an average of updates over the last
1 / (lr * weight_decay) steps. Counted in epochs this timescale, tau, keeps its best value when the batch, the amount of
text or the rate changes, which a bare weight decay does not (Wang & Aitchison, arXiv 2405.13698).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trainer.outcome import RunError


def tau_epochs(lr: float, weight_decay: float, steps_per_epoch: float) -> float | None:
    """The timescale in epochs at a rate; None where nothing decays."""
    shrink = lr * weight_decay * steps_per_epoch  # share of a weight that an epoch takes away
    return 1 / shrink if shrink else None


def check(options: Any) -> None:
    """Refuse a timescale beside a weight decay, without a rate, or where nothing can decay.

    Args:
        options: those of an optimizer, as in the configuration.

    Raises:
        RunError: of the three.
    """
    for where, one in _sections(options):
        if one.tau_epochs is None:
            continue
        if one.weight_decay != type(one)().weight_decay:
            raise RunError(
                f"{where}.tau_epochs = {one.tau_epochs:g} and {where}.weight_decay = {one.weight_decay:g} both set the decay",
                where=f"{where}.tau_epochs",
                mend=f"leave one of them out: --{where}.weight_decay={type(one)().weight_decay:g}, or --{where}.tau_epochs=null",
            )
        if one.lr == 0:
            raise RunError(
                f"{where}.tau_epochs = {one.tau_epochs:g} needs a rate, and {where}.lr is 0",
                where=f"{where}.tau_epochs",
                mend=f"raise {where}.lr, or leave {where}.tau_epochs out",
            )
        if one is not options and not one.decay_head:
            raise RunError(
                f"{where}.tau_epochs does nothing: of the weights under {where} only the head can decay",
                where=f"{where}.tau_epochs",
                mend=f"set optim.tau_epochs for the hidden matrices, or {where}.decay_head: true",
            )


def settled(options: Any, steps_per_epoch: float) -> Any:
    """The options with a weight decay in place of each timescale, at the full rate: 1 / (lr * tau * steps per epoch).

    Args:
        steps_per_epoch: optimizer steps of one pass over the training data, of a mixture over all of its sources.

    Raises:
        RunError: the timescale is no longer than a step, so that nothing would be left of a weight.
    """
    found = {}
    for where, one in _sections(options):
        if one.tau_epochs is None:
            found[where] = one
            continue
        steps = one.tau_epochs * steps_per_epoch
        if steps <= 1:
            raise RunError(
                f"{where}.tau_epochs = {one.tau_epochs:g} is {steps:.3g} steps: a step would take all of a weight away",
                where=f"{where}.tau_epochs",
                mend=f"an epoch has {steps_per_epoch:.4g} steps: use more than {1 / steps_per_epoch:.3g}",
            )
        found[where] = replace(one, weight_decay=1 / (one.lr * steps), tau_epochs=None)
    if "optim.adamw" in found:
        return replace(found["optim"], adamw=found["optim.adamw"])
    return found["optim"]


def summary(
    groups: Sequence[dict[str, Any]], names: Sequence[str], sizes: Sequence[tuple[int, int]], steps_per_epoch: float
) -> str:
    """Which groups decay how fast, and which do not, in one line.

    Args:
        groups: the optimizer's, with `initial_lr` and `weight_decay`.
        names: of the groups.
        sizes: tensors of each group, and parameters in them.
    """
    parts, rest, spared = list[str](), list[str](), [0, 0]
    for group, name, (tensors, entries) in zip(groups, names, sizes, strict=True):
        tau = tau_epochs(group["initial_lr"], group["weight_decay"], steps_per_epoch)
        if tau is None:
            rest.append(name)
            spared = [spared[0] + tensors, spared[1] + entries]
        else:
            parts.append(f"{name} {group['weight_decay']:.4g} ({_size(tensors, entries)}, tau {tau:.3g} epochs)")
    if rest:
        parts.append(f"none: {', '.join(rest)} ({_size(*spared)})")
    return "; ".join(parts)


def _size(tensors: int, entries: int) -> str:
    return f"{tensors} tensor{'' if tensors == 1 else 's'}, {entries:,} parameters"


def _sections(options: Any) -> Iterator[tuple[str, Any]]:
    """The parts of an optimizer's options that have a decay of their own, with their place in the configuration."""
    yield "optim", options
    if hasattr(options, "adamw"):
        yield "optim.adamw", options.adamw
