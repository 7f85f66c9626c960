"""From the start model to the unlearned one: `unlearn` is the way in, catalog.METHODS says what there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ..compress.checkpoint import write_model
from ..compress.files import write_json
from ..compress.recipe import parse_recipe
from . import adapters, masks
from .bucketed import freeze_to_buckets, mean_width
from .catalog import Method, MethodConfig, method_named, needs_retain, settings
from .data import QA, spread
from .encode import Encoder
from .feed import Feed
from .inference.builders import BUILDERS
from .inference.guarded import Guard, Guarded
from .inference.store import save
from .keeper import Keeper, Saving
from .layers import decoder_layers, device_of, down_weights
from .likelihood import mean_probability
from .objectives import Run, build, rmu_layer
from .reference import visited
from .refusals import REFUSALS, refusals_for
from .robust import apply_floor_
from .rocr import redirect_
from .task_vector import negate_
from .train import Diverged, Guards, Objective, Progress, Schedule, Term, fit, whole_gradient
from .workers import Workers, whole_state

RECORD = "unlearning.json"

# Rows of each set that probabilities are looked at on, while a run lasts.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Setup:
    """How a run is carried out, whatever its method.

    workers    the processes; None: this one, where the model is
    saving     log and checkpoints; None: neither
    refusals   lines that the methods which need refusals draw from
    dense      loads the model anew, not quantized, for an adapter trained on a quantized base (QLoRA)
    guard      settings of an inference-time method, as its builder takes them
    """

    workers: Workers | None = None
    saving: Saving | None = None
    refusals: Sequence[str] = REFUSALS
    guard: Mapping[str, Any] = field(default_factory=dict)
    dense: Callable[[], PreTrainedModel] | None = None


@dataclass
class Unlearned:
    """What `unlearn` gives back.

    model    unlearned, where it was trained; only the first process has it when it was split over several
    guard    what goes around `model` when it answers, for the methods that change no weight
    adapted  the model with its LoRA adapter, where the two are to stay apart
    record   what goes into unlearning.json: method, settings, steps, the share of weights that a mask let move,
             probabilities before and after
    """

    model: PreTrainedModel
    guard: Guard | None
    adapted: nn.Module | None
    record: dict[str, Any]

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write an ordinary checkpoint (or base/ and adapter/, where they stay apart) into an existing empty directory,
        with guard and record beside it."""
        if self.adapted is not None:
            adapters.save_unmerged(self.adapted, tokenizer, directory)
        else:
            write_model(self.model, tokenizer, directory)
        if self.guard is not None:
            save(self.guard, directory)
        write_json(directory / RECORD, self.record)


def unlearn(
    model: PreTrainedModel,
    encoder: Encoder,
    forget: tuple[QA, ...],
    retain: tuple[QA, ...],
    method: str,
    config: MethodConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    setup: Setup | None = None,
) -> Unlearned:
    """Unlearn `forget` from `model`, in place, keeping `retain`. Same seed, same result.

    Raises ValueError for an unknown method, a setting that does not fit the model, or missing rows; Diverged when a
    guard stops the run.
    """
    entry, config, setup = method_named(method), config or settings(method), setup or Setup()
    for name in ["forget", "retain"] if needs_retain(method, config) else ["forget"]:
        if not {"forget": forget, "retain": retain}[name]:
            raise ValueError(f"{name}: no rows; {method} needs at least one")
    if config.quantized_base and (setup.dense is None or not getattr(model, "is_quantized", False)):
        raise ValueError("quantized_base: expected a model from load_nf4, and Setup.dense to load it dense")
    workers = setup.workers or Workers(device=str(device_of(model)))
    rows = {"forget": encoder.windows(forget), "retain": encoder.windows(retain)}
    job = _Job(model, encoder, rows, entry, config, workers, setup, seed)
    start = time.perf_counter()
    done = job.run(progress)
    record = {
        "method": method,
        "paper": entry.paper,
        "settings": asdict(config) if job.guard is None else {"guard": job.guard.kind, **asdict(job.guard.config)},
        "seed": seed,
        "steps_done": done,
        "mask_share": job.mask_share,
        "processes": workers.world,
        "parallel": workers.parallel if workers.world > 1 else "none",
        "before": job.before,
        "after": job.after,
        "seconds": time.perf_counter() - start,
    }
    return Unlearned(job.model, job.guard, job.adapted, record)


