"""From checkpoint to compressed checkpoint in the memory of one decoder block: read, compress, write, forget.

Hidden states between blocks lie on disk. Every finished block is a part of the output that is whole and verified; a
run that was killed goes on from the last of them and writes the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..backends.memory import available_memory
from .block import Block, Calls, Hidden, Linear, block_names, enter
from .checkpoint import (
    OWN_STEM,
    file_names,
    has_experts,
    in_files,
    load_model,
    load_tokenizer,
    local_directory,
    packed_state,
    sparse_config,
    stock_readable,
    weight_bytes,
    write_config,
    write_model,
)
from .experts import fuse, fused_on_disk, unfuse_experts_
from .files import atomic_dir, publish, read_json, write_json
from .footprint import steady_heap, trim_heap
from .formats import compressed_tensors as ct
from .gate import one_by_one
from .integration import mark
from .prune import Cut
from .recipe import Recipe
from .rtn import finite
from .sequential import (
    LayerReport,
    check_batches,
    compress_,
    compress_block_,
    make_block,
    needs_dense,
    round_,
)
from .shards import ShardReader, ShardWriter, fill_, hollow_, hollow_model, names
from .spec import ActivationSpec, QuantSpec
from .walk import check_unshared, fitting_linears, global_cut, linears, prunable_linears, replace, weight_of, within

_JOURNAL = "progress.json"
# What is not in a decoder block (embeddings, norms, the head) is written in parts of at least this many bytes.
_PART = 256 << 20
_PROBE = 64  # tokens


@dataclass(frozen=True)
class Unit:
    """What is read, compressed and written at a time: one decoder block, or some modules outside of them."""

    modules: tuple[str, ...]
    block: int | None = None  # its number among the decoder blocks


class Job:
    """A checkpoint, a recipe, data, and the order of work. Nothing is read yet but names, shapes and the config.

    source   directory of the dense model;  batches: token ids int64 [B, T] without padding, for calibrated recipes
    sparse   store what is pruned 2:4 without its zeros, as `save_model` has it
    Raises ValueError for whatever keeps the recipe from being carried out, FileNotFoundError for a missing model.
    """

    def __init__(
        self,
        source: Path,
        recipe: Recipe,
        batches: Sequence[Tensor] = (),
        device: str = "cpu",
        sparse: bool = False,
    ) -> None:
        if recipe.retrain is not None:
            raise ValueError(f"retrain: goes through all of the model, and {recipe} is not streamed")
        if sparse and (recipe.spec is not None or recipe.prune is None or recipe.prune.pattern != "2:4"):
            raise ValueError(f"sparse: goes with a recipe that prunes 2:4 and no more, e.g. wanda-2:4; got {recipe}")
        self.sparse = sparse
        self.source, self.recipe, self.batches = Path(source), recipe, batches if recipe.calibrated else ()
        self.device = torch.device(device)
        self.model: PreTrainedModel = hollow_model(self.source)
        self.reader = ShardReader(self.source)
        self.mapping = names(self.model, self.reader)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # Whether the result can be loaded whole, to be compared with what was in memory.
        self.small = 4 * sum(self.reader.bytes(key) for key in set(self.mapping.values())) < available_memory()
        fitting = prunable_linears if recipe.spec is None else fitting_linears
        layers: list[tuple[str, Linear]] = fitting(self.model, recipe)
        check_unshared(self.model, layers, recipe)
        # Names alone: a module kept here would keep its dense weight.
        self.layers = tuple(name for name, _ in layers)
        if recipe.calibrated:
            check_batches(recipe, batches, self.model)
            if recipe.gate is not None:
                self.batches = one_by_one(batches, recipe.gate)
        self.dense = [name for name, _ in linears(self.model, ()) if name not in self.layers]
        self.file_names = file_names(self.model)
        linear = recipe.spec is None or all(isinstance(layer, nn.Linear) for _, layer in layers)
        a = recipe.activation
        own = a is not None and a.dynamic and (a.search or a.clip != 1 or a.narrow)
        own = own or recipe.method == "flatquant"
        # A gate may keep some blocks at other widths, and which ones is not known yet.
        specs = {} if recipe.spec is None else {name: recipe.spec_of(name) for name in self.layers}
        readable = stock_readable(self.model, linear, own, a is not None, specs)
        gated = recipe.gate is not None and recipe.gate.action == "keep" and has_experts(self.model)
        self.stock_readable = readable and not sparse and not gated
        self.fused = {} if specs or sparse else fused_on_disk(self.model)
        self.blocks = block_names(self.model)
        self.repeated = _repeated(self.model)
        self.units = [*self._outside(), *(Unit((name,), number) for number, name in enumerate(self.blocks))]

    def _outside(self) -> Iterator[Unit]:
        """The modules with weights that are in no decoder block."""
        taken: list[str] = []
        group: list[str] = []
        size = 0
        for name, module in self.model.named_modules():
            own = [key for key in module.state_dict() if "." not in key]
            if all(_join(name, key) in self.repeated for key in own) or within(name, [*self.blocks, *taken]):
                continue
            if any(within(block, [name]) for block in self.blocks):
                raise ValueError(f"{name or 'model'}: has weights of its own around its decoder blocks; not streamed")
            taken.append(name)
            group.append(name)
            size += sum(tensor.nbytes for tensor in module.state_dict().values())
            if size >= _PART:
                yield Unit(tuple(group))
                group, size = [], 0
        if group:
            yield Unit(tuple(group))

    def cut(self) -> Cut | None:
        """Where the whole model is cut, by reading every layer three times; None for a recipe that does not compare all
        of them."""

        def weight(name: str) -> Tensor:
            module: Any = self.model.get_submodule(name)
            fill_(module, name, self.mapping, self.reader)
            found = weight_of(module).detach().to(self.device)
            hollow_(module)
            return found

        layers: list[tuple[str, Any]] = [(name, self.model.get_submodule(name)) for name in self.layers]
        return global_cut(layers, weight, self.recipe)

    def identity(self) -> dict[str, Any]:
        """What has to be the same for a run to go on with what another left."""
        files = [*sorted(self.source.glob("*.safetensors")), self.source / "config.json"]
        known = hashlib.sha256()
        for file in files:
            status = file.stat()
            known.update(f"{file.name} {status.st_size} {status.st_mtime_ns};".encode())
        for ids in self.batches:
            known.update(f"{list(ids.shape)}".encode() + ids.contiguous().numpy().tobytes())
        return {
            "recipe": self.recipe.name,
            "inputs": known.hexdigest(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "sparse": self.sparse,
        }


def _repeated(model: nn.Module) -> set[str]:
    """Names of tensors that are the same as one before, as a head tied to the embedding is; they are stored once."""
    seen: set[int] = set()
    repeated = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            repeated.add(name)
        seen.add(id(tensor))
    return repeated


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


Notify = Callable[[str, LayerReport | None], None]


def compress_to(
    source: Path | str,
    recipe: Recipe,
    target: Path | str,
    batches: Sequence[Tensor] = (),
    retraining: Sequence[Tensor] = (),
    device: str = "cpu",
    sparse: bool = False,
) -> dict[str, Any]:
    """Compress the model at `source` (a directory or hub id) into the new directory `target`; see Job, and
    compress_streamed."""
    directory = local_directory(source)
    if whole(recipe):
        return compress_whole(directory, recipe, target, batches, retraining, sparse)
    return compress_streamed(Job(directory, recipe, batches, device, sparse), load_tokenizer(directory), target)


def whole(recipe: Recipe) -> bool:
    """Whether it takes the whole model in memory: bitsandbytes' own code writes its formats, a rotation goes along all
    of the residual stream, and training goes through all layers."""
    return recipe.method == "bnb" or recipe.rotation is not None or recipe.retrain is not None


def compress_whole(
    directory: Path,
    recipe: Recipe,
    target: Path | str,
    batches: Sequence[Tensor] = (),
    retraining: Sequence[Tensor] = (),
    sparse: bool = False,
) -> dict[str, Any]:
    """As compress_streamed, with the whole model in memory; `sparse` as in Job."""
    start = time.perf_counter()
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    parameters = sum(p.numel() for p in model.parameters())
    layers: list[LayerReport] = []
    compress_(model, recipe, batches, layers.append, retraining)
    with atomic_dir(target) as work:
        write_model(model, tokenizer, work, recipe, sparse)
        ids = torch.arange(min(_PROBE, model.config.get_text_config().vocab_size))[None]
        again = load_model(work)
        unfuse_experts_(again)  # fused they add up in another order
        with torch.no_grad():
            difference = float((again(ids).logits - model(ids).logits).abs().max())
        if difference:
            raise RuntimeError(f"{target}: reads back with logits off by {difference:g}; nothing was written")
    readable = not any(Path(target).glob(f"{OWN_STEM}*.safetensors"))
    return _made(recipe, target, parameters, difference, readable, layers, start)


def _made(
    recipe: Recipe,
    target: Path | str,
    parameters: int,
    difference: float | None,
    stock_readable: bool,
    layers: Sequence[LayerReport],
    start: float,
) -> dict[str, Any]:
    size = weight_bytes(target)
    return {
        "recipe": recipe.name,
        "out": str(target),
        "size_bytes": size,
        "size_vs_fp16": size / (2 * parameters),
        "max_abs_logit_difference": difference,
        "stock_readable": stock_readable,
        "layers": [asdict(layer) for layer in layers],
        "seconds": time.perf_counter() - start,
    }


def compress_streamed(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    target: Path | str,
    resume: bool = False,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Carry out `job` into the new directory `target`, and read it back.

    resume   go on with what a killed run for the same `target` left, if it left anything
    notify   is told of every unit that begins ("block 3 of 32"), and of every layer that is done
    Returns what `remanence compress` prints: sizes; every layer; the largest difference in logits between what was in
    memory and what is on disk (0 unless a file is wrong, which raises RuntimeError and leaves nothing; None where the
    model is too large to be loaded whole, or the run was resumed: then only every tensor was compared as it was
    written). Raises FileExistsError when there is something at `target`, ValueError when an unfinished run lies there
    and `resume` is False, or was another job; OSError when the disk is full: what is done stays, to be resumed.
    """
    start = time.perf_counter()
    steady_heap()
    with _unfinished(Path(target), job, resume) as (work, journal):
        run = _Run(job, work, journal, notify or (lambda _text, _layer: None))
        layers = run.units()
        run.writer.finish()
        quantization = None
        if job.recipe.spec is not None:
            schemes = _schemes(job.recipe.spec, job.recipe.activation, layers)
            quantization = ct.to_config(schemes, job.dense) | mark(job.recipe, run.writer.stem, has_experts(job.model))
        elif job.sparse:
            quantization = sparse_config(
                ShardReader(work, OWN_STEM).keys(), job.dense, job.recipe, has_experts(job.model)
            )
        write_config(job.model, work, quantization)
        tokenizer.save_pretrained(work)
        (work / _JOURNAL).unlink()
        difference = run.difference()
        if difference:
            shutil.rmtree(work)
            raise RuntimeError(f"{target}: reads back with logits off by {difference:g}; nothing was written")
    return _made(job.recipe, target, job.parameters, difference, job.stock_readable, layers, start)


