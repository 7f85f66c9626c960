"""A checkpoint in pieces: tensors read from its shards one by one, a model that is hollow until they are put in, and
shards written one by one, so that a model larger than memory is compressed block by block and a killed run goes on.

The safetensors format is read and written here (8 bytes: length of the header; the header in JSON: name, dtype, shape,
offsets; the tensors' bytes), because `safe_open` maps the whole file: under a limit of address space that fails, and
under a limit of resident memory what counts depends on the system's mood. Here the memory is the tensors that were
asked for, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, KeysView
from itertools import combinations
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from .checkpoint import _check_config, _check_index, _readable, has_experts
from .experts import Source, source_keys, unfuse_experts_
from .files import _sync, disk_errors, read_json, write_json
from .places import local_model

# In the order in which safetensors lays out a file, from last to first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
_RANK = {tag: rank for rank, tag in enumerate(DTYPES)}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_PIECE = 1 << 24  # bytes read at once where a tensor is cast or compared


class Entry(NamedTuple):
    """Where a tensor lies: its bytes are `start` to `end` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ValueError, naming file and tensor, for whatever the format forbids: a header that is no such JSON, a dtype
    unknown, tensors that overlap, leave holes or do not end where the file ends.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"{path}: header of {length} bytes in a file of {size} bytes; not a safetensors file")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: header is {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not an object of texts")
    entries = {name: _entry(f"{path}: {name!r}", value, 8 + length) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    end = 8 + length
    for name, entry in entries.items():
        if entry.start != end:
            wrong = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise ValueError(f"{path}: {name!r}: data_offsets: {wrong} (byte {entry.start}, expected {end})")
        end = entry.end
    if end != size:
        last = next(reversed(entries), None)
        raise ValueError(f"{path}: {size} bytes, but its last tensor, {last!r}, ends at byte {end}")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
    return value


def _entry(where: str, value: Any, offset: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ValueError(f"{where}: dtype: {value['dtype']!r} is not one of {', '.join(DTYPES)}")
    for field in ("shape", "data_offsets"):
        numbers = value[field]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{where}: {field}: {str(numbers)[:80]} is not a list of numbers from 0")
    if len(value["data_offsets"]) != 2:
        raise ValueError(f"{where}: data_offsets: {value['data_offsets']} are not two")
    (start, end), shape, dtype = value["data_offsets"], tuple(value["shape"]), DTYPES[value["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where}: data_offsets: {end - start} bytes for shape {list(shape)} of {value['dtype']}")
    return Entry(dtype, shape, offset + start, offset + end)


class ShardReader:
    """Every tensor of the checkpoint in `directory`, by its name in the files; bytes are read only when asked for.

    Reads what transformers would: `<stem>.safetensors`, else the files that `<stem>.safetensors.index.json` names.

    Raises FileNotFoundError when there is neither, ValueError for damaged files, and for an index that points outside
    the directory or does not say what is in the files.
    """

    def __init__(self, directory: Path | str, stem: str = "model") -> None:
        self.directory = Path(directory)
        self._where: dict[str, tuple[Path, Entry]] = {}
        self._parts: dict[str, Source] = {}
        single, index = self.directory / f"{stem}.safetensors", self.directory / f"{stem}.safetensors.index.json"
        if single.is_file():
            self._where = {key: (single, entry) for key, entry in read_header(single).items()}
            return
        if not index.is_file():
            raise FileNotFoundError(f"{self.directory}: neither {single.name} nor {index.name} in it")
        _check_index(self.directory)
        listed: dict[str, str] = read_json(index)["weight_map"]
        for file in sorted(set(listed.values())):
            for key, entry in read_header(self.directory / file).items():
                if listed.get(key) != file:
                    raise ValueError(f"{index}: {key!r} is in {file}, but listed in {listed.get(key)}")
                self._where[key] = (self.directory / file, entry)
        if lost := sorted(listed.keys() - self._where.keys()):
            raise ValueError(f"{index}: {lost[0]!r} is not in {listed[lost[0]]}, as listed")

    def keys(self) -> KeysView[str]:
        return self._where.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._where[key][1].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._where[key][1].dtype

    def bytes(self, key: str) -> int:
        """Its size in the file."""
        entry = self._where[key][1]
        return entry.end - entry.start

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """A fresh tensor, as stored or cast to `dtype`; takes its own bytes and, for a cast, 16 MiB more.

        Raises ValueError for a file that has become shorter.
        """
        if key in self._parts:
            part = self._parts[key]
            return part.take(self._read(*self._part(part), dtype)).contiguous()
        return self._read(*self._where[key], dtype)

    def part(self, source: Source) -> str:
        """The key under which an expert's part of a fused tensor is known here from now on; takes what it reads."""
        if source.expert is None:
            return source.key
        key = f"{source.key}[{source.expert}, {source.features}]"
        path, entry = self._part(source)
        shape = source.take(torch.empty(entry.shape, device="meta")).shape
        self._parts[key] = source
        self._where[key] = path, entry._replace(shape=tuple(shape))
        return key

    def _part(self, source: Source) -> tuple[Path, Entry]:
        """Where that expert's numbers lie, which are in one piece."""
        path, entry = self._where[source.key]
        assert source.expert is not None
        size = (entry.end - entry.start) // entry.shape[0]
        start = entry.start + source.expert * size
        return path, Entry(entry.dtype, entry.shape[1:], start, start + size)

    def _read(self, path: Path, entry: Entry, dtype: torch.dtype | None) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=dtype or entry.dtype)
        if tensor.dtype == entry.dtype:
            with path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                _read_into(file, tensor, path)
            return tensor
        flat, done = tensor.reshape(-1), 0
        for piece in _pieces(path, entry):
            flat[done : done + len(piece)] = piece
            done += len(piece)
        return tensor

    def same(self, key: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; takes 32 MiB."""
        (path, a), (other_path, b) = self._where[key], self._where[other]
        if a[:2] != b[:2]:
            return False
        pairs = zip(_pieces(path, a), _pieces(other_path, b))
        return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _read_into(file: Any, tensor: Tensor, path: Path) -> None:
    left = _memory(tensor)
    while len(left):
        count = file.readinto(left)
        if not count:
            raise ValueError(f"{path}: ends {len(left)} bytes too early; it has changed since its header was read")
        left = left[count:]


def _pieces(path: Path, entry: Entry) -> Iterator[Tensor]:
    """The tensor's elements in order, in one flat buffer that is used again and again."""
    count = math.prod(entry.shape)
    buffer = torch.empty(min(count, _PIECE // entry.dtype.itemsize), dtype=entry.dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        for start in range(0, count, max(1, len(buffer))):
            piece = buffer[: count - start]
            _read_into(file, piece, path)
            yield piece


def hollow_model(directory: Path | str) -> PreTrainedModel:
    """The dense model in `directory` without its weights: parameters and saved buffers on the meta device, all other
    buffers (rotary frequencies, causal masks) real, in eval mode; `fill_` puts the weights in.

    As from_pretrained makes it: dtype of the config, else the one that most of the checkpoint has; parameters that
    transformers keeps in float32; a head tied to the embedding unless the file holds two that differ.

    Raises FileNotFoundError for what is no model directory, ValueError for damaged files, a config that names outside
    code, or a model that is quantized already.
    """
    path = local_model(directory)
    if path is None:
        raise FileNotFoundError(f"{directory}: no such directory; download the model first")
    raw = read_json(path / "config.json")
    _check_config(path, raw)
    for key, hint in (("quantization_config", "start from the dense model"), ("transformers_weights", "rename them")):
        if raw.get(key):
            raise ValueError(f"{path}/config.json: {key}: weights that are not read block by block; {hint}")
    reader = ShardReader(path)
    with _readable(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            dtype = config.dtype or _main_dtype(reader)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if model.can_generate() and (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    model.config.name_or_path = str(directory)
    unfuse_experts_(model)
    _keep_float32_(model, dtype)
    _untie_(model, reader)
    _set_buffers_(model)
    return model.eval()


def _main_dtype(reader: ShardReader) -> torch.dtype:
    """The floating dtype of most elements."""
    count = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, torch.float64), 0)
    for key in reader.keys():  # noqa: SIM118 (no mapping)
        if reader.dtype(key) in count:
            count[reader.dtype(key)] += math.prod(reader.shape(key))
    return max(count, key=count.__getitem__)


def _keep_float32_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that transformers loads in float32 whatever the model's dtype is (routers, some norms)."""
    patterns = [re.compile(glob.replace("*", ".*")) for glob in model._get_dtype_plan(dtype)]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            _put(model, name, _like(tensor, torch.empty_like(tensor, dtype=torch.float32)))


def _untie_(model: PreTrainedModel, reader: ShardReader) -> None:
    """Separate parameters that the config ties and the files give different values, as from_pretrained does."""
    found = _found(model, reader)
    for twins in _shared(model).values():
        stored = {name: found[name] for name in twins if name in found}
        for name, other in combinations(stored, 2):
            if not reader.same(stored[name], stored[other]):
                tensor = model.get_parameter(other)
                _put(model, other, _like(tensor, torch.empty_like(tensor)))


def _set_buffers_(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, through the model's own initialisation, as from_pretrained does."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # these it leaves alone
    left = {torch.bool: False, torch.uint8: 255}
    empty = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        value = float("nan") if buffer.is_floating_point() else left.get(buffer.dtype, -(2**7))
        empty[name] = torch.full_like(buffer, value, device="cpu")
        _put(model, name, empty[name].clone())
    model.initialize_weights()
    for name, buffer in model.named_non_persistent_buffers(remove_duplicate=False):
        before = empty.get(name)
        # A mask may be all False; nothing else is all NaN or all -128 by right.
        if (
            before is None
            or buffer.is_meta
            or (before.numel() and before.dtype != torch.bool and torch.equal(_bits(buffer), _bits(before)))
        ):
            raise ValueError(f"{type(model).__name__}: {name}: a buffer that its initialisation does not set")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def names(model: PreTrainedModel, reader: ShardReader) -> dict[str, str]:
    """Name in the model -> name in the files, for every parameter and saved buffer.

    They are equal, or differ by the base model's prefix ("transformer." for GPT-2) or as transformers renames them
    (GPT-NeoX: "embed_out" is "lm_head"); parameters that are one, as a head tied to its embedding, have each a name
    here and may have a single one in the files.

    Raises ValueError that lists what is missing, what no module asks for (save what transformers drops as well), and
    shapes that differ.
    """
    tensors = model.state_dict(keep_vars=True)
    found = _with_experts(model, reader) if has_experts(model) else _found(model, reader)
    unexpected = [key for name, key in found.items() if name not in tensors and not _dropped(name, key, model, reader)]
    found = {name: key for name, key in found.items() if name in tensors}
    for twins in _shared(model).values():
        stored = [found[name] for name in twins if name in found]
        found |= {name: stored[0] for name in twins if stored and name not in found}
    problems = {
        "missing": [name for name in tensors if name not in found],
        "unexpected": sorted(unexpected),
        "of another shape or kind": [
            f"{key} {list(reader.shape(key))} {reader.dtype(key)} for {list(tensors[name].shape)} {tensors[name].dtype}"
            for name, key in found.items()
            if reader.shape(key) != tensors[name].shape
            or reader.dtype(key).is_floating_point != tensors[name].is_floating_point()
        ],
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems.items() if keys]
        raise ValueError(f"{reader.directory}: not the tensors of {type(model).__name__}; {'; '.join(parts)}")
    return {name: found[name] for name in tensors}


def _with_experts(model: PreTrainedModel, reader: ShardReader) -> dict[str, str]:
    """As `_found`, for a model whose experts are apart; in the files they may be fused."""
    sources = source_keys(model, reader.keys())
    left = reader.keys() - {source.key for source in sources.values()}
    return {key: key for key in left} | {name: reader.part(source) for name, source in sources.items()}


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")


def _found(model: PreTrainedModel, reader: ShardReader) -> dict[str, str]:
    """Name that the model has, or would have, for each tensor of the files -> its name there."""
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    tensors, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    found: dict[str, str] = {}
    for key in reader.keys():  # noqa: SIM118 (no mapping)
        name = rename_source_key(key, renamings, [], prefix, tensors)[0]
        if name not in tensors and key in tensors:
            name = key
        if name in found:
            raise ValueError(f"{reader.directory}: {found[name]} and {key} are both {name}")
        found[name] = key
    return found


def _shared(model: nn.Module) -> dict[int, list[str]]:
    """Names of parameters that are one object, by its id, for those with more than one name."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {key: names for key, names in groups.items() if len(names) > 1}


def _dropped(name: str, key: str, model: PreTrainedModel, reader: ShardReader) -> bool:
    """Whether it is what older versions saved and newer ones compute: transformers drops it, too."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    own = [buffer for buffer, _ in model.named_buffers()]
    patterns += [p for p in (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$") if any(re.search(p, o) for o in own)]
    if any(re.search(pattern, name) for pattern in patterns):
        return True
    shape = reader.shape(key)  # a causal mask [1, 1, T, T], and what stands for minus infinity in it
    mask = shape == () or (shape[:2] == (1, 1) and len(shape) == 4 and shape[2] == shape[3])
    return mask and re.search(r"(attn|attention)\.(masked_)?bias$", name) is not None


def fill_(module: nn.Module, prefix: str, mapping: dict[str, str], reader: ShardReader) -> None:
    """Read the parameters and saved buffers of `module`, called `prefix` in the model ("" for the model), in its dtype.

    mapping is that of `names`. What is tied within `module` stays tied; what is tied across modules that are filled one
    by one is read for each, with equal values. Takes the module's bytes, and 16 MiB where the file has another dtype.

    Raises ValueError for a tensor that `mapping` does not know.
    """
    tensors = module.state_dict(keep_vars=True)
    done: dict[int, Tensor] = {}
    for name, old in tensors.items():
        full = f"{prefix}.{name}" if prefix else name
        if full not in mapping:
            raise ValueError(f"{full}: not a tensor of the checkpoint in {reader.directory}")
        if id(old) not in done:
            done[id(old)] = _like(old, reader.read(mapping[full], old.dtype))
        _put(module, name, done[id(old)])


def hollow_(module: nn.Module) -> None:
    """Parameters and saved buffers back to the meta device; their memory is free unless something else holds them.

    glibc keeps what it got for tensors between 128 KiB and 32 MiB: see `footprint.steady_heap` and `trim_heap`.
    """
    tensors = module.state_dict(keep_vars=True)
    done: dict[int, Tensor] = {}
    for name, old in tensors.items():
        if id(old) not in done:
            done[id(old)] = _like(old, torch.empty_like(old, device="meta"))
        _put(module, name, done[id(old)])


def _like(old: Tensor, value: Tensor) -> Tensor:
    """`value` as a parameter where `old` is one."""
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, tensor)


class ShardWriter:
    """Writes a checkpoint into the unfinished directory `work`, one part per call; `finish` gives the parts the names
    that Hugging Face readers look for.

    Parts are called `<stem>.part-<number>.safetensors` until then, so that no reader takes the directory for a model.
    A part is there whole and verified or not at all, and the files depend on nothing but the tensors: after a kill at
    any point, `ShardWriter.resume`, the parts that are lacking and `finish` give the same bytes.
    """

    def __init__(self, work: Path, stem: str = "model") -> None:
        """Raises ValueError when there are parts already."""
        self._open(work, stem)
        if self._files:
            raise ValueError(f"{work}: has {len(self._files)} parts of {stem!r} already; resume it or empty it")

    @classmethod
    def resume(cls, work: Path, stem: str = "model") -> ShardWriter:
        """Go on where a killed writer stopped: `parts` are those that need not be written again.

        Raises ValueError for parts that are damaged or do not belong together.
        """
        writer = cls.__new__(cls)
        writer._open(work, stem)
        for pattern in (f".{stem}.part-*.tmp", f".{stem}.safetensors.index.json.tmp-*"):
            for left in writer.work.glob(pattern):
                left.unlink()
        return writer

    def _open(self, work: Path, stem: str) -> None:
        self.work, self.stem = Path(work), stem
        self._files: dict[int, Path] = {}
        self._keys: dict[str, int] = {}
        self._total: int | None = None  # how many parts there are, known from the first final name on
        unfinished = re.compile(re.escape(stem) + r"\.part-(\d{5})\.safetensors")
        final = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})\.safetensors")
        for path in sorted(self.work.iterdir()):
            if match := unfinished.fullmatch(path.name):
                self._add(int(match[1]), path)
            elif match := final.fullmatch(path.name):
                self._add(int(match[1]) - 1, path, int(match[2]))
            elif path.name == f"{stem}.safetensors":
                self._add(0, path, 1)
        if self._total and (beyond := [self._files[n].name for n in self._files if n >= self._total]):
            raise ValueError(f"{work}: {beyond[0]}: beyond the {self._total} parts that there are by the others' names")

    def _add(self, number: int, path: Path, total: int | None = None) -> None:
        if number in self._files or (total and total != (self._total or total)):
            raise ValueError(f"{path}: beside {next(iter(self._files.values())).name}; not parts of one checkpoint")
        for key in read_header(path):
            if key in self._keys:
                raise ValueError(f"{path}: {key!r} is in {self._files[self._keys[key]].name} too")
            self._keys[key] = number
        self._files[number] = path
        self._total = total or self._total

    @property
    def parts(self) -> set[int]:
        """Numbers of the parts that are written."""
        return set(self._files)

    def write(self, number: int, state: dict[str, Tensor]) -> None:
        """Write part `number` (they count from 0, in any order), read it back from disk and compare; tensors on any
        device. Takes no memory but a copy of a tensor that is not contiguous, and 16 MiB.

        Raises ValueError for a part or a tensor that is there already or cannot be stored, RuntimeError when it reads
        back otherwise, OSError when the disk is full; nothing is left then.
        """
        if number in self._files or self._total is not None or not 0 <= number < 99999:
            raise ValueError(f"number: {number} is written already, or not from 0 to 99998, or all is finished")
        if not state:
            raise ValueError(f"state: part {number} has no tensors")
        for key, tensor in state.items():
            if key in self._keys or not key or key == "__metadata__":
                raise ValueError(f"state: {key!r}: written already, or not a name")
            if tensor.dtype not in _TAGS or tensor.is_meta or tensor.layout != torch.strided:
                raise ValueError(f"state: {key!r}: {tensor.dtype} on {tensor.device} cannot be stored")
        path = self.work / f"{self.stem}.part-{number:05}.safetensors"
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with disk_errors(path), temporary.open("w+b") as file:
                _write(file, state)
                _verify(temporary, state)
            os.replace(temporary, path)
            _sync(self.work)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._files[number] = path
        self._keys |= dict.fromkeys(state, number)

    def finish(self) -> list[Path]:
        """Give the parts their final names and write the index last; the files, in order. May be called again.

        Raises ValueError when a part is lacking.
        """
        total = self._total or len(self._files)
        if not total or set(self._files) != set(range(total)):
            lost = sorted(set(range(max([total, *(n + 1 for n in self._files)]))) - set(self._files))
            raise ValueError(f"{self.work}: parts {lost[:5]} of {self.stem!r} are not written")
        for number, path in sorted(self._files.items()):
            name = f"{self.stem}-{number + 1:05}-of-{total:05}" if total > 1 else self.stem
            self._files[number] = path.rename(path.with_name(f"{name}.safetensors"))
            self._total = total
        _sync(self.work)
        files = [self._files[number] for number in range(total)]
        if total > 1:
            entries = [entry for path in files for entry in read_header(path).values()]
            index = {
                "metadata": {"total_size": sum(entry.end - entry.start for entry in entries)},
                "weight_map": {key: self._files[number].name for key, number in sorted(self._keys.items())},
            }
            write_json(self.work / f"{self.stem}.safetensors.index.json", index)
            _sync(self.work)
        return files


def _write(file: BinaryIO, state: dict[str, Tensor]) -> None:
    """The bytes that safetensors itself would write: tensors by dtype, then by name."""
    order = sorted(state, key=lambda key: (-_RANK[_TAGS[state[key].dtype]], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        start, end = end, end + state[key].numel() * state[key].element_size()
        header[key] = {
            "dtype": _TAGS[state[key].dtype],
            "shape": list(state[key].shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for key in order:
        file.write(_memory(state[key].detach().cpu().contiguous()))
    file.flush()
    os.fsync(file.fileno())
    # Read back from the disk, not from memory.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _verify(path: Path, state: dict[str, Tensor]) -> None:
    entries = read_header(path)
    good = entries.keys() == state.keys()
    for key, entry in entries.items() if good else ():
        good = good and (entry.dtype, entry.shape) == (state[key].dtype, tuple(state[key].shape))
        flat, done = state[key].detach().cpu().contiguous().reshape(-1), 0
        for piece in _pieces(path, entry):
            good = good and torch.equal(_bits(piece), _bits(flat[done : done + len(piece)]))
            done += len(piece)
        if not good:
            raise RuntimeError(f"{path}: {key!r} reads back otherwise than written; the disk or the memory is at fault")
    if not good:
        raise RuntimeError(f"{path}: reads back with other tensors than written; the disk or the memory is at fault")
