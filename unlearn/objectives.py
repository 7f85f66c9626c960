"""From losses to what a run minimizes: each method of the catalog as terms over the forget, retain and refusal sets.

A builder gets a Run, at the start model, and takes from it what it needs of that model before training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compress.recipe import parse_recipe
from . import losses
from .catalog import MethodConfig
from .encode import IGNORE, Batch
from .experts import affinity, anchor_loss, blocks, expert_mask, most_engaged, router_logits
from .feed import Feed, Rows, supervised_tokens
from .layers import decoder_layers, device_of, forward, hidden_after
from .masks import Mask, apply_to_gradients_, outside, restore_
from .reference import Stored, reference_nll, supervised_logits, visited
from .robust import fake_quantized, logit_margin
from .train import Objective, Term

Batches = Mapping[str, Batch]


def build(name: str, run: Run) -> Objective:
    """The objective called `name`, with what the settings add to any: SAM's radius, rounding in the loop."""
    objective = OBJECTIVES[name](run)
    objective.ascent_radius = run.config.rho
    if run.config.through:
        objective.terms = [term if term.data == "retain" else run.rounded(term) for term in objective.terms]
    return objective


@dataclass
class Run:
    """What an objective is built from.

    model    the start model; network: the same as the trainer runs it (wrapped or split)
    feed     sets "forget", "retain" and, where the method needs it, "idk" (a refusal to each forget question)
    """

    model: PreTrainedModel
    network: nn.Module
    feed: Feed
    config: MethodConfig
    seed: int

    def logits(self, batch: Batch) -> Tensor:
        return forward(self.network, batch)

    def reference_nll(self, name: str) -> Tensor:
        """Summed NLL of every row under the start model, [rows]."""
        return reference_nll(self.network, self.feed, name, self.pass_size())

    def reference_logits(self, name: str) -> Stored:
        """The start model's logits for the supervised tokens of the rows that this run visits."""
        rows = visited(self.feed, name, self.config.steps)
        return Stored(self.network, self.feed, name, rows, "tokens", supervised_logits, self.pass_size())

    def batches(self, name: str) -> Iterator[Batch]:
        """All rows of a set, in order."""
        rows, size = range(len(self.feed.encoded[name])), self.pass_size()
        for start in rows[::size]:
            yield self.feed.batch(name, rows[start : start + size], device_of(self.network))

    def hold(self, objective: Objective, mask: Mask) -> None:
        """Let nothing outside `mask` move, to the bit."""
        objective.before_update.append(lambda: apply_to_gradients_(self.model, mask))
        if self.config.weight_decay:
            start = outside(self.model, mask)
            objective.after_update.append(lambda _: restore_(self.model, start, mask))

    def pass_size(self) -> int:
        """Rows of a set that go through the model at once."""
        return self.config.micro_batch or self.config.forget_batch

    def rounded(self, term: Term) -> Term:
        """`term` of the model as `against` would quantize it; gradients go straight through."""
        recipe = parse_recipe(self.config.against)

        def loss(batches: Batches) -> Tensor:
            with fake_quantized(self.model, recipe):
                return term.loss(batches)

        return replace(term, loss=loss)

    def retain_terms(self) -> list[Term]:
        """The retain term that the settings ask for: at most one."""
        c = self.config
        if c.retain_loss == "none":
            return []
        if c.retain_loss == "nll":
            return [Term("retain", self.retain_nll, "retain", "tokens", c.alpha)]
        reference = self.reference_logits("retain")

        def loss(batches: Batches) -> Tensor:
            batch = batches["retain"]
            return losses.kl(reference.of(batch).float().log_softmax(1), self.logits(batch), batch.labels)

        return [Term("retain", loss, "retain", "tokens", c.alpha)]

    def retain_nll(self, batches: Batches) -> Tensor:
        return losses.nll(self.logits(batches["retain"]), batches["retain"].labels)

    def forget_term(self, loss: Callable[[Batches], Tensor], unit: object = "tokens", data: str = "forget") -> Term:
        return Term("forget", loss, data, unit, self.config.gamma)  # type: ignore[arg-type]


def _per_token(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Run], Objective]:
    """An objective whose forget term is a token mean of logits and labels alone."""

    def built(run: Run) -> Objective:
        def forget(batches: Batches) -> Tensor:
            return loss(run.logits(batches["forget"]), batches["forget"].labels)

        return Objective([run.forget_term(forget), *run.retain_terms()])

    return built


def _wga(run: Run) -> Objective:
    return _per_token(partial(losses.wga, beta=run.config.beta))(run)


def _satimp(run: Run) -> Objective:
    return _per_token(partial(losses.satimp, beta1=run.config.beta, beta2=run.config.beta2))(run)


