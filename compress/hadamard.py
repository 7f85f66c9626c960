"""Orthogonal matrices that spread one large channel over all: randomized Hadamard for every size, and Haar random.

A Hadamard matrix has entries +-1 and orthogonal rows, so that H / sqrt(n) gives every input channel the same share in
every output channel. Random signs on its input (QuaRot, arXiv 2404.00456, section 3) keep that, and make it unlikely
that channels that are large together add up. Orders 2^k are Sylvester's; others are computed after Paley (1933) from
the quadratic residues of a finite field, or are products of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops

KINDS = ("hadamard", "orthogonal")


def orthogonal(n: int, kind: str, generator: torch.Generator, fixed_first: bool = False) -> Tensor:
    """[n, n] float64.

    hadamard     H diag(+-1) / sqrt(n), H of order n = 2^k m, m odd; where no construction here gives one (156), the
                 Kronecker product of the one of order 2^k with a random orthogonal matrix of size m
    orthogonal   random, uniform over all of them (Haar)
    fixed_first  random among those that leave the first vector of an orthogonal basis as it is, the constant one: so
                 the mean over channels stays, as LayerNorm needs it. See mean_preserving
    """
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    if n < 1 + fixed_first:
        raise ValueError(f"n: {n} is below {1 + fixed_first}")
    if fixed_first:
        return mean_preserving(orthogonal(n - 1, kind, generator))
    if kind == "orthogonal":
        return _haar(n, generator)
    return apply_hadamard(torch.eye(n, dtype=torch.float64), *randomized(n, generator)).T.contiguous()


def mean_preserving(R: Tensor) -> Tensor:
    """Q = H blockdiag(1, R) H^T, [n, n], from an orthogonal R [n-1, n-1]: Q 1 = 1 and Q^T 1 = 1.

    H is the reflection that takes the first unit vector to 1 / sqrt(n). Differentiable in R.
    """
    n = len(R) + 1
    v = torch.full((n,), -(n**-0.5), dtype=R.dtype, device=R.device)
    v[0] += 1
    v = v / v.norm()
    Q = torch.block_diag(torch.ones(1, 1, dtype=R.dtype, device=R.device), R)
    Q = Q - 2 * torch.outer(v, v @ Q)
    return Q - 2 * torch.outer(Q @ v, v)


def randomized(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(core [m, m] float64, signs [n] float64) of a randomized Hadamard matrix, as apply_hadamard takes them.

    core is orthogonal: a Hadamard matrix / sqrt(m), or a random one of odd size where none of order n is known here.
    """
    factors = _factors(n)
    if factors is None:
        m = n // (n & -n)  # the odd part
        core = _haar(m, generator)
    else:
        core = torch.ones(1, 1, dtype=torch.float64)
        for order in factors:
            if order > 2:
                core = torch.kron(core, _paley(order) * order**-0.5)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
    return core, signs.double()


def apply_hadamard(x: Tensor, core: Tensor, signs: Tensor) -> Tensor:
    """(H kron core) diag(signs) / sqrt(2^k) times the last dimension of x [..., 2^k m]; core [m, m], signs [2^k m].

    One matmul with the core and k additions per number, in float32 or wider; the result has the dtype of x.
    """
    m = len(core)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(wide) * signs.to(wide)).unflatten(-1, (-1, m)) @ core.to(wide).T  # [..., 2^k, m]
    return ops.hadamard(y.transpose(-1, -2)).transpose(-1, -2).flatten(-2).to(x.dtype)


