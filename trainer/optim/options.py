"""What the options of all matrix rules have in common. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from trainer.optim.adamw import Options as AdamWOptions
from trainer.optim.polar import CoefficientName, Form, Precision, Prescale
from trainer.registry import STRICT

Factor = Annotated[float, Field(ge=0)]

# Keys of a rule's options from which its groups follow; the groups of the optimizer do not carry them.
GROUPING = ("name", "adamw", "multipliers", "split", "tau_epochs", "decay_head")


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """Factors on the values of the group that a parameter belongs to."""

    __pydantic_config__ = STRICT
    lr: Factor = 1.0
    """On the learning rate."""
    weight_decay: Factor = 1.0
    """On the weight decay (which acts times the multiplied learning rate)."""


@dataclass(frozen=True, kw_only=True)
class MomentumOptions:
    """A rule on the momentum of hidden matrices, AdamW on the rest."""

    __pydantic_config__ = STRICT
    lr: Annotated[float, Field(ge=0)] = 2e-3
    """Learning rate of the hidden matrices."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the momentum (an exponential average of gradients)."""
    nesterov: bool = False
    """Take the momentum one step ahead."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay per step, times the learning rate."""
    tau_epochs: Annotated[float, Field(gt=0)] | None = None
    """The decay as a time instead: weight_decay = 1 / (lr * tau_epochs * steps of an epoch)."""
    cautious: bool = False
    """Decay a weight only where the update has its sign, and so shrinks it too."""
    split: dict[str, int | list[int]] = field(default_factory=dict)
    """Fused weights by name pattern: so many equal blocks of rows, or the rows of each block, each a matrix of its own."""
    multipliers: dict[str, Multiplier] = field(default_factory=dict)
    """Factors by parameter name pattern, or for all `matrices`, `embeddings` or `vectors`; the last that fits holds."""
    adamw: AdamWOptions = AdamWOptions(lr=3e-3)
    """The rule for embeddings, head, norms and biases."""


@dataclass(frozen=True, kw_only=True)
class MatrixOptions(MomentumOptions):
    """A rule that orthogonalizes hidden matrices, AdamW on the rest."""

    scale: Literal["rms", "spectral", "shape"] = "rms"
    """What an (m x n) update is scaled to: `rms` entries of root mean square 0.2 (matches AdamW), `spectral` sqrt(m/n)
    times the polar factor, `shape` sqrt(max(1, m/n)) times it."""
    polar: CoefficientName = "polar-express"
    """Coefficients of the Newton-Schulz steps."""
    polar_dtype: Precision = "auto"
    """Precision of the Newton-Schulz products; auto: fp16 on CUDA, bf16 on a CPU with bf16 matrix units, else fp32."""
    polar_form: Form = "standard"
    """`gram` iterates the Gram matrix instead, in fp32: fewer products where one side is over twice the other."""
    polar_prescale: Prescale = "frobenius"
    """Norm that a matrix is divided by before the first step; `schatten` is the tighter one."""