def _ceu(run: Run) -> Objective:
    skip = run.config.skip

    def forget(batches: Batches) -> Tensor:
        return losses.ceu(run.logits(batches["forget"]), batches["forget"].labels, skip)

    def unit(labels: list[int]) -> int:
        return max(0, supervised_tokens(labels) - skip)

    return Objective([run.forget_term(forget, unit), *run.retain_terms()])


def _npo(run: Run) -> Objective:
    reference = run.reference_nll("forget")

    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        total, _ = losses.answer_nll(run.logits(batch), batch.labels)
        return losses.npo(total, reference[list(batch.rows)], run.config.beta)

    return Objective([run.forget_term(forget, "answers"), *run.retain_terms()])


def _quail(run: Run) -> Objective:
    """NPO with a hinge that is flat once a logit has moved by half a quantization step of the start model's."""
    reference = run.reference_logits("forget")
    margin = logit_margin(run.model, run.batches("forget"), parse_recipe(run.config.against))
    objective = _npo(run)

    def hinge(batches: Batches) -> Tensor:
        batch = batches["forget"]
        return losses.quail(run.logits(batch), reference.of(batch), batch.labels, margin)

    objective.terms = [*objective.terms, Term("margin", hinge, "forget", "tokens", run.config.hinge / margin)]
    return objective


def _uoe(run: Run) -> Objective:
    """NPO on the expert that the forget set uses most, with its router anchored to it."""
    block, chosen = most_engaged(affinity(run.model, run.batches("forget")), run.config.experts)
    top_k = next(entry.top_k for entry in blocks(run.model) if entry.name == block)

    def anchor(batches: Batches) -> Tensor:
        batch = batches["forget"]
        with router_logits(run.model) as seen:
            run.logits(batch)
        return anchor_loss(seen[block], batch.attention_mask, chosen, top_k)

    objective = _npo(run)
    objective.terms = [*objective.terms, Term("anchor", anchor, "forget", "positions")]
    run.hold(objective, expert_mask(run.model, block, chosen))
    return objective


def _simnpo(run: Run) -> Objective:
    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        total, tokens = losses.answer_nll(run.logits(batch), batch.labels)
        return losses.simnpo(total, tokens, run.config.beta, run.config.delta)

    return Objective([run.forget_term(forget, "answers"), *run.retain_terms()])


def _dpo(run: Run) -> Objective:
    ref_lost, ref_won = run.reference_nll("forget"), run.reference_nll("idk")

    def forget(batches: Batches) -> Tensor:
        lost, won = batches["forget"], batches["idk"]
        lost_nll, _ = losses.answer_nll(run.logits(lost), lost.labels)
        won_nll, _ = losses.answer_nll(run.logits(won), won.labels)
        rows = list(lost.rows)
        return losses.dpo(won_nll, lost_nll, ref_won[rows], ref_lost[rows], run.config.beta)

    return Objective([run.forget_term(forget, "answers"), *run.retain_terms()])


def _idk(run: Run) -> Objective:
    def refuse(batches: Batches) -> Tensor:
        return losses.nll(run.logits(batches["idk"]), batches["idk"].labels)

    return Objective([run.forget_term(refuse, data="idk"), *run.retain_terms()])


def _kto(run: Run) -> Objective:
    ref_forget, ref_idk = run.reference_nll("forget"), run.reference_nll("idk")
    estimate = torch.zeros((), device=device_of(run.network))

    def begin(rows: Rows) -> None:
        """KL over the whole update's refusals, on every process: it is one number, whatever the split."""
        chosen, size = rows["idk"], run.pass_size()
        totals = []
        mode = run.network.training
        run.network.eval()  # dropout would differ from process to process
        with torch.no_grad():
            for start in range(0, len(chosen), size):
                batch = run.feed.batch("idk", chosen[start : start + size], estimate.device)
                totals.append(losses.answer_nll(run.logits(batch), batch.labels)[0])
        run.network.train(mode)
        estimate.copy_(losses.kto_kl(torch.cat(totals), ref_idk[chosen]))

    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        total, _ = losses.answer_nll(run.logits(batch), batch.labels)
        return losses.kto(total, ref_forget[list(batch.rows)], estimate, run.config.beta)

    return Objective([run.forget_term(forget, "answers"), *run.retain_terms()], begin_update=[begin])


def _undial(run: Run) -> Objective:
    reference = run.reference_logits("forget")

    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        return losses.undial(run.logits(batch), batch.labels, reference.of(batch), run.config.beta)

    return Objective([run.forget_term(forget), *run.retain_terms()])


