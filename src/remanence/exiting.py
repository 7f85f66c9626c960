"""`remanence exit`: a model that leaves early, from tuning over its policy to what it answers, and how fast."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compress.places import local_model
from .corpus import rows_by_source
from .errors import UsageError
from .unlearn.data import running_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .compress.early_exit.calibrate import Calibration
    from .compress.early_exit.policy import Policy
    from .unlearn.encode import Encoder

Progress = Callable[[int, int, str], None]

# Exits where none are named, evenly spaced; of every text that a policy learns from, tokens at most.
EXITS, TEXT_TOKENS = 4, 128
# Tokens drafted at a time.
DRAFTS = 4
# Policies that learn something from data; the others have their settings alone.
LEARNED = ("probe", "agent")
TUNING = "early_exit_tuning.json"
# What of a checkpoint goes along with a policy: nothing that could run.
_CARRIED = (".json", ".safetensors", ".txt", ".model", ".jinja", ".md")


@dataclass(frozen=True)
class Source:
    """Generic data: a file of running text, or rows to keep, from a file or of `data`; exactly one of them.

    Raises ValueError or FileNotFoundError that names the option, before torch loads.
    """

    text: str | None = None
    retain: str | None = None
    data: str | None = None
    data_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("text", "retain", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} given" if given else "none given"
            raise ValueError(f"text, retain, data: {said}; one of them is needed: --text FILE, --retain FILE or --data")
        if self.data is None and self.data_dir is not None:
            raise ValueError(f"data_dir: {self.data_dir} goes with --data tofu")
        if not self.pairs():
            raise ValueError(f"{given[0]}: no rows")

    def pairs(self) -> list[tuple[str, str]]:
        """(question, answer), or ("", text)."""
        if self.text is not None:
            return [("", running_text(self.text))]
        rows = rows_by_source(self.data, self.data_dir, self.retain, None, self.seed)["retain"]
        return [(row.question, row.answer) for row in rows]

    def prompts(self, encoder: Encoder, count: int) -> list[list[int]]:
        """Token ids that a model goes on from, at most `count`, spread over the data: questions, or the first part of
        pieces of the text (GREEN-CODE's shares)."""
        from .compress.early_exit.states import contexts

        pairs = self.pairs()
        if self.text is None:
            found = [encoder.prompt_ids(question) for question, _ in pairs if question]
            found = found or contexts([encoder.pair(*pair)[0] for pair in pairs], self.seed)
        else:
            ids = list(encoder.tokenizer(pairs[0][1], verbose=False)["input_ids"])
            length = min(TEXT_TOKENS, encoder.max_length)
            found = contexts([ids[start : start + length] for start in range(0, len(ids), length)], self.seed)
        return found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]

    def told(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def depths(text: str | None) -> tuple[int, ...] | None:
    """Exits as "4,8,12"; None where none are named. ValueError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"exits: {text!r} is not a list of depths, e.g. 4,8,12")
    return tuple(map(int, parts))


def tune(
    model: str, source: Source, exits: tuple[int, ...] | None, settings: dict[str, Any], out: Path, progress: Progress
) -> dict[str, Any]:
    """Tune `model` for exits and write it to the new directory `out`, with what it cost in early_exit_tuning.json."""
    from .compress.checkpoint import load_model, load_tokenizer, max_length, write_model
    from .compress.early_exit.policy import evenly
    from .compress.files import atomic_dir, write_json
    from .unlearn.encode import Encoder
    from .unlearn.exit_tuning import ExitTuning, exit_weights, tune_

    network, tokenizer = load_model(model), load_tokenizer(model)
    layers = network.config.get_text_config().num_hidden_layers
    tuning = _usage(ExitTuning, exits or evenly(layers, min(EXITS, layers - 1)), **settings)
    _usage(exit_weights, tuning.weights, tuning.exits, layers)
    network.float()
    report = tune_(network, Encoder(tokenizer, max_length(network)), source.pairs(), tuning, source.seed, progress)
    table = [
        {"depth": depth, "weight": weight, "loss_before": before, "loss_after": after}
        for depth, weight, before, after in zip(report.depths, report.weights, report.before, report.after, strict=True)
    ]
    record = {
        "model": model,
        "tuning": asdict(tuning),
        "data": source.told(),
        "layers": layers,
        "held_out_tokens": report.tokens,
        "depths": table,
        "seconds": report.seconds,
    }
    with atomic_dir(out) as work:
        write_model(network, tokenizer, work)
        write_json(work / TUNING, record)
    return {"out": str(out), **record}


@dataclass(frozen=True)
class Wanted:
    """A policy to be made: its name and settings, what it learns from and is calibrated on.

    settings     fields of the policy besides its exits and weights
    prompts      texts that are continued by `new_tokens` tokens each; a half of them is for the calibration, if asked
    calibrate    (delta, epsilon) of CALM's guarantee on how much of a text may become another
    training     settings of PPO (compress/early_exit/agent.py)
    """

    policy: str
    exits: tuple[int, ...] | None
    settings: dict[str, Any]
    prompts: int = 512
    new_tokens: int = 15
    calibrate: tuple[float, float] | None = None
    training: dict[str, Any] | None = None


def make_policy(
    model: str, source: Source | None, wanted: Wanted, sync: Any, out: Path, progress: Progress
) -> dict[str, Any]:
    """Write the checkpoint `model` to the new directory `out` with a policy beside it.

    Raises UsageError for what does not go together, ValueError where data or model does not do.
    """
    from .compress.checkpoint import load_model, load_tokenizer, local_directory, max_length
    from .compress.early_exit.policy import POLICIES, evenly
    from .compress.early_exit.stored import SETTINGS, save_policy
    from .compress.files import atomic_dir
    from .unlearn.encode import Encoder

    if wanted.policy not in POLICIES:
        raise UsageError(f"policy: {wanted.policy!r} is not one of {', '.join(POLICIES)}")
    kind = POLICIES[wanted.policy]
    if source is None and (wanted.policy in LEARNED or wanted.calibrate):
        why = "learns" if wanted.policy in LEARNED else "is calibrated"
        raise UsageError(f"policy: {wanted.policy} {why} from data; give --text FILE, --retain FILE or --data")
    _check_settings(kind, wanted)
    if source is not None and wanted.policy not in LEARNED and not wanted.calibrate:
        raise UsageError(f"policy: {wanted.policy} learns nothing; leave out the data, or give --calibrate")
    directory = local_directory(model)
    network, tokenizer = load_model(directory), load_tokenizer(directory)
    network.eval()
    layers = network.config.get_text_config().num_hidden_layers
    exits = wanted.exits or (() if wanted.policy == "full" else evenly(layers, min(EXITS, layers - 1)))
    seed = 0 if source is None else source.seed
    encoder = Encoder(tokenizer, max_length(network))
    prompts = [] if source is None else source.prompts(encoder, wanted.prompts)
    learned, judged = (prompts[::2], prompts[1::2]) if wanted.calibrate else (prompts, [])
    trained: dict[str, Any] = {} if source is None else {"data": source.told(), "prompts": len(learned)}
    if wanted.policy in LEARNED:
        policy, found = _learned(network, encoder, learned, exits, wanted, seed, progress)
        trained |= found
    else:
        policy = _usage(kind, exits=exits, **wanted.settings)
    if wanted.calibrate:
        policy, calibration = _calibrated(network, encoder, policy, judged, wanted, sync)
        trained["calibration"] = {**asdict(calibration), "loss": "1 - ROUGE-L against the whole model's text"}
    with atomic_dir(out) as work:
        for file in sorted(directory.iterdir()):
            if file.is_file() and file.suffix in _CARRIED and not file.name.startswith(("early_exit.", "exit_policy.")):
                shutil.copy(file, work / file.name)
        _usage(save_policy, policy, network, work, sync, trained)
    return {"out": str(out), "policy": policy.name, **policy.settings(), "exit_sync": sync, "file": SETTINGS, **trained}


def _check_settings(kind: type[Policy], wanted: Wanted) -> None:
    """UsageError for what does not apply to this policy."""
    known = {f.name for f in fields(kind)} - {"exits", *kind.weights}
    for name in wanted.settings.keys() - known:
        raise UsageError(f"{name}: the policy {kind.name} has none; it has {', '.join(sorted(known))}")
    if kind.name == "full" and wanted.exits:
        raise UsageError(f"exits: {list(wanted.exits)}; the policy full has none")
    if kind.name == "fixed" and (wanted.exits is None or len(wanted.exits) != 1):
        raise UsageError("exits: the policy fixed leaves at one depth; give it, e.g. --exits 8")
    if wanted.calibrate and not kind.graded:
        raise UsageError(f"calibrate: {kind.name} has no threshold to choose")
    if wanted.calibrate and "threshold" in wanted.settings:
        raise UsageError("threshold: is what the calibration chooses; leave it out")


def _usage(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What is wrong with what was asked for is a matter of usage."""
    try:
        return call(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


def _learned(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    exits: tuple[int, ...],
    wanted: Wanted,
    seed: int,
    progress: Progress,
) -> tuple[Policy, dict[str, Any]]:
    from .compress.early_exit.states import collect
    from .unlearn.encode import pad_id

    pad, end = pad_id(encoder.tokenizer), encoder.tokenizer.eos_token_id
    states = _usage(collect, model, prompts, exits, pad, end, wanted.new_tokens)
    agrees = states.agrees.double().mean(0).tolist()
    found: dict[str, Any] = {"tokens": len(states), "agreement": dict(zip(map(str, exits), agrees, strict=True))}
    if wanted.policy == "probe":
        from .compress.early_exit.probe import fit_probe

        probe, fits = _usage(fit_probe, states, seed)
        return _usage(replace, probe, **wanted.settings), found | {"exits_fitted": [asdict(fit) for fit in fits]}
    from .compress.early_exit.agent import AgentTraining, train_agent

    settings = dict(wanted.settings)
    training = _usage(AgentTraining, **({"seed": seed} | (wanted.training or {})))
    threshold, temperature = settings.pop("threshold", 0.5), settings.pop("temperature", 1.0)
    made = train_agent(states, training, threshold, temperature, progress)
    return _usage(replace, made.agent, **settings), found | {"ppo": asdict(training), "seconds": made.seconds}


def _calibrated(
    model: PreTrainedModel, encoder: Encoder, policy: Policy, prompts: Sequence[list[int]], wanted: Wanted, sync: Any
) -> tuple[Policy, Calibration]:
    """On texts of its own, served as the policy will be."""
    from .compress.early_exit.calibrate import calibrated, textual_losses
    from .unlearn.encode import pad_id

    assert wanted.calibrate is not None
    pad, end = pad_id(encoder.tokenizer), encoder.tokenizer.eos_token_id
    losses = textual_losses(model, prompts, pad, end, wanted.new_tokens, sync=sync)
    return _usage(calibrated, policy, losses, *wanted.calibrate)


def truncate(model: str, depth: int, out: Path) -> dict[str, Any]:
    """Write the first `depth` layers of `model` as an ordinary checkpoint to the new directory `out`."""
    from .compress.checkpoint import load_model, load_tokenizer, save_model, weight_bytes
    from .compress.early_exit.truncated import truncate_
    from .compress.linear import QuantLinear

    network, tokenizer = load_model(model), load_tokenizer(model)
    if any(isinstance(module, QuantLinear) for module in network.modules()):
        raise UsageError(f"model: {model} is quantized; truncate the model that it was made of, then compress it")
    layers = network.config.get_text_config().num_hidden_layers
    save_model(_usage(truncate_, network, depth), tokenizer, out)
    return {"out": str(out), "depth": depth, "layers": layers, "size_bytes": weight_bytes(out)}


@dataclass(frozen=True)
class Asked:
    """Prompts to go on from, and how.

    policy       threshold and sync in place of those stored beside the model, where given
    draft        layers that draft, besides; None: none
    """

    prompts: Sequence[str]
    new_tokens: int = 64
    threshold: float | None = None
    sync: Any = None
    draft: int | None = None
    drafts: int | None = None
    repeats: int = 3


@dataclass(frozen=True)
class Energy:
    """Joules are wanted, too. estimate: where no counter is, processor time x a constant; window: seconds of one."""

    estimate: bool = False
    window: float = 5.0


def generate(model: str, asked: Asked, energy: Energy | None = None) -> dict[str, Any]:
    """Answers at full depth and under the policy beside the model, and what each took, in turns in one process."""
    from .backends.device import device
    from .backends.energy.meter import Lengths
    from .backends.energy.probes import probes
    from .bench.exit_energy import exit_energy
    from .bench.exit_speed import Served, speed_rows
    from .compress.checkpoint import load_model, load_tokenizer, max_length
    from .compress.early_exit.policy import Full
    from .compress.early_exit.stored import SETTINGS, is_stored, load_policy
    from .unlearn.encode import Encoder

    if not is_stored(model) and asked.draft is None:
        raise UsageError(f"model: {model} has no {SETTINGS}; make one with remanence exit policy, or give --draft N")
    if not is_stored(model) and (asked.threshold is not None or asked.sync is not None):
        raise UsageError(f"threshold, exit-sync: {model} has no policy that they could be of")
    if asked.draft is None and asked.drafts is not None:
        raise UsageError("drafts: goes with --draft")
    network, tokenizer = load_model(model), load_tokenizer(model)
    network.eval()
    ways = [Served(Full())]
    if is_stored(model):
        policy, sync = load_policy(model, network)
        if asked.threshold is not None:
            policy = _usage(policy.at, asked.threshold)
        ways.append(Served(policy, asked.sync or sync))
    if asked.draft is not None:
        ways.append(Served(Full(), drafting=asked.draft, drafts=asked.drafts or DRAFTS))
    encoder = Encoder(tokenizer, max_length(network))
    ids, mask = _padded(encoder, asked)
    rows = _usage(speed_rows, network, ids, mask, ways, asked.new_tokens, asked.repeats)
    texts = {way.name: _texts(network, encoder, way, ids, mask, asked.new_tokens) for way in ways}
    said = [{"prompt": p, **{name: found[i] for name, found in texts.items()}} for i, p in enumerate(asked.prompts)]
    result = {"rows": rows, "texts": said}
    if energy is not None:
        machine = device(str(network.device))
        found, lengths = probes(machine, energy.estimate), _usage(Lengths, energy.window, idle_s=energy.window)
        result["energy"] = exit_energy(network, machine, ids, mask, ways, asked.new_tokens, found, lengths)
    return result


def _padded(encoder: Encoder, asked: Asked) -> tuple[Tensor, Tensor]:
    from .compress.decoding import left_padded
    from .unlearn.encode import pad_id

    found = [list(encoder.tokenizer(prompt)["input_ids"]) for prompt in asked.prompts]
    if not found or not all(found):
        raise UsageError("prompt: empty; expected some text")
    longest = max(map(len, found)) + asked.new_tokens
    if longest > encoder.max_length:
        raise UsageError(f"new: {longest} tokens with the longest prompt; this model takes {encoder.max_length}")
    return left_padded(found, pad_id(encoder.tokenizer))


def _texts(model: PreTrainedModel, encoder: Encoder, way: Any, ids: Tensor, mask: Tensor, new: int) -> list[str]:
    """What follows each prompt, up to the end of sequence."""
    from .compress.decoding import plain_settings
    from .compress.early_exit.draft import draft_and_verify
    from .compress.early_exit.generation import early_exit
    from .unlearn.encode import pad_id

    ends = _ends(model.generation_config.eos_token_id, encoder.tokenizer.eos_token_id)
    pad = pad_id(encoder.tokenizer)
    # Greedy for all, whatever penalties and samples the model's own settings ask for.
    with plain_settings(model, eos_token_id=ends, pad_token_id=pad):
        if way.drafting is not None:
            options = {"max_new_tokens": new, "drafts": way.drafts, "eos_token_id": ends, "pad_token_id": pad}
            sequences = draft_and_verify(model, ids, mask, way.drafting, **options).sequences
        else:
            network: Any = model
            with early_exit(model, way.policy, way.sync):
                sequences = network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    return [text.strip() for text in encoder.tokenizer.batch_decode(sequences[:, ids.shape[1] :], True)]


def _ends(*ends: int | list[int] | None) -> list[int]:
    """All tokens at which a text may end."""
    found = [end if isinstance(end, list) else [end] for end in ends if end is not None]
    return sorted({token for part in found for token in part})


def check_model(model: str) -> None:
    """FileNotFoundError for a directory that is none, before torch loads."""
    local_model(model)