class OnlineHadamard(nn.Module):
    """A randomized Hadamard matrix on the last dimension, while the model runs. core [m, m], signs [n], float32."""

    core: Tensor
    signs: Tensor

    def __init__(self, core: Tensor, signs: Tensor) -> None:
        super().__init__()
        self.register_buffer("core", core.float())
        self.register_buffer("signs", signs.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., n], in the dtype of x."""
        return apply_hadamard(x, self.core, self.signs)

    def _apply(self, *args: Any, **kwargs: Any) -> OnlineHadamard:
        """As for any module, but in float32 whatever the model is cast to."""
        core, signs = self.core, self.signs
        super()._apply(*args, **kwargs)
        if self.core.dtype != core.dtype:
            self.core, self.signs = core.to(self.core.device), signs.to(self.signs.device)
        return self

    def extra_repr(self) -> str:
        return f"{len(self.signs)}, core={len(self.core)}"


def hadamard(n: int) -> Tensor | None:
    """H [n, n] float64 of +-1 with H H^T = n I; None where no construction here gives one."""
    factors = _factors(n)
    if factors is None:
        return None
    H = torch.ones(1, 1, dtype=torch.float64)
    for order in factors:
        H = torch.kron(H, _SYLVESTER if order == 2 else _paley(order))
    return H


_SYLVESTER = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def _haar(n: int, generator: torch.Generator) -> Tensor:
    """QR of a Gaussian matrix is uniform only once the signs of R's diagonal are fixed (Mezzadri, math-ph/0609050)."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (Q * R.diagonal().sign()).contiguous()


def _factors(n: int) -> tuple[int, ...] | None:
    """n as a product of twos, as many as can be, and orders of Paley's matrices; None: it is none."""
    if n == 1:
        return ()
    if n < 1 or n % 2:
        return None
    half = _factors(n // 2)
    if half is not None:
        return 2, *half
    if _paley_field(n):
        return (n,)
    for order in range(12, n // 12 + 1, 4):
        if n % order == 0 and _paley_field(order):
            rest = _factors(n // order)
            if rest is not None:
                return *rest, order
    return None


def _paley_field(n: int) -> tuple[int, int] | None:
    """(p, e): the field of p^e elements that gives a Hadamard matrix of order n; e up to 3."""
    if n % 4:
        return None
    for q, rest in ((n - 1, 3), (n // 2 - 1, 1)):
        if q % 4 == rest:
            p = _least_factor(q)
            for e in (1, 2, 3):
                if q == p**e:
                    return p, e
    return None


def _least_factor(q: int) -> int:
    return next((p for p in range(3, int(q**0.5) + 1, 2) if q % p == 0), q)


def _paley(n: int) -> Tensor:
    """The Hadamard matrix [n, n] of Paley's first construction (q = n - 1 = 3 mod 4) or his second (q = n / 2 - 1 = 1
    mod 4)."""
    field = _paley_field(n)
    assert field is not None
    S = _residues(*field)
    q = len(S)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    C[0, 1:] = 1
    C[1:, 1:] = S
    if q % 4 == 3:
        C[1:, 0] = -1
        return C + torch.eye(n, dtype=torch.float64)
    C[1:, 0] = 1
    one = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(C, _SYLVESTER) + torch.kron(torch.eye(q + 1, dtype=torch.float64), one)


def _residues(p: int, e: int) -> Tensor:
    """S [q, q] float64, q = p^e: +1 where a - b is a square of the field, -1 where not, 0 on the diagonal.

    Elements are polynomials below degree e with coefficients modulo p; number a stands for its digits to the base p.
    """
    q = p**e
    powers = p ** torch.arange(e)
    digits = torch.arange(q)[:, None] // powers % p  # [q, e]
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(_squares(digits, p) * powers).sum(1)] = 1
    character[0] = 0
    differences = torch.zeros(q, q, dtype=torch.int64)
    for digit, power in zip(digits.T, powers):
        differences += (digit[:, None] - digit) % p * power
    return character[differences]


def _squares(digits: Tensor, p: int) -> Tensor:
    """The digits [q, e] of every element's square."""
    e = digits.shape[1]
    square = torch.zeros(len(digits), 2 * e - 1, dtype=torch.int64)
    for i in range(e):
        for j in range(e):
            square[:, i + j] += digits[:, i] * digits[:, j]
    if e == 1:
        return square % p
    a, b = _irreducible(p, e)
    for top in range(2 * e - 2, e - 1, -1):  # x^e = -a x - b
        square[:, top - e + 1] -= a * square[:, top]
        square[:, top - e] -= b * square[:, top]
        square %= p
    return square[:, :e] % p


def _irreducible(p: int, e: int) -> tuple[int, int]:
    """(a, b): x^e + a x + b has no root modulo p; of degree 2 or 3 it has then no factor either."""
    return next((a, b) for a in range(p) for b in range(1, p) if all((x**e + a * x + b) % p for x in range(p)))
