"""What a model's training takes, from its configuration alone: shapes of parameters and of optimizer state on the meta
device, and the bytes that a forward keeps for its backward.

The latter are counted, not estimated: forward and backward run on tensors without storage (torch's fake tensors), with
the same checkpointing, loss and precision as in training, and every storage that lives is counted. Attention is the
fused kernel's. What a compiler would save is not known here.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.masking_utils as masking
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.config import RunConfig
from trainer.model import chunked, pretrained
from trainer.model.activations import checkpointed
from trainer.model.build import architecture, blocks, build
from trainer.model.flops import flops_per_token
from trainer.model.loss import cross_entropy, model_inputs
from trainer.optim import decay, root_tables
from trainer.optim.groups import parameter_groups, refused
from trainer.optim.low_rank import cut_of
from trainer.optim.polar import COEFFICIENTS
from trainer.optim.sharded import orthogonalizes, rule_of


def footprint(config: RunConfig) -> dict[str, Any]:
    """The record that `orthogon plan` works on, as JSON values.

    `parameters`: name, shape, label (matrices, embeddings, vectors), rule, unit (the block it belongs to, -1 for the
    rest), whole (whether its rule asks for whole matrices), cut (of a low-rank rule: whether it is compressed along its rows,
    and to how many columns; else None), sums (float64 numbers that are added up over its shards), transposed, blocks (rows
    of fused pieces), and `state`: [shape, bytes of an entry] by key, as stored. `polar_steps`: Newton-Schulz steps of a
    rule of whole matrices.
    `activations`: bytes that live after a forward (`kept`) and at most until the backward's end (`peak`), each as
    [fixed, per sequence of a micro-step]; None where they cannot be counted, and `why`.
    """
    vocabulary, bos, eos = special_tokens(config)
    source = pretrained.find(config.model.init_from) if config.model.init_from is not None else None
    shape = architecture(
        config.model, vocab_size=vocabulary, bos=bos, eos=eos, max_length=config.data.sequence_length,
        below=source.architecture() if source is not None else None,
    )  # fmt: skip
    model: Any = build(shape)
    kept, why = activations(config, shape)
    persistent = model.state_dict().keys()
    return {
        "model_type": shape.model_type,
        "vocabulary": shape.vocab_size,
        "parameters": parameters(model, decay.settled(config.optim, math.inf)),  # how fast takes no memory
        "buffers": sum(b.nbytes for name, b in model.named_buffers() if name in persistent),
        "units": len(blocks(model)),
        "polar_steps": polar_steps(config.optim),
        "flops_per_token": flops_per_token(model, config.data.sequence_length),
        "activations": kept,
        "why": why,
    }


def polar_steps(options: Any) -> int:
    """Newton-Schulz steps on whole matrices."""
    if not hasattr(options, "polar_dtype"):
        return 0
    if options.polar in COEFFICIENTS:
        return int(getattr(options, "steps", len(COEFFICIENTS[options.polar][1])))
    return root_tables.STEPS


def special_tokens(config: RunConfig) -> tuple[int, int | None, int | None]:
    """(size of the vocabulary, beginning, end) of the run's tokenizer; a BPE that is yet to be trained has them first."""
    path = config.data.tokenizer.path
    sources = config.data.mixture.values() or [config.data]
    table = next((source.table for source in sources if source.table is not None), None)
    folder = Path(path) if path is not None else Path(table) / "tokenizer" if table is not None else None
    if folder is None:
        return config.data.tokenizer.vocab_size, 0, 1
    from trainer.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id