def _pdu(run: Run) -> Objective:
    c, state = run.config, {"lambda": 1.0, "updates": 0.0}

    def forget(batches: Batches) -> Tensor:
        return losses.pdu_forget(run.logits(batches["forget"]), batches["forget"].labels)

    def dual(means: dict[str, float]) -> None:
        state["updates"] += 1
        if state["updates"] > c.dual_warmup:
            state["lambda"] = losses.pdu_dual(state["lambda"], means["retain"], c.eps, c.eta)

    retain = Term("retain", run.retain_nll, "retain", "tokens", lambda: state["lambda"])
    return Objective([run.forget_term(forget), retain], after_update=[dual], state=state)


def _flat(divergence: str) -> Callable[[Run], Objective]:
    def built(run: Run) -> Objective:
        def forget(batches: Batches) -> Tensor:
            template, answer = (
                losses.answer_probability(run.logits(batch), batch.labels)
                for batch in (batches["idk"], batches["forget"])
            )
            return losses.flat(template, answer, divergence)

        return Objective([run.forget_term(forget, "answers"), *run.retain_terms()])

    return built


def _jensun(run: Run) -> Objective:
    c, reference = run.config, run.reference_logits("retain")

    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        return losses.js_to_labels(run.logits(batch), refusing(batch, batches["idk"]))

    def retain(batches: Batches) -> Tensor:
        batch = batches["retain"]
        return losses.js(reference.of(batch).float().log_softmax(1), run.logits(batch), batch.labels)

    return Objective([run.forget_term(forget), Term("retain", retain, "retain", "tokens", c.alpha)])


def refusing(forget: Batch, idk: Batch) -> Tensor:
    """The forget batch's labels [B, T] with every answer's tokens replaced by its refusal's, over and over."""
    labels = forget.labels.clone()
    for row, (asked, refusal) in enumerate(zip(forget.labels, idk.labels, strict=True)):
        places = (asked != IGNORE).nonzero()[:, 0]
        tokens = refusal[refusal != IGNORE]
        labels[row, places] = tokens.repeat(-(-len(places) // len(tokens)))[: len(places)]
    return labels


def _rmu(run: Run) -> Objective:
    c = run.config
    layer = rmu_layer(run.model, c.layer)
    width = run.model.config.get_text_config().hidden_size
    direction = losses.rmu_direction(width, torch.Generator().manual_seed(run.seed))
    direction = c.coefficient * direction.to(device_of(run.network))

    def hidden(network: nn.Module, batch: Batch) -> Tensor:
        return hidden_after(network, layer, batch)[batch.attention_mask.bool()]  # [positions, d]

    rows = visited(run.feed, "retain", c.steps)
    reference = Stored(run.network, run.feed, "retain", rows, "positions", hidden, run.pass_size())

    def forget(batches: Batches) -> Tensor:
        batch = batches["forget"]
        return losses.rmu(hidden_after(run.network, layer, batch), direction, batch.attention_mask)

    def retain(batches: Batches) -> Tensor:
        batch = batches["retain"]
        now = hidden(run.network, batch)[None]
        return losses.rmu_retain(now, reference.of(batch)[None], torch.ones(now.shape[:2], device=now.device))

    return Objective([run.forget_term(forget, "positions"), Term("retain", retain, "retain", "positions", c.alpha)])


def rmu_layer(model: PreTrainedModel, layer: int) -> int:
    """The layer whose output RMU steers: as asked; -1 is number 7, the paper's of 32, or a shallower model's middle.

    Raises ValueError when the model has no such layer.
    """
    count = len(decoder_layers(model))
    if layer == -1:
        return min(7, count // 2)
    if not 0 <= layer < count:
        raise ValueError(f"layer: {layer} is not one of the model's {count} decoder layers (from 0)")
    return layer


def _fine_tuning(run: Run) -> Objective:
    """The forget set learned better still: what a task vector is the difference of."""

    def learn(batches: Batches) -> Tensor:
        return losses.nll(run.logits(batches["forget"]), batches["forget"].labels)

    return Objective([run.forget_term(learn)])


OBJECTIVES: dict[str, Callable[[Run], Objective]] = {
    "ga": _per_token(losses.ga),
    "npo": _npo,
    "bucketed": _npo,
    "quail": _quail,
    "uoe": _uoe,
    "simnpo": _simnpo,
    "dpo": _dpo,
    "idk": _idk,
    "kto": _kto,
    "rmu": _rmu,
    "undial": _undial,
    "wga": _wga,
    "satimp": _satimp,
    "ceu": _ceu,
    "pdu": _pdu,
    "flat-kl": _flat("kl"),
    "flat-tv": _flat("tv"),
    "flat-js": _flat("js"),
    "flat-pearson": _flat("pearson"),
    "ihl": _per_token(losses.ihl),
    "jensun": _jensun,
    "task-vector": _fine_tuning,
}
