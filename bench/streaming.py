"""A model twice as large as the memory it is compressed in: killed, resumed, byte-equal, and as predicted.

Random bfloat16 weights in several shards are compressed through the command line, in child processes. Once without a
limit, for the prediction beside the outcome. Once more under a limit of address space (RLIMIT_AS, which counts more
than is resident: libraries, stacks, whatever is mapped), killed with SIGKILL at a random block and resumed under the
same limit: the files have to be the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ..compress.files import read_json
from ..compress.shards import ShardWriter
from ..unlearn.demo import byte_bpe

GIB = 2**30
RECIPES = ("rtn-w4a16-g128", "gptq-w4a16-g128")
PEAK_LIMIT, TIME_LIMIT = 1.15, 1.5
# Hidden and intermediate size, vocabulary; of these the largest of which _LEAST blocks are not too much.
_SHAPES = ((4096, 11008, 32000), (1024, 2816, 8000), (256, 768, 2000))
_LAYERS = 7  # of a block of Llama
_LEAST = 4  # blocks
_SEQUENCES, _TOKENS = 16, 256
_WORDS, _VOCABULARY = 4000, 1000

Rows = list[dict[str, Any]]


def run(
    seed: int = 0, gib: float = 6.0, limit_gib: float = 3.0, methods: tuple[str, ...] = RECIPES
) -> tuple[Rows, Rows]:
    """(rows, checks): a row is one recipe on a model of `gib` GiB, compressed under a limit of `limit_gib` GiB."""
    if sys.platform != "linux":
        raise ValueError(f"streaming: {sys.platform} does not enforce a limit of address space; Linux is needed")
    with tempfile.TemporaryDirectory(prefix="remanence-streaming-") as scratch:
        model = Path(scratch) / "model"
        size = make_model(model, gib, seed)
        (Path(scratch) / "text.txt").write_text(_text(4 * _SEQUENCES * _TOKENS, seed + 1))
        rows = [_measure(model, size, recipe, limit_gib, seed) for recipe in methods]
    return rows, [check for row in rows for check in _checks(row)]


def make_model(directory: Path, gib: float, seed: int) -> int:
    """As make_llama, of about `gib` GiB, with a tokenizer beside it."""
    shape = next((s for s in _SHAPES if _blocks(s, gib) >= _LEAST), _SHAPES[-1])
    size = make_llama(directory, *shape, max(_LEAST, _blocks(shape, gib)), seed)
    byte_bpe([_text(_WORDS, seed)], _VOCABULARY).save_pretrained(directory)
    return size


def make_llama(directory: Path, hidden: int, intermediate: int, vocabulary: int, layers: int, seed: int) -> int:
    """Write a Llama of random bfloat16 weights, two blocks a shard, in the memory of two blocks; its bytes."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16)
        for part in made.split(1024):
            part.copy_(torch.randn(part.shape, generator=generator).mul_(0.02))
        return made

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    writer = ShardWriter(directory)
    ends = {f"{name}.weight": weight(vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    writer.write(0, {**ends, "model.norm.weight": ones()})
    del ends
    shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
    shapes |= {f"mlp.{part}_proj": (intermediate, hidden) for part in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    for first in range(0, layers, 2):
        state: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + 2, layers)):
            name = f"model.layers.{layer}"
            state |= {f"{name}.{part}.weight": weight(*shape) for part, shape in shapes.items()}
            state |= {f"{name}.{part}_layernorm.weight": ones() for part in ("input", "post_attention")}
        writer.write(1 + first // 2, state)
    return sum(file.stat().st_size for file in writer.finish())


def _blocks(shape: tuple[int, int, int], gib: float) -> int:
    """How many blocks make up `gib` GiB in 16 bits."""
    hidden, intermediate, vocabulary = shape
    return round((gib * GIB / 2 - 2 * vocabulary * hidden) / (4 * hidden**2 + 3 * hidden * intermediate))


def _text(words: int, seed: int) -> str:
    """Random words, of few syllables."""
    chosen = random.Random(seed)
    known = ["".join(chosen.choices("bdfgklmnprstvz", k=1) + chosen.choices("aeiou", k=1)) for _ in range(_WORDS)]
    return " ".join("".join(chosen.choices(known, k=2)) for _ in range(words))


def _measure(model: Path, size: int, recipe: str, limit_gib: float, seed: int) -> dict[str, Any]:
    """One recipe: whole, then under the limit, killed and resumed."""
    whole, broken = model.with_name("whole"), model.with_name("broken")
    made = _finished(_start(model, recipe, whole), recipe)
    limit = int(limit_gib * GIB)
    layers = read_json(model / "config.json")["num_hidden_layers"]
    chosen = random.Random(f"{seed} {recipe}")
    block, share = chosen.randrange(1, layers), chosen.random()
    killed = _kill_within(_start(model, recipe, broken, limit), broken, block, share)
    resumed = _finished(_start(model, recipe, broken, limit, resume=True), recipe)
    row: dict[str, Any] = {"recipe": recipe, "model_gib": size / GIB, "blocks": layers}
    for name, unit in (("peak_memory", GIB), ("disk", GIB), ("seconds", 1)):
        predicted, actual = made["plan"][name], made["actual"][name]
        label = name if unit == 1 else f"{name}_gib"
        row |= {f"{label}_predicted": predicted / unit, label: actual / unit, f"{name}_ratio": actual / predicted}
    row |= {
        "limit": f"RLIMIT_AS {limit_gib:g} GiB",
        "below_limit": limit < size,
        "killed_at_block": killed,
        "seconds_after_resume": resumed["actual"]["seconds"],
        "equal": _digests(whole) == _digests(broken),
        "threads": _threads(),
    }
    for directory in (whole, broken):
        shutil.rmtree(directory)
    return row


def _checks(row: dict[str, Any]) -> Rows:
    recipe = row["recipe"]
    peak, seconds = row["peak_memory_ratio"], row["seconds_ratio"]
    return [
        {
            "what": f"{recipe}: {row['model_gib']:.2f} GiB under {row['limit']}, killed and resumed: bytes equal",
            "limit": True,
            "value": row["equal"] and row["below_limit"],
            "ok": row["equal"] and row["below_limit"],
        },
        {
            "what": f"{recipe}: peak memory, actual over predicted or the inverse",
            "limit": PEAK_LIMIT,
            "value": max(peak, 1 / peak),
            "ok": max(peak, 1 / peak) <= PEAK_LIMIT,
        },
        {
            "what": f"{recipe}: seconds, actual over predicted or the inverse",
            "limit": TIME_LIMIT,
            "value": max(seconds, 1 / seconds),
            "ok": max(seconds, 1 / seconds) <= TIME_LIMIT,
        },
    ]


def _threads() -> int:
    # A thread reserves tens of MiB of addresses, whether or not it needs them.
    return min(torch.get_num_threads(), 8)


def _start(
    model: Path, recipe: str, out: Path, limit: int | None = None, resume: bool = False
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "remanence", "compress", str(model), "--recipe", recipe, "--out", str(out)]
    command += ["--json", "--device", "cpu"]
    if not recipe.startswith(("rtn", "hqq")):
        command += ["--text", str(model.with_name("text.txt"))]
        command += ["--calibration", f"text:{_SEQUENCES},length:{_TOKENS}"]
    if resume:
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads()), "MALLOC_ARENA_MAX": "2"}

    def restrict() -> None:
        import resource  # not on Windows

        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    log = out.with_name(f"{out.name}.log").open("w")
    with log:
        return subprocess.Popen(
            command, env=environment, preexec_fn=restrict, stdout=subprocess.PIPE, stderr=log, text=True
        )


