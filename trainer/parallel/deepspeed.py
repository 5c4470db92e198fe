"""DeepSpeed's ZeRO: AdamW on flat partitions of the optimizer state (stage 1), of gradients too (2), of parameters too
(3), optionally in CPU memory. An extra: `pip install 'orthogon[deepspeed]'`.

Arithmetic is that of the other strategies: fp32 weights, bf16 by autocast, gradients summed in fp32. Checkpoints are ours.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from trainer.outcome import RunError
from trainer.parallel import single
from trainer.registry import STRICT, lazy

torch: Any = lazy("torch")
zero: Any = lazy("trainer.parallel.partitions")
groups: Any = lazy("trainer.optim.groups")
model_build: Any = lazy("trainer.model.build")


@dataclass(frozen=True, kw_only=True)
class Options:
    """ZeRO by DeepSpeed, for AdamW."""

    __pydantic_config__ = STRICT
    name: Literal["deepspeed"] = "deepspeed"
    stage: Literal[1, 2, 3] = 2
    """What is partitioned over the ranks: optimizer state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: bool = False
    """Keep optimizer state and its arithmetic in CPU memory."""
    offload_parameters: bool = False
    """Keep partitions of parameters in CPU memory; stage 3 only."""


def check(options: Options, optimizer: Any, train: Any) -> None:
    """Refuse matrix optimizers, an option that would do nothing, and what cannot be done to partitioned parameters."""
    if optimizer.name != "adamw":
        raise RunError(
            f"optim.name is {optimizer.name}, which works on whole matrices, and deepspeed flattens parameters into vectors",
            where="parallel.name",
            mend="use fsdp2 or ddp, or optim.name: adamw",
        )
    if options.offload_parameters and options.stage < 3:
        raise RunError(
            f"parallel.offload_parameters needs partitioned parameters, and parallel.stage is {options.stage}",
            where="parallel.offload_parameters",
            mend="set parallel.stage: 3, or leave it out",
        )
    if train.micro_batch_size == "auto":
        raise RunError(
            "train.micro_batch_size: auto works with fsdp2, ddp and single, not with deepspeed, which frees no engine that "
            "ran out of memory",
            where="train.micro_batch_size",
            mend="give a number of sequences",
        )
    if options.stage == 3 and train.loss_chunk is not None:
        raise RunError(
            "train.loss_chunk needs the head's weights for all chunks, and parallel.stage: 3 gathers them for one call only",
            where="train.loss_chunk",
            mend="use parallel.stage: 2 or fsdp2, or leave train.loss_chunk out",
        )
    if options.stage == 3 and train.activation_checkpointing == "selective":
        raise RunError(
            "train.activation_checkpointing: selective computes the operations of a forward again, and parallel.stage: 3 "
            "gathers parameters among them, each time otherwise",
            where="train.activation_checkpointing",
            mend="use full, or parallel.stage: 2, or fsdp2",
        )


class Strategy(single.Strategy):
    """A DeepSpeed engine around the model."""

    def check_world(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise RunError(
                "parallel.name is deepspeed, which is not installed",
                where="parallel.name",
                mend="pip install 'orthogon[deepspeed]', or use fsdp2",
            )

    @property
    def initial_device(self) -> Any:
        """Stage 3 never holds all parameters on the device: they are made in CPU memory and partitioned from there."""
        return torch.device("cpu") if self.options.stage == 3 else self.device

    def mesh(self) -> str:
        what = {1: "optimizer state", 2: "gradients and optimizer state", 3: "every parameter"}[self.options.stage]
        offloaded = [w for w in ("optimizer", "parameters") if getattr(self.options, f"offload_{w}")]
        place = f", {' and '.join(offloaded)} in CPU memory" if offloaded else ""
        return f"ZeRO-{self.options.stage} over {self.world} ranks: each holds 1/{self.world} of {what}{place}"

    def optimizer(self, model: Any, options: Any) -> Any:
        return zero.Optimizer(groups.parameter_groups(model, options))

    def connect(self, model: Any, optimizer: Any) -> None:
        deepspeed = _library(self.device)
        self.linear = torch.nn.functional.linear  # which stage 3 replaces, for all models of the process
        settings = self.settings(model)
        if self.options.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer.inner, config=settings, dist_init_required=False
        )
        optimizer.inner.start(list(zero.partitions(engine, self.options.stage)))
        if self.options.stage < 3:
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # a resume fills the state before the first step
        optimizer.engine = self.forward = engine
        self.partitioned, self.rows = optimizer, zero.Rows()
        self.parts = zero.Parts(optimizer, self.options.stage)

    def settings(self, model: Any) -> dict[str, Any]:
        """DeepSpeed's own configuration. Clipping, accumulation and the learning rate stay with the training loop."""
        size = min(sum(p.numel() for p in model.parameters()), 2**27)
        zero_settings: dict[str, Any] = {
            "stage": self.options.stage, "reduce_bucket_size": size, "allgather_bucket_size": size,
        }  # fmt: skip
        if self.options.offload_optimizer:
            zero_settings["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.options.offload_parameters:
            zero_settings["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # of no effect: batches are ours
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "zero_optimization": zero_settings,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # No module's gradients are reduced in bf16.
            "torch_autocast": {
                "enabled": self.precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": [],
            },
        }  # fmt: skip

    def synchronize(self, *, last: bool) -> None:
        """Stage 1 reduces in the last micro-step, stages 2 and 3 in each: they keep no whole gradients."""
        self.forward.set_gradient_accumulation_boundary(last)  # type: ignore[union-attr]

    def context(self) -> Any:
        """The engine casts by itself."""
        return nullcontext()

    def backward(self, loss: Any) -> None:
        """DeepSpeed takes means over the ranks, and the loss is divided by the global token count already."""
        self.forward.backward(loss * self.world, scale_wrt_gas=False)  # type: ignore[union-attr]
        self.partitioned.pending = True

    def gradients(self, parameters: list[Any]) -> list[tuple[Any, int]]:
        shares: list[tuple[Any, int]] = zero.local_gradients(parameters, self.options.stage)
        return shares

    def missing(self, parameters: list[Any], names: dict[Any, str]) -> list[str]:
        """None: gradients lie in partitions, which have a place for each parameter."""
        return []

    def scale(self, parameters: list[Any], factor: float) -> None:
        """Done by the optimizer, where the gradients are flat."""
        self.partitioned.inner.factor = factor

    def clear(self, parameters: list[Any]) -> None:
        self.partitioned.drop()

    def tensors(self, model: Any, optimizer: Any, names: dict[Any, str]) -> dict[str, Any]:
        """Copies: partitions are put together, parameter by parameter."""
        persistent = model.state_dict().keys()
        buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent}
        return {**zero.whole_tensors(optimizer, names, self.rows), **buffers}

    def adopt(self, tensors: dict[str, Any], model: Any, optimizer: Any, names: dict[Any, str]) -> None:
        zero.set_whole_tensors(optimizer, names, tensors, self.options.stage)

    def close(self) -> None:
        torch.nn.functional.linear = self.linear


def _library(device: Any) -> Any:
    """DeepSpeed, quiet, for this device, and without its own shared-memory collectives."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # They would be compiled at the start of every first run on a CPU (99 s on two cores), past torch's process group.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