def parameters(model: Any, options: Any) -> list[dict[str, Any]]:
    """Every parameter once, in the order of the model's modules, with its optimizer state."""
    unit = {parameter: index for index, block in enumerate(blocks(model)) for parameter in block.parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(model, options):
        rule, transposed = rule_of(group["rule"]), bool(group.get("transposed"))

        def turned(tensor: Tensor, transposed: bool = transposed) -> Tensor:
            return tensor.mT if transposed and tensor.ndim > 1 else tensor

        for name, parameter in group["params"]:
            logical = turned(parameter)
            try:
                state = rule.init_state(logical, group)
            except ValueError as error:
                raise refused(ValueError(f"{name}: {error}")) from None
            found[name] = {
                "name": name,
                "shape": list(parameter.shape),
                "label": group["label"],
                "rule": group["rule"],
                "unit": unit.get(parameter, -1),
                "whole": orthogonalizes(rule) and hasattr(options, "polar_dtype"),
                "cut": cut(logical.shape, group) if "rank" in group else None,
                "sums": rule.reduced(logical.shape, group) if hasattr(rule, "reduced") and logical.ndim == 2 else 0,
                "transposed": transposed,
                "blocks": list(group.get("blocks", ())),
                "state": {key: [list(turned(value).shape), value.itemsize] for key, value in state.items()},
            }
    return [found[name] for name, _ in model.named_parameters() if name in found]


def cut(shape: Any, group: dict[str, Any]) -> list[int]:
    """[whether the rows are the short side, columns of the factor] of a low-rank rule."""
    found = cut_of(shape, group)
    return [int(found.turned), found.width]


def activations(config: RunConfig, shape: Any) -> tuple[dict[str, list[int]] | None, str]:
    """Bytes that live in a micro-step beside weights and gradients, from one and from two sequences."""
    try:
        one, two = (lived(config, shape, rows) for rows in (1, 2))
    except Exception as error:  # operations that have no fake form, or whose shapes depend on values
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return {key: [2 * a - b, b - a] for key, a, b in zip(("kept", "peak"), one, two, strict=True)}, ""


def lived(config: RunConfig, shape: Any, rows: int) -> tuple[int, int]:
    """(bytes alive after a forward of `rows` sequences, most bytes alive until the end of its backward)."""
    train, model = config.train, build(shape)
    half = train.precision == "bf16"
    cast = half and config.parallel.name == "fsdp2"  # which gathers weights in bf16; the others cast by autocast
    with FakeTensorMode(), _unpacked(not config.data.document_masking):
        _give_fake_storage(model, torch.bfloat16 if cast else torch.float32)
        model.train()
        if train.activation_checkpointing != "none":
            for block in blocks(model):
                block.forward = checkpointed(block.forward, train.activation_checkpointing)  # type: ignore[method-assign]
        if train.loss_chunk is not None:
            chunked.install(model, train.loss_chunk)
        tokens = torch.zeros(rows, config.data.sequence_length, dtype=torch.long)
        positions = torch.arange(config.data.sequence_length).expand(rows, -1) if config.data.document_masking else None
        count = Living()
        with count:
            with torch.autocast("cpu", torch.bfloat16, enabled=half and not cast):
                if train.loss_chunk is None:
                    loss = cross_entropy(model(**model_inputs(tokens, positions)).logits, tokens)
                else:
                    loss, _ = model(**model_inputs(tokens, positions), targets=tokens)
            kept = count.live
            loss.backward()
        del loss, model
    gc.collect()
    return kept, count.peak


def _give_fake_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake tensors in place of parameters (tied ones stay tied) and buffers; gradients vanish as soon as they are there."""
    made: dict[Tensor, nn.Parameter] = {}

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype))
                made[parameter].register_post_accumulate_grad_hook(drop)
            module._parameters[name] = made[parameter]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _unpacked(whole: bool) -> Iterator[None]:
    """Let transformers take rows for what they are, one document each: on fake tensors it cannot look, and would make a
    mask of (L, L) that training does not have."""
    name = "find_packed_sequence_indices"
    before = getattr(masking, name, None)
    if before is None or not whole:
        yield
        return
    setattr(masking, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking, name, before)


class Living(TorchDispatchMode):
    """Within it: `live` and `peak` bytes of the storages that were made since."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
