"""Polar factors by Newton-Schulz iterations: U V^T of X = U S V^T from matrix products alone.

Always on a batch (N, m, n), also for N = 1: 2-D and batched products differ in the last bits, batched ones do not
depend on N. That is what makes an update the same on any number of ranks.
"""

from __future__ import annotations

from typing import Any, Literal

from trainer.registry import lazy

torch: Any = lazy("torch")

Steps = tuple[tuple[float, float, float], ...]
Schedule = tuple[float, Steps]  # what the norm is multiplied by before the first step, and the steps

_SIMPLE = (3.4445, -4.7750, 2.0315)
_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Per step (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T, after X <- X / (safety * norm).
COEFFICIENTS: dict[str, Schedule] = {
    # Jordan et al., Muon: one triple, five times.
    "simple": (1.0, (_SIMPLE,) * 5),
    # You: a triple per step. The most exact of five steps on well-conditioned matrices.
    "quintic": (1.0, _QUINTIC),
    # Its last four steps: for the Schatten prescale, which makes up for the first.
    "quintic-4": (1.0, _QUINTIC[1:]),
    # Amsel et al., Polar Express (arXiv 2505.16932), safety 1.02, cushion 2.
    "polar-express": (
        1.02,
        (
            (8.15655, -22.48329, 15.87877),
            (4.04293, -2.80892, 0.50002),
            (3.89167, -2.77248, 0.50606),
            (3.28575, -2.36813, 0.46449),
            (2.34654, -1.70978, 0.42324),
        ),
    ),
    # The same in eight steps, as NVIDIA's Emerging-Optimizers tabulates it.
    "polar-express-8": (
        1.0,
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
    ),
    # Grishina et al., CANS (arXiv 2506.10935): Chebyshev-optimal steps.
    "cans": (
        1.0,
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
    ),
    # Eight fast steps and two exact ones: the most exact here, down to sigma_min / sigma_max of 1e-4.
    "8+2": (1.0, (_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2),
}

CoefficientName = Literal["polar-express", "polar-express-8", "quintic", "quintic-4", "cans", "simple", "8+2"]
Precision = Literal["auto", "fp16", "bf16", "fp32", "fp64"]
Form = Literal["standard", "gram"]
Prescale = Literal["frobenius", "schatten"]


def precision(name: str, device: Any) -> Any:
    """The dtype of the iterations. auto: fp16 on CUDA (8x more exact than bf16 at equal cost), else bf16 where the CPU
    multiplies it in hardware, else fp32."""
    if name != "auto":
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[name]
    if device.type == "cuda":
        return torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def transport(dtype: Any) -> Any:
    """The dtype in which matrices travel to be iterated in `dtype`: never fp16, whose range a gradient can leave."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def polar(
    x: Any, coefficients: str | Schedule = "polar-express", dtype: Any = None, form: Form = "standard",
    prescale: Prescale = "frobenius",
) -> Any:  # fmt: skip
    """Approximate polar factors of the matrices in `x`.

    Args:
        x: (N, m, n), any float dtype. Zero matrices give zeros.
        coefficients: a name in `COEFFICIENTS`, or a schedule like those.
        dtype: precision of the products; `precision("auto", x.device)` when None. Norms are taken in fp32 or wider.
        form: "standard" iterates X; "gram" iterates the s x s matrix X X^T (s the shorter side), always in fp32 or
            wider, with a restart after 2 steps and then every 3: fewer multiplications where the longer side is more
            than about twice the shorter.
        prescale: what X is divided by so that its largest singular value is at most 1: its Frobenius norm, or the
            tighter Schatten-4 norm ||X X^T||_F^(1/2), which the first product gives for free.

    Returns:
        (N, m, n) in `dtype`; invariant to the scale of `x`.

    Raises:
        ValueError: not a batch, or an unknown name.
    """
    if x.ndim != 3:
        raise ValueError(f"polar works on a batch (N, m, n), not on shape {tuple(x.shape)}; add a leading dimension")
    dtype = dtype or precision("auto", x.device)
    work = torch.promote_types(dtype, torch.float32) if form == "gram" else dtype
    safety, steps = schedule(coefficients)
    rows, columns = x.shape[-2:]
    tall = rows > columns
    x = normalize(aligned(x), safety, work)
    x = flipped(x) if tall else x  # (N, s, l)
    gram = x @ x.mT  # (N, s, s)
    if prescale == "schatten":
        root = (safety * squares(gram, -1).sum(dim=-2, keepdim=True).pow(0.25)).clamp_min(1e-12)  # (N, 1, 1)
        x, gram = scaled(x, 1 / root), scaled(gram, 1 / root.square())
    if form == "gram":
        x = _gram_factor(gram, steps[:2]) @ x
        for start in range(2, len(steps), 3):  # restarts: rounding in a Gram matrix grows with every step on it
            x = _gram_factor(x @ x.mT, steps[start : start + 3]) @ x
    else:
        for index, (a, b, c) in enumerate(steps):
            gram = x @ x.mT if index else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (flipped(x) if tall else x).to(dtype)[:, :rows, :columns]


POINTS = 2000  # of [0, 1] that a polynomial is looked at


def schedule(coefficients: str | Schedule) -> Schedule:
    """The schedule of a name, or the one given.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(coefficients, str):
        return coefficients
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"polar knows no coefficients '{coefficients}'; use one of {', '.join(COEFFICIENTS)}")
    return COEFFICIENTS[coefficients]


def aligned(x: Any) -> Any:
    """The matrices with zero rows and columns up to multiples of 8, which change nothing else of a polar factor: a
    product may depend, in its last bits, on where its operands start within 64 bytes, so all of a batch start alike."""
    rows, columns = x.shape[-2:]
    return torch.nn.functional.pad(x, (0, -columns % 8, 0, -rows % 8)) if rows % 8 or columns % 8 else x


def gram_polar(gram: Any, coefficients: str | Schedule = "polar-express") -> tuple[Any, Any]:
    """What to multiply X (..., l, r) by from the right for its polar factor, from X^T X alone.

    Args:
        gram: (N, r, r), float64: added up from shards of X where these lie on several ranks. Zeros give zeros.

    Returns:
        (N, r, r), and the squared Frobenius norms (N, 1, 1) of the polar factors.
    """
    safety, steps = schedule(coefficients)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]  # ||X||^2
    inverse = torch.where(trace > 0, 1 / (safety * safety * trace), trace)
    factor = _gram_factor(gram * inverse, steps) * inverse.sqrt()
    return factor, (factor @ gram @ factor).diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _gram_factor(gram: Any, steps: Steps) -> Any:
    """Q with Q X = the steps applied to X, from X X^T alone: Q <- (a I + b R + c R^2) Q, R the Gram matrix of Q X."""
    factor = None
    for a, b, c in steps:
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        z.diagonal(dim1=-2, dim2=-1).add_(a)
        gram = z @ gram @ z
        factor = z if factor is None else z @ factor
    return factor