@dataclass
class _Job:
    """One unlearning in progress. model: a PreTrainedModel, whose `to` has a type that says something else."""

    model: Any
    encoder: Encoder
    rows: dict[str, tuple[QA, ...]]
    entry: Method
    config: MethodConfig
    workers: Workers
    setup: Setup
    seed: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    guard: Guard | None = None
    adapted: nn.Module | None = None
    mask_share: float | None = None
    zeros: masks.Zeros | None = None

    def run(self, progress: Progress | None) -> int:
        """Carry it out; returns the number of updates."""
        torch.manual_seed(self.seed)
        # FSDP moves a model part by part, as it may be too large for a device; a quantized one is where it was loaded.
        if self.workers.parallel != "fsdp" and not self.config.quantized_base:
            self.model.to(self.workers.device)
        if self.config.keep_zeros:
            self.zeros = masks.Zeros(self.model)
        if self.entry.kind == "training":
            return self._trained(progress)
        if self.workers.world > 1 or self.workers.parallel == "fsdp":
            raise ValueError("parallel: several processes are for methods that train the model; run this one in one")
        if self.entry.objective in ("rocr", "eco", "filter") and not all(row.question for row in self.rows["forget"]):
            raise ValueError(f"forget: has rows of text without a question, which {self.entry.title} needs")
        self.before = self.probabilities(self.model)
        forget, retain = self.rows["forget"], self.rows["retain"]
        if self.entry.kind == "weights":
            layer = None if self.config.layer == -1 else self.config.layer
            redirect_(self.model, self.encoder, forget, retain, layer=layer)
            self._restore_zeros()
            self.after = self.probabilities(self.model)
            return 0
        make, chosen = BUILDERS[self.entry.objective], self.setup.guard
        self.guard = make(self.model, self.encoder, forget, retain, **chosen, seed=self.seed, progress=progress)
        self.after = self.probabilities(Guarded(self.model, self.guard))
        return 0

    def _trained(self, progress: Progress | None) -> int:
        """Train, and leave the model in its own dtype with what may train as it was."""
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        dtype = torch.bfloat16 if self.config.precision == "pure-bf16" else self.model.dtype
        start = self._start()
        try:
            done = self._train(progress)
        finally:
            for parameter, before in trainable:
                parameter.requires_grad_(before)
        if self.entry.objective == "task-vector":
            self._negate(start)
        self.model.to(dtype).eval()
        # After the cast: what counts is the code of the weight as it is written.
        if self.config.floor:
            apply_floor_(self.model, start, parse_recipe(self.config.against), self.config.floor)
        self._restore_zeros()
        if self.workers.parallel != "fsdp":
            self.after = self.probabilities(self.model, done)
        return done

    def _restore_zeros(self) -> None:
        if self.zeros is not None:
            self.zeros.restore_()

    def _start(self) -> dict[str, Tensor]:
        """A copy of the weights, for the methods whose last step compares with them."""
        if not self.config.floor and self.entry.objective != "task-vector":
            return {}
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def _negate(self, start: dict[str, Tensor]) -> None:
        """From the fine-tuned model to the start, and as far again beyond it as the settings say."""
        tuned = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(start[name])
        negate_(self.model, tuned, self.config.scale)

    def _train(self, progress: Progress | None) -> int:
        c, model, workers = self.config, self.model, self.workers
        self._refuse_what_cannot_be_split()
        unit, projections = self._choose_weights()
        autocast = self._precision()
        feed = self._feed()
        if c.lora_rank:
            adapted: nn.Module = adapters.attach(model, c, feed)
        else:
            adapted = model
        network = workers.prepare(adapted)
        self.before = self.probabilities(network)
        run = Run(model, network, feed, c, self.seed)
        objective = build(self.entry.objective, run)
        self._mask(run, objective)
        if self.zeros is not None:
            objective.before_update.append(self.zeros.hold_gradients_)
        objective.after_update += projections
        watch = _Watch(self, network)
        history = fit(
            network,
            objective,
            feed,
            Schedule(c.steps, c.learning_rate * unit, c.warmup, c.decay, c.weight_decay, c.clip),
            seed=self.seed,
            workers=workers,
            micro_batch=c.micro_batch or None,
            autocast=autocast,
            guards=Guards(c.forget_limit, c.retain_limit),
            watcher=watch,
            progress=progress,
        )
        if c.quantized_base:
            assert self.setup.dense is not None
            self.model = self.setup.dense().to(self.model.device)
            adapted = adapters.onto(self.model, adapted)
        if c.unmerged:
            self.adapted = adapted
        elif c.lora_rank:
            adapters.merged(adapted)
        if workers.parallel == "fsdp":
            self.after = self.probabilities(network, watch.start + len(history))
            self._gather(network)
        return watch.start + len(history)

    def _refuse_what_cannot_be_split(self) -> None:
        c = self.config
        whole = {
            "lora_rank": c.lora_rank,
            "mask": c.mask != "none",
            "floor": c.floor,
            "through": c.through,
            "keep_zeros": c.keep_zeros,
            self.entry.objective: self.entry.objective in ("bucketed", "uoe", "quail", "task-vector"),
        }
        if self.workers.parallel == "fsdp":
            for what, asked in whole.items():
                if asked:
                    raise ValueError(f"parallel: fsdp splits weights that {what} needs whole; use ddp")
        by_weight = self.entry.objective in ("bucketed", "uoe", "rmu", "task-vector")
        if c.lora_rank and (c.mask != "none" or c.floor or c.through or by_weight):
            raise ValueError(f"lora_rank: {c.lora_rank} trains adapters; this method, mask or floor is about weights")
        if self.entry.objective == "uoe" and self.workers.world > 1:
            raise ValueError("parallel: uoe leaves most weights without a gradient; run it in one process")

    def _precision(self) -> torch.dtype | None:
        """Bring the weights to the dtype they train in; returns the dtype of matrix products if it is another."""
        asked = self.config.precision
        if asked == "auto":
            asked = "fp32" if self.model.dtype == torch.float32 else "bf16"
        if self.config.quantized_base:  # only the adapter trains, and peft makes it float32
            return torch.bfloat16 if asked != "fp32" else None
        self.model.to(torch.bfloat16 if asked == "pure-bf16" else torch.float32)
        return torch.bfloat16 if asked == "bf16" else None

    def _choose_weights(self) -> tuple[float, list[Any]]:
        """Freeze what the method leaves alone; returns the learning rate's unit and what is called after an update."""
        if self.entry.objective == "rmu":
            layers = decoder_layers(self.model)
            last = rmu_layer(self.model, self.config.layer)
            width = self.model.config.get_text_config().hidden_size
            chosen = [p for layer in layers[max(0, last - 2) : last + 1] for p in down_weights(layer, width)]
            for parameter in self.model.parameters():
                parameter.requires_grad_(any(parameter is one for one in chosen))
        if self.entry.objective == "bucketed":
            buckets = freeze_to_buckets(self.model, parse_recipe(self.config.against))

            def clamp(_: dict[str, float]) -> None:
                for bucket in buckets:
                    bucket.clamp_()

            return mean_width(buckets), [clamp]
        return 1.0, []

    def _feed(self) -> Feed:
        c = self.config
        sets = {"forget": [(row.question, row.answer) for row in self.rows["forget"]]}
        sizes, follows = {"forget": c.forget_batch}, {}
        if "retain" in self.entry.needs or c.retain_loss != "none":
            sets["retain"] = [(row.question, row.answer) for row in self.rows["retain"]]
            sizes["retain"] = c.retain_batch
        if "idk" in self.entry.needs:
            if any(not row.question for row in self.rows["forget"]):
                raise ValueError(f"forget: has rows of text without a question, which {self.entry.title} cannot refuse")
            lines = refusals_for(len(self.rows["forget"]), self.seed, tuple(self.setup.refusals))
            sets["idk"] = [(row.question, line) for row, line in zip(self.rows["forget"], lines, strict=True)]
            follows["idk"] = "forget"
        return Feed(self.encoder, sets, sizes, self.seed, follows)

    def _mask(self, run: Run, objective: Objective) -> None:
        c = self.config
        if c.mask == "none":
            return
        feed, size = run.feed, run.pass_size()
        every = {name: visited(feed, name, c.steps) for name in feed.encoded}
        forget = [term for term in objective.terms if term.data != "retain"]
        for begin in objective.begin_update:
            begin(every)
        gradients = whole_gradient(run.network, forget, feed, every, self.workers, size)
        if c.mask == "wagle":
            kept = [Term("retain", run.retain_nll, "retain", "tokens")]
            retain = whole_gradient(run.network, kept, feed, every, self.workers, size)
            mask = masks.wagle(self.model, gradients, retain, c.share, c.mu)
        else:
            level = "rows" if c.mask == "sure-row" else "modules"
            mask = masks.sure(self.model, gradients, 100 * (1 - c.share), level)  # type: ignore[arg-type]
        run.hold(objective, mask)
        self.mask_share = masks.kept_share(self.model, mask)

    def _gather(self, network: nn.Module) -> None:
        """The whole model, in the first process, in place of the split one."""
        state = whole_state(network)
        if self.workers.first:
            with no_init_weights():
                model = AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float32)
            model.load_state_dict(state, assign=True)
            model.tie_weights()
            model.generation_config = self.model.generation_config
            self.model = model

    def probabilities(self, network: nn.Module, done: int | None = None) -> dict[str, float]:
        """Mean probability of forget and retain answers, on at most 64 rows of each.

        Raises FloatingPointError when one is not a number: Diverged, where `done` updates led there.
        """
        mode = network.training
        network.eval()
        found = {}
        for name, rows in self.rows.items():
            if rows:
                pairs = [(row.question, row.answer) for row in spread(rows, _LOOKED_AT)]
                size = self.config.micro_batch or self.config.forget_batch
                try:
                    found[f"{name}_probability"] = mean_probability(network, self.encoder, pairs, size)
                except FloatingPointError as error:
                    if done is None:
                        raise
                    raise Diverged(f"{error}, after step {done} of {self.config.steps}") from None
        network.train(mode)
        return found


class _Watch:
    """Looks at probabilities, stops early, keeps log and checkpoints."""

    def __init__(self, job: _Job, network: nn.Module) -> None:
        self.job, self.network = job, network
        self.keeper = Keeper(job.setup.saving, job.workers) if job.setup.saving else None
        self.start, self.seen = 0, dict[str, float]()

    def begin(self, network: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective) -> int:
        self.optimizer, self.objective = optimizer, objective
        if self.keeper:
            self.start = self.keeper.restore(network, optimizer, objective)
        return self.start

    def good(self, done: int) -> None:
        if self.keeper and done > self.start and self.keeper.due(done):
            self.keeper.save(done, self.network, self.optimizer, self.objective)

    def after(self, done: int, record: dict[str, float]) -> tuple[bool, str]:
        c = self.job.config
        looked = done % c.check_every == 0
        if looked:
            self.seen = self.job.probabilities(self.network, done)
        if self.keeper:
            self.keeper.log(done, record | (self.seen if looked else {}))
        text = f"loss {record['loss']:.3g}" + "".join(
            f"  {name.removesuffix('_probability')} P {value:.2f}" for name, value in self.seen.items()
        )
        return looked and self.seen["forget_probability"] < c.stop_below, text
