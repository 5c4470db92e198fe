"""What a compression left out, kept for the next step: in fp32, or in 8 or 4 bits with a range per row."""

from __future__ import annotations

from typing import Any, Literal

from trainer.registry import lazy

torch: Any = lazy("torch")

Feedback = Literal["none", "fp32", "8-bit", "4-bit"]


def width(size: int, form: Feedback) -> int:
    """Entries that a row of `size` values takes."""
    return -(-size // 2) if form == "4-bit" else size


def encode(values: Any, form: Feedback) -> tuple[Any, Any]:
    """Rows (..., l, s) as codes (..., l, width) uint8 and their ranges (..., l, 2): the least value and the step.

    Codes are round((x - least) / step), 0 to 255, or 0 to 15 with entry 2k in the low half of byte k and entry 2k + 1 in
    the high one. A constant row has step 0, and is exact.
    """
    levels = 255 if form == "8-bit" else 15
    least, most = values.aminmax(dim=-1, keepdim=True) if values.numel() else (values[..., :1], values[..., :1])
    step = (most - least) / levels
    codes = ((values - least) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, levels).to(torch.uint8)
    if form == "4-bit":
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., 1::2] * 16 + codes[..., ::2]
    return codes, torch.cat([least, step], -1)


def decode(codes: Any, ranges: Any, size: int, form: Feedback) -> Any:
    """The rows (..., l, size) of codes and ranges, in the ranges' dtype."""
    if form == "4-bit":
        codes = torch.stack([codes % 16, codes // 16], -1).flatten(-2)[..., :size]
    return ranges[..., 1:] * codes.to(ranges.dtype) + ranges[..., :1]