def _finished(child: subprocess.Popen[str], recipe: str) -> dict[str, Any]:
    """What a child printed; RuntimeError with its last words when it failed."""
    with child:
        out = child.communicate()[0]
    if child.returncode:
        raise RuntimeError(f"streaming: {recipe}: compress ended with {child.returncode}: {_last_words(child)}")
    return json.loads(out)


def _last_words(child: subprocess.Popen[str]) -> str:
    arguments: Any = child.args
    log = Path(arguments[arguments.index("--out") + 1] + ".log")
    return " ".join(log.read_text().split())[-600:]


def _kill_within(child: subprocess.Popen[str], out: Path, block: int, share: float) -> int:
    """Kill the child when about `share` of decoder block number `block` (from 0) is done; the block it was in."""
    journal = out.parent / f".{out.name}.unfinished" / "progress.json"
    began = time.monotonic()
    done, spent = 0, 0.0
    with child:
        while child.poll() is None:
            if not journal.is_file():  # it has not begun
                began = time.monotonic()
            layers = read_json(journal)["layers"] if journal.is_file() else []
            if (now := len(layers) // _LAYERS) > done:
                done, spent, began = now, time.monotonic() - began, time.monotonic()
            if done >= block and time.monotonic() - began >= share * spent:
                break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"streaming: was done, or had failed, before block {block}: {_last_words(child)}")
        child.send_signal(signal.SIGKILL)
    return done


def _digests(directory: Path) -> dict[str, str]:
    """Every file of a checkpoint, by name."""
    found = {}
    for path in sorted(directory.rglob("*")):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
        found[str(path.relative_to(directory))] = digest.hexdigest()
    return found
