"""Every unlearning loss, written once, as its paper defines it. Pure functions with the reduction spelled out.

Symbols: l(y|x) is the summed negative log-likelihood of an answer in nats, |y| its supervised tokens (end included),
theta the model being trained, ref the frozen model that unlearning started from.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .encode import IGNORE


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL and number of supervised tokens per answer.

    logits [B, T, V], labels [B, T] (IGNORE where unsupervised) -> nll [B] float32, tokens [B].
    Position t predicts label t + 1.
    """
    shifted = labels[:, 1:]
    per_token = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), shifted, ignore_index=IGNORE, reduction="none")
    return per_token.sum(1), (shifted != IGNORE).sum(1)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Token-mean NLL over the batch: long answers weigh more, as in ordinary fine-tuning."""
    total, tokens = answer_nll(logits, labels)
    return total.sum() / tokens.sum()


def grad_diff(forget_nll: Tensor, retain_nll: Tensor, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """GradDiff (Liu et al. 2022; TOFU, arXiv 2401.06121): -gamma NLL_f + alpha NLL_r, both token means."""
    return -gamma * forget_nll + alpha * retain_nll


def npo(total_nll: Tensor, ref_nll: Tensor, beta: float = 0.1) -> Tensor:
    """NPO (Zhang et al. 2024, arXiv 2404.05868, eq. 3): -(2/beta) mean log sigmoid(beta (l_theta - l_ref)).

    total_nll, ref_nll [B]: *summed* over an answer's tokens; the mean is over answers. beta -> 0: gradient ascent.
    """
    return -(2 / beta) * F.logsigmoid(beta * (total_nll - ref_nll)).mean()
