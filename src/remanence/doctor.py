"""What this machine and installation can do, why it computes as it does, and what is missing for the rest."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .backends.ascend import AscendDevice
from .backends.device import Device, Peak, detect, refusals
from .backends.energy.probes import survey
from .bench.roofline.ceilings import kept_ceilings
from .bench.roofline.measured import cache_bytes
from .config import default_cache
from .kernels.ascend.schemas import drift, release
from .kernels.limits import peaks, read_bandwidth
from .kernels.ops import available_isas
from .kernels.registry import Case, Choice, explain
from .machine import described, environment

_EXTRAS = {
    "peft": ("train", "LoRA, LoKU, the assistant of ULD"),
    "stable-baselines3": ("rl", "train the agent of early exits"),
    "lm-eval": ("eval", "tasks of lm-evaluation-harness"),
    "compressed-tensors": ("ct", "check exports in stock transformers"),
    "gptqmodel": ("gptq", "read GPTQ checkpoints through their own library"),
    "bitsandbytes": ("bnb", "NF4 and int8 as peers"),
    "triton": ("cuda", "CUDA kernels"),
    "torch-npu": ("ascend", "Ascend NPUs"),
}
_COMPILER = "Install a C++ compiler and install remanence again, or install a wheel"
# What a packed layer may be given, in words.
_INPUTS: dict[str, dict[str, Any]] = {
    "x in float32": {"dtype": torch.float32},
    "x in bfloat16": {"dtype": torch.bfloat16},
    "x rounded to 8 bits": {"act": 8},
}


def diagnose() -> dict[str, Any]:
    """Machine, versions, devices, kernels, optional packages, store; JSON values only."""
    cache = default_cache()
    existing = cache
    while not existing.exists():
        existing = existing.parent
    found = detect()
    return {
        **environment(),
        "kernel_isas": available_isas(),
        "devices": {each.name: _device(each, cache) for each in found},
        "missing_devices": {kind: ". ".join(why) for kind, why in refusals().items()},
        "energy": _energy(),
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(existing).free,
        "optional": {name: _version(name) for name in _EXTRAS},
    }


def _device(each: Device, cache: Path) -> dict[str, Any]:
    choices = {name: _choice(Case(each.kind, **case)) for name, case in _INPUTS.items()}
    told = each.peaks()
    measured = _measured() if each.kind == "cpu" else {}
    return {
        **each.info(),
        "summary": described(each),
        "free_bytes": each.free_memory(),
        "cache_bytes": cache_bytes(each),
        "peaks": {name: _as_json(peak) for name, peak in (told | measured).items()},
        "peaks_by_description": {name: _as_json(peak) for name, peak in told.items()},
        "ceilings": _ceilings(each, cache),
        "kernels": {name: asdict(choice) for name, choice in choices.items()},
        **(_ascend() if isinstance(each, AscendDevice) else {}),
    }


def _as_json(peak: Peak | None) -> dict[str, Any] | None:
    return None if peak is None else asdict(peak)


def _ceilings(each: Device, cache: Path) -> dict[str, Any]:
    """Those of a roofline, if they were measured before; what is wrong with a file that is not used."""
    wrong: list[str] = []
    kept = kept_ceilings(each, cache, wrong.append)
    if kept is None:
        return {"measured": None, "path": None, "reason": wrong[0] if wrong else "not measured yet"}
    return {"measured": kept.measured, "path": str(kept.path), "reason": None}


def _choice(case: Case) -> Choice:
    try:
        return explain(case)
    except ValueError as refusal:
        return Choice("none", str(refusal), {})


def _ascend() -> dict[str, Any]:
    return {"known_release": release(), "drift": drift()}


def _energy() -> dict[str, Any]:
    """Counters of energy: those that are there, and why each other is not."""
    found = survey()
    return {
        "probes": [{"name": p.name, "scope": p.scope, "method": p.method, "about": p.about()} for p in found.probes],
        "missing": [asdict(each) for each in found.missing],
    }


def _measured() -> dict[str, Peak | None]:
    """A CPU does not tell what it can do, but can be asked to do it."""
    rates = peaks()
    if rates:
        rates["memory"] = read_bandwidth()
    source = f"measured now, {torch.get_num_threads()} threads"
    return {name: Peak(rate, source) for name, rate in rates.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def show(found: dict[str, Any]) -> None:
    """Print a diagnosis."""
    print(
        f"remanence {found['remanence']}, python {found['python']}, torch {found['torch']}, "
        f"transformers {found['transformers']}"
    )
    for name, device in found["devices"].items():
        _show_device(name, device)
    built = ", ".join(found["kernel_isas"])
    print(f"native   {built or f'not built: plain torch computes. {_COMPILER}'}")
    for name, reason in found["missing_devices"].items():
        print(f"{name:<8} none: {reason}")
    for probe in found["energy"]["probes"]:
        print(f"energy   {probe['name']}: {probe['scope']}, {probe['method']}")
    for probe in found["energy"]["missing"]:
        print(f"energy   {probe['probe']} none: {probe['reason']}. {probe['remedy']}")
    print(f"cache    {found['cache']}, {found['cache_free_bytes'] / 2**30:.1f} GiB free")
    print("audits run on the CPU in this version; compress takes --device")
    print("\noptional packages")
    for package, (extra, purpose) in _EXTRAS.items():
        have = found["optional"][package]
        print(f"  {package:<20} {have or f'missing: pip install remanence[{extra}]'} ({purpose})")


def _show_device(name: str, device: dict[str, Any]) -> None:
    software = {"CUDA": "cuda", "CANN": "cann", "torch-npu": "torch_npu", "driver": "driver"}
    driver = "".join(f", {what} {device[key] or 'unknown'}" for what, key in software.items() if key in device)
    print(f"{name:<8} {device['summary']}, {device['free_bytes'] / 2**30:.1f} GiB free{driver}")
    known = {peak: rate for peak, rate in device["peaks"].items() if rate is not None}
    for peak, rate in known.items():
        described = device["peaks_by_description"][peak]
        beside = "" if described in (None, rate) else f"; {_rate(peak, described['value'])} {described['source']}"
        print(f"  peak   {peak}: {_rate(peak, rate['value'])} ({rate['source']}{beside})")
    if not known:
        print("  peaks  not known from the device itself")
    size = device["cache_bytes"]
    print(f"  cache  last level: {f'{size / 2**20:.0f} MiB' if size else 'not known'}")
    kept = device["ceilings"]
    when = kept["reason"] or f"measured {kept['measured']}, kept in {kept['path']}"
    print(f"  roofline ceilings: {when}")
    if "drift" in device:
        changes = [f"{operator} {change}" for operator, change in device["drift"].items()]
        print(f"  operators beside torch-npu {device['known_release']}: {'; '.join(changes) or 'the same'}")
    for case, choice in device["kernels"].items():
        print(f"  kernel {case}: {choice['kernel']} ({choice['arithmetic']})")
    reasons: dict[str, list[str]] = {}
    for kernel, reason in choice["others"].items():
        reasons.setdefault(reason, []).append(kernel)
    for reason, kernels in reasons.items():
        print(f"  not    {', '.join(kernels)}: {reason}")


def _rate(peak: str, value: float) -> str:
    return f"{value / 1e9:.0f} GB/s" if peak == "memory" else f"{value / 1e12:.3g} T operations/s"