def normalize(x: Any, safety: float, dtype: Any) -> Any:
    """`x` divided by `safety` times its Frobenius norm, in `dtype`; zeros stay zeros.

    First divided by the power of two below its largest entry, so that no square leaves the range of fp32: 1e-30 and
    1e30 are as good as 1.
    """
    y = x.to(wide(x), copy=True)
    _, exponent = torch.frexp(y.abs().amax(dim=(-2, -1), keepdim=True))
    y.mul_(torch.exp2(-exponent.to(y.dtype)))
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    return y.mul_(torch.where(norm > 0, 1 / (safety * norm), norm)).to(dtype)


def squares(o: Any, dim: int) -> Any:
    """Sums of squares along one dimension, kept with size 1; at least fp32."""
    return o.to(wide(o), copy=True).square_().sum(dim, keepdim=True)


def scaled(x: Any, factor: Any) -> Any:
    """`x` times a factor that broadcasts per matrix, row or column (N, ., .): in the factor's precision, then rounded to
    that of `x`."""
    return x.to(factor.dtype, copy=True).mul_(factor).to(x.dtype)


def scaled_or_zero(o: Any, factor: Any, bad: Any) -> Any:
    """`scaled`, with zeros for the matrices where `bad` (N, 1, 1); works on `o` in place."""
    finite = o.nan_to_num_(0.0, 0.0, 0.0)  # 0 x NaN is NaN; a fill by mask is three times slower on a CPU
    return scaled(finite, factor.masked_fill(bad, 0.0))


def flipped(x: Any) -> Any:
    """The transposes; on a CPU contiguous, one at a time: torch copies transposes fast in two dimensions only."""
    if x.is_cuda:
        return x.mT
    out = torch.empty(x.mT.shape, dtype=x.dtype)
    for matrix, target in zip(x, out, strict=True):
        target.copy_(matrix.mT)
    return out


def wide(x: Any) -> Any:
    """The dtype for sums over `x`: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def unsound(square: Any, shape: tuple[int, ...], most: float = 1.21) -> Any:
    """Which updates must not be applied, from the squared Frobenius norms of polar factors of (..., m, n): not finite,
    or further beyond the norm of an exact factor than rounding explains.

    There is no bound from below: a zero gradient, or one of low rank, has a polar factor as small as its rank.

    Args:
        most: the largest singular value that the coefficients make; no whole table overshoots 1.21.
    """
    return ~(square <= (1.16 * most) ** 2 * min(shape[-2:]))  # a comparison with NaN is False


def overshoot(coefficients: Schedule) -> float:
    """The largest singular value that the steps make of any matrix."""
    safety, steps = coefficients
    most = 0.0
    for i in range(1, POINTS + 1):
        s = i / POINTS / safety
        for a, b, c in steps:
            s = a * s + b * s**3 + c * s**5
        most = max(most, s)
    return most


def reference(x: Any, coefficients: str | Schedule = "polar-express", prescale: Prescale = "frobenius") -> Any:
    """What `polar` approximates, slow and plain: U f(S) V^T by SVD in float64."""
    safety, steps = schedule(coefficients)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (safety * s.square().sum(-1, keepdim=True).sqrt()).clamp_min(1e-300)
    if prescale == "schatten":
        s = s / (safety * s.pow(4).sum(-1, keepdim=True).pow(0.25)).clamp_min(1e-300)
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return u * s.unsqueeze(-2) @ v
