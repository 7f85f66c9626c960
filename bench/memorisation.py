"""How much of an answer is known by heart: extraction strength, exact memorisation, and a score over all such measures.

Extraction strength goes back to Carlini et al. 2021 (arXiv 2012.07805); it, exact memorisation and the score are used
as in open-unlearning (Dorna et al. 2025, arXiv 2506.12618). All are teacher-forced: each token is predicted from the
true ones before it.
"""

from __future__ import annotations

from torch import Tensor

from .tofu import harmonic_mean
from .tokens import Answer


def extraction_strength(answer: Answer, with_end: bool = True) -> float:
    """1 - k/n, where from token k of n on every greedy prediction is right: the share of the answer that need not be
    given for the rest to come out. In 0..1; 0 where the last token is wrong (k = n).

    with_end    see `exact_memorisation`. Without it this is open-unlearning's value, but for an answer whose last
                token is wrong: there it is 1/n (its k ends at n - 1), as if that token were right.
    Raises ValueError for an answer without tokens.
    """
    greedy = _greedy(answer, with_end)
    wrong = (~greedy).nonzero()
    k = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1 - k / len(greedy)


def exact_memorisation(answer: Answer, with_end: bool = True) -> float:
    """Share of the answer's tokens that are predicted greedily, in 0..1.

    with_end    count the last supervised token. That is the end of sequence in answers to questions, where False asks
                for the words alone; in running text it is a token like the others, and open-unlearning, which always
                drops it, leaves out a real one.
    Raises ValueError for an answer without tokens.
    """
    return float(_greedy(answer, with_end).double().mean())


def _greedy(answer: Answer, with_end: bool) -> Tensor:
    """[n] bool."""
    greedy = answer.greedy if with_end else answer.greedy[:-1]
    if not len(greedy):
        without = "" if with_end else " before its end of sequence"
        raise ValueError(f"answer: no tokens{without}; memorisation is a share of tokens, at least one is needed")
    return greedy


def memorisation_score(
    extraction_strength: float, exact_memorisation: float, paraphrase_probability: float, truth_ratio: float
) -> float:
    """Harmonic mean of 1 - each (2506.12618), in 0..1: 1, nothing is left; 0, one of them sees all of it.

    All four are means over the forget set, in 0..1 and higher for more knowledge: `paraphrase_probability` of the
    paraphrased answers, `truth_ratio` the variant `prob`. Raises ValueError naming what lies outside.
    """
    parts = {
        "extraction_strength": extraction_strength,
        "exact_memorisation": exact_memorisation,
        "paraphrase_probability": paraphrase_probability,
        "truth_ratio": truth_ratio,
    }
    for name, value in parts.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: {value} is not in 0..1")
    return harmonic_mean([1 - value for value in parts.values()])
