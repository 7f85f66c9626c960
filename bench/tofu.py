"""TOFU's numbers from per-item likelihoods and ROUGE: probability, truth ratio, model utility, forget quality.

Definitions are the paper's (Maini et al. 2024, arXiv 2401.06121, section 2.2); where its code, open-unlearning and the
paper differ, each variant has its name. Likelihoods are NLL per token in nats and stay in log space, so that a model
which collapsed has finite numbers too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from scipy.special import gammaln
from scipy.stats import ks_2samp

Variant = Literal["geometric", "arithmetic", "prob"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# Ratios that lie this close to 1 in every row come from a model that tells no answer from another.
_ALIKE = 0.01
# Nats per token that only a broken model needs: the log of a vocabulary larger than any (262,144).
_AT_RANDOM = math.log(2**18)
# Log-probability in nats of a token that is ruled out, so that everything stays a number.
FLOOR = -1e4
# exp() of more is not a float; a ratio that large says "never" in any case.
_MOST = 700.0


@dataclass(frozen=True)
class Items:
    """What was measured on one set; every list has one entry per row.

    nll         NLL/token of the true answer
    base_nll    of the paraphrased answer where there is one, else of the true one: what wrong answers are held against
    wrong_nll   of each wrong answer; an empty list where a row has none
    rouge       ROUGE-L recall of the generated answer, in 0..1; empty where nothing was generated
    Infinite losses count as -FLOOR.
    choices     the probability of an answer is its share among itself and the wrong ones (real authors, world facts)
    Raises ValueError for lists of unlike lengths, and for NaN (naming the item).
    """

    nll: list[float]
    base_nll: list[float]
    wrong_nll: list[list[float]]
    rouge: list[float]
    choices: bool = False

    def __post_init__(self) -> None:
        for name in ("nll", "base_nll"):
            object.__setattr__(self, name, [_bounded(value) for value in getattr(self, name)])
        object.__setattr__(self, "wrong_nll", [[_bounded(value) for value in wrong] for wrong in self.wrong_nll])
        lengths = {name: len(values) for name, values in asdict(self).items() if name != "choices"}
        if not self.rouge:
            del lengths["rouge"]
        if len(set(lengths.values())) != 1:
            raise ValueError(f"items: lists of unlike lengths: {lengths}")
        for i in range(len(self.nll)):
            values = [self.nll[i], self.base_nll[i], *self.wrong_nll[i], *self.rouge[i : i + 1]]
            if any(math.isnan(value) for value in values):
                raise ValueError(f"item {i}: a value is NaN; every likelihood and ROUGE must be a number")

    @property
    def probability(self) -> list[float]:
        """Of the true answer, in 0..1."""
        return [
            choice_probability(nll, wrong) if self.choices and wrong else math.exp(-nll)
            for nll, wrong in zip(self.nll, self.wrong_nll, strict=True)
        ]

    def truth_ratio(self, variant: Variant = "geometric") -> list[float]:
        """Of the rows that have wrong answers."""
        return [ratio for i in range(len(self.nll)) if (ratio := self.ratio(i, variant)) is not None]

    def ratio(self, item: int, variant: Variant = "geometric") -> float | None:
        """Truth ratio of one row; None where it has no wrong answers."""
        wrong = self.wrong_nll[item]
        return truth_ratio(self.base_nll[item], wrong, variant) if wrong else None


def _bounded(nll: float) -> float:
    """An infinite loss, as a collapsed model may have, as one beyond all others."""
    return -FLOOR if nll == math.inf else nll


def choice_probability(right: float, wrong: Sequence[float]) -> float:
    """P(right) / (P(right) + sum P(wrong)), P = exp(-NLL/token)."""
    return 1 / (1 + math.fsum(math.exp(min(_MOST, right - nll)) for nll in wrong))


def truth_ratio(base: float, wrong: Sequence[float], variant: Variant = "geometric") -> float:
    """How likely wrong answers are beside the right one, from NLL/token in nats.

    geometric    geometric mean of P(wrong) over P(right): TOFU's code since 2024-02-24, and open-unlearning
    arithmetic   mean P(wrong) over P(right): the paper, and TOFU's code before
    prob         P(right) / (P(right) + geometric mean of P(wrong)), in 0..1: open-unlearning's `prob_mean`
    open-unlearning adds 1e-10 to denominators, by which a collapsed model's ratio becomes 0; here it stays what it is.
    Raises ValueError without wrong answers, and for an unknown variant.
    """
    if not wrong:
        raise ValueError("wrong: none; a truth ratio needs at least one wrong answer")
    mean = math.fsum(wrong) / len(wrong)
    if variant == "geometric":
        return math.exp(min(_MOST, base - mean))
    if variant == "arithmetic":
        best = min(wrong)
        spread = math.log(math.fsum(math.exp(best - nll) for nll in wrong) / len(wrong))
        return math.exp(min(_MOST, base - best + spread))
    if variant == "prob":
        return 1 / (1 + math.exp(min(_MOST, base - mean)))
    raise ValueError(f"variant: {variant!r} is not one of {', '.join(VARIANTS)}")


def forget_truth_ratio(items: Items, variant: Variant = "geometric") -> float:
    """On a forget set: mean min(R, 1/R), 1 when right and wrong answers look alike; of `prob` the mean itself."""
    ratios = _some(items.truth_ratio(variant))
    return mean(ratios if variant == "prob" else [min(r, 1 / r) if r > 0 else 0.0 for r in ratios])


def utility_truth_ratio(items: Items, variant: Variant = "geometric") -> float:
    """On what is kept: mean max(0, 1 - R), 1 when wrong answers are never likely; of `prob` the mean itself."""
    ratios = _some(items.truth_ratio(variant))
    return mean(ratios if variant == "prob" else [max(0.0, 1 - r) for r in ratios])


def components(sets: Mapping[str, Items], variant: Variant = "geometric") -> dict[str, dict[str, float]]:
    """Probability, ROUGE-L recall and truth ratio of every set; of TOFU's three sets these are its nine numbers.

    A set without wrong answers has no truth ratio.
    """
    found = {}
    for name, items in sets.items():
        found[name] = {"probability": mean(items.probability), "rouge": mean(items.rouge)}
        if any(items.wrong_nll):
            found[name]["truth_ratio"] = utility_truth_ratio(items, variant)
    return found


def model_utility(sets: Mapping[str, Items], variant: Variant = "geometric") -> float:
    """Harmonic mean of all components; 0 when any of them is 0."""
    return harmonic_mean([value for parts in components(sets, variant).values() for value in parts.values()])


@dataclass(frozen=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test, two-sided, exact up to 10,000 rows (where scipy can), of the forget set's
    truth ratios against the oracle's. p close to 1: not to be told from the oracle.

    p       0 where no float is as small

    d       largest distance of the two distribution functions
    sign    of the shift: +1, wrong answers are likelier than under the oracle (over-forgetting also gives a tiny p);
            -1, less likely (the truth is still known); 0, no difference
    """

    p: float
    log10_p: float
    d: float
    sign: int