def _schemes(spec: QuantSpec, a: ActivationSpec | None, layers: Sequence[LayerReport]) -> dict[str, ct.Scheme]:
    """How every layer is stored, from what was reported of it: a resumed run has not seen the first ones."""
    found = {}
    for layer in layers:
        activation = None
        if a is not None:
            activation = ActivationSpec(layer.input_bits, a.symmetric, not layer.input_static, narrow=a.narrow)
        found[layer.name] = ct.Scheme(replace_fields(spec, bits=layer.bits or spec.bits), activation)
    return found


def unfinished(target: Path) -> Path:
    """Where the work for `target` lies until it is done."""
    target = target.absolute()
    return target.parent / f".{target.name}.unfinished"


@contextmanager
def _unfinished(target: Path, job: Job, resume: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The directory beside `target` where the work lies until it is done, and the journal of what is done."""
    work = unfinished(target)
    journal: dict[str, Any] = {"job": job.identity(), "layers": [], "done": 0}
    if (work / _JOURNAL).is_file():
        if not resume:
            raise ValueError(f"out: an unfinished run lies in {work}; go on with it (--resume), or remove it")
        found = read_json(work / _JOURNAL)
        for key, value in journal["job"].items():
            if found.get("job", {}).get(key) != value:
                was = found.get("job", {}).get(key)
                raise ValueError(f"resume: {key}: the unfinished run in {work} had {was!r}, this one has {value!r}")
        journal = found
    elif work.exists():
        shutil.rmtree(work)
    # What is done stays when the disk is full or memory runs out, as when the process is killed.
    with publish(work, target, keep=(OSError, RuntimeError, MemoryError)):
        if not (work / _JOURNAL).is_file():
            write_json(work / _JOURNAL, journal)
        yield work, journal


class _Run:
    """A job being carried out in the directory `work`."""

    def __init__(self, job: Job, work: Path, journal: dict[str, Any], notify: Notify) -> None:
        self.job, self.work, self.journal, self.notify = job, work, journal, notify
        for part in work.glob("*.part-*.safetensors"):
            if int(part.name.split(".part-")[1][:5]) >= journal["done"]:
                part.unlink()  # written, but not what follows from it
        for left in work.glob(f".{_JOURNAL}.tmp-*"):
            left.unlink()
        for block in range(self.first):
            self.forget(block)
        self.writer = ShardWriter.resume(work, "model" if job.stock_readable else OWN_STEM)
        self.calls: list[Calls] = []
        self.cut: Cut | None = None
        # A short sequence that goes through every block as it is compressed, to compare with what is read back.
        self.probe: Hidden | None = None
        self.probe_calls: list[Calls] = []
        self.ids = torch.arange(min(_PROBE, job.model.config.get_text_config().vocab_size))[None]

    @property
    def first(self) -> int:
        """The first decoder block that is not done yet."""
        return max(0, self.journal["done"] - len(self.job.units) + len(self.job.blocks))

    def units(self) -> list[LayerReport]:
        """Do what is not done yet."""
        job, journal = self.job, self.journal
        done = journal["done"]
        if done < len(job.units):
            self.cut = job.cut()
            trim_heap()
        self.enter(fresh=done == 0, block=self.first)
        for number, unit in list(enumerate(job.units))[done:]:
            title = ", ".join(unit.modules) if unit.block is None else f"block {unit.block + 1} of {len(job.blocks)}"
            self.notify(title, None)
            layers = self.compress(unit)
            self.write(number, unit)
            journal |= {"done": number + 1, "layers": journal["layers"] + [asdict(layer) for layer in layers]}
            write_json(self.work / _JOURNAL, journal)
            for layer in layers:
                self.notify(title, layer)
            if unit.block is not None:
                self.forget(unit.block)
        self.forget(len(job.blocks))
        return [LayerReport(**layer) for layer in journal["layers"]]

    def enter(self, fresh: bool, block: int) -> None:
        """Run what comes before the decoder blocks; `block` is the first that is not done yet."""
        job = self.job
        small = fresh and job.small
        if not (small or job.recipe.calibrated) or block == len(job.blocks):
            return
        head = job.model.get_output_embeddings()
        outside = [name for unit in job.units if unit.block is None for name in unit.modules]
        outside = [name for name in outside if job.model.get_submodule(name) is not head]
        for name in outside:
            self.fill(name)
        # What enters the blocks of a compressed model; some have layers in front of them.
        dense = {name: job.model.get_submodule(name) for name in job.layers if within(name, outside)}
        for name in dense:
            self.compress_layer(name)
        if job.recipe.calibrated:
            hidden = self.hidden(0) if block == 0 else None
            self.calls = enter(job.model, job.batches, hidden)
            if hidden is not None:
                hidden.close()
                if needs_dense(job.recipe):
                    shutil.copyfile(_path(self.work, "hidden", 0), _path(self.work, "dense", 0))
        if small:
            self.probe = Hidden([self.ids], self.width, job.model.dtype)
            try:
                self.probe_calls = enter(job.model, [self.ids], self.probe)
            except ValueError:  # a model that cannot be run block by block can be rounded all the same
                self.probe = None
        for name, module in dense.items():
            replace(job.model, name, module)
        for name in outside:
            hollow_(job.model.get_submodule(name))
        trim_heap()

    def compress(self, unit: Unit) -> list[LayerReport]:
        """Read a unit's weights and compress them, in place."""
        job, layers = self.job, []
        for name in unit.modules:
            self.fill(name)
        if unit.block is not None and job.recipe.calibrated:
            k, dense = unit.block, needs_dense(job.recipe)
            before, after = self.hidden(k), self.hidden(k + 1)
            dense_before, dense_after = (self.hidden(j, "dense") if dense else None for j in (k, k + 1))
            block = make_block(job.model, unit.modules[0], set(job.layers), self.calls[k], before, dense_before)
            layers = compress_block_(block, job.recipe, after, dense_after, self.cut)
            for states in (before, after, dense_before, dense_after):
                if states is not None:
                    states.close()
        else:
            layers = [self.compress_layer(name) for name in job.layers if within(name, unit.modules)]
        if unit.block is not None and self.probe is not None:
            name, calls = unit.modules[0], self.probe_calls[unit.block]
            with torch.no_grad():
                module = job.model.get_submodule(name)
                self.probe.write(0, Block(name, module, {}, job.model.config, calls, self.probe).forward(0))
        return layers

    def compress_layer(self, name: str) -> LayerReport:
        """One layer, in place, without data."""
        layer: Any = self.job.model.get_submodule(name)
        return round_(self.job.model, name, layer, self.job.recipe, self.cut)

    def write(self, number: int, unit: Unit) -> None:
        """Write a unit as it is now, and forget it."""
        model = self.job.model
        sparse = self.job.layers if self.job.sparse else ()
        state = {key: value for name in unit.modules for key, value in packed_state(model, name, sparse).items()}
        state = {key: value for key, value in state.items() if key not in self.job.repeated}
        self.writer.write(number, in_files(fuse(state, self.job.fused), self.job.file_names))
        del state
        for name in unit.modules:
            hollow_(model.get_submodule(name))
        trim_heap()

    def fill(self, name: str) -> None:
        module = self.job.model.get_submodule(name)
        fill_(module, name, self.job.mapping, self.job.reader)
        for inner, parameter in module.named_parameters():
            if not finite(parameter):
                raise ValueError(f"{self.job.recipe}: {_join(name, inner)}: contains NaN or infinity")
        module.to(self.job.device)

    @property
    def width(self) -> int:
        return self.job.model.config.get_text_config().hidden_size

    def hidden(self, block: int, kind: str = "hidden") -> Hidden:
        """What goes into decoder block `block`."""
        return Hidden(self.job.batches, self.width, self.job.model.dtype, _path(self.work, kind, block))

    def forget(self, block: int) -> None:
        for kind in ("hidden", "dense"):
            _path(self.work, kind, block).unlink(missing_ok=True)

    def difference(self) -> float | None:
        """Largest difference in logits between the blocks as they were in memory and as they are on disk."""
        if self.probe is None:
            return None
        model = load_model(self.work)
        unfuse_experts_(model)  # fused they add up in another order
        last = model.get_submodule(self.job.blocks[-1])
        with torch.no_grad():
            read = model(self.ids).logits
            kept = self.probe.read(0)

            def put_back(module: nn.Module, inputs: object, output: Any) -> Any:  # noqa: ARG001
                return (kept, *output[1:]) if isinstance(output, tuple) else kept

            handle = last.register_forward_hook(put_back)
            was = model(self.ids).logits
            handle.remove()
        return float((read - was).abs().max())


def _path(work: Path, kind: str, block: int) -> Path:
    return work / f"{kind}-{block:05}.bin"