def forget_quality(ratios: Sequence[float], oracle: Sequence[float]) -> ForgetQuality:
    """TOFU's forget quality from truth ratios, geometric or arithmetic; ValueError for an empty list."""
    if not ratios or not oracle:
        raise ValueError("truth ratios: none; forget quality needs rows with wrong answers, of model and oracle")
    with warnings.catch_warnings():
        # Where the exact p cannot be computed scipy says so and takes the asymptotic one.
        warnings.simplefilter("ignore", RuntimeWarning)
        test = ks_2samp(ratios, oracle, method="auto")
    p, d = float(test.pvalue), float(test.statistic)
    # scipy's sign is that of F_model - F_oracle where they differ most: above means smaller values.
    sign = 0 if d == 0 else -int(test.statistic_sign)
    return ForgetQuality(p, math.log10(p) if p > 0 else _log10_p(d, len(ratios), len(oracle)), d, sign)


def _log10_p(d: float, n: int, m: int) -> float:
    """log10 of a p that no float holds, by its first term, which alone counts there: exact for samples of one size
    (2 C(2n, n - nd) / C(2n, n)) and for those that do not overlap; else asymptotic, an upper bound in effect."""
    if n == m or d == 1:
        apart = round(n * d) if n == m else n
        paths = gammaln(n + m + 1) - gammaln(n - apart + 1) - gammaln(m + apart + 1)
        return float(math.log(2) + paths - gammaln(n + m + 1) + gammaln(n + 1) + gammaln(m + 1)) / math.log(10)
    return (math.log(2) - 2 * d * d * n * m / (n + m)) / math.log(10)


def collapsed(items: Items) -> list[str]:
    """Signs that the model no longer models language, by which good-looking values mean nothing; often empty."""
    signs = []
    ratios = items.truth_ratio()
    if len(ratios) > 2 and all(abs(math.log(r)) < _ALIKE if r > 0 else False for r in ratios):
        signs.append("right and wrong answers are equally likely in every row, as under uniform output")
    if items.nll and mean(items.nll) > _AT_RANDOM:
        signs.append(f"true answers take {mean(items.nll):.3g} nats per token, more than at random")
    return signs


def summary(sets: Mapping[str, Items], forget: Items | None, oracle: Items | None) -> dict[str, Any]:
    """Every aggregate under every variant, as `remanence logs` prints them.

    sets      what model utility is made of
    forget, oracle    the forget set under the model and under the oracle; None where they are not known
    """
    ratios = [variant for variant in VARIANTS if all(any(items.wrong_nll) for items in sets.values())]
    named = {**sets, "forget": forget} if forget is not None else sets
    found: dict[str, Any] = {
        "flags": [f"{name}: {sign}" for name, items in named.items() for sign in collapsed(items)],
        "model_utility": {variant: model_utility(sets, variant) for variant in ratios} if sets else None,
        "components": {
            name: {**parts, "truth_ratio": {v: utility_truth_ratio(sets[name], v) for v in VARIANTS}}
            if "truth_ratio" in parts
            else parts
            for name, parts in components(sets).items()
        },
    }
    if forget is not None:
        found["forget"] = {
            "probability": mean(forget.probability),
            "rouge": mean(forget.rouge) if forget.rouge else None,
        }
        if any(forget.wrong_nll):
            found["forget"]["truth_ratio"] = {v: forget_truth_ratio(forget, v) for v in VARIANTS}
    if forget is not None and oracle is not None:
        found["forget_quality"] = asdict(forget_quality(forget.truth_ratio(), oracle.truth_ratio()))
    return found


def harmonic_mean(values: Sequence[float]) -> float:
    """0 when any value is 0; ValueError without values, or for a negative one."""
    if not values or min(values) < 0:
        raise ValueError(f"values: {list(values)}; a harmonic mean needs at least one, none below 0")
    return 0.0 if 0 in values else len(values) / math.fsum(1 / value for value in values)


def mean(values: Sequence[float]) -> float:
    """Correctly rounded; ValueError without values."""
    return math.fsum(_some(values)) / len(values)


def _some(values: Sequence[float]) -> Sequence[float]:
    if not len(values):
        raise ValueError("values: none; at least one is needed")
    return values
