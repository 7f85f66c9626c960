"""ggml's product with 4-bit weights as a peer, from the libraries that llama-cpp-python brings; no model is read.

ggml rounds x to 8 bits in blocks of 32 (Q4_0, Q4_K, IQ4_NL); on a CPU it lays the weight out anew where it has a faster
layout ("repack"), which is the one timed.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {"ggml Q4_0": 2, "ggml IQ4_NL": 20, "ggml Q4_K": 12}
_F32 = 0
_NODES = 8  # of a graph that holds one product
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS
_PACKAGE = "llama_cpp"


class _Init(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def missing() -> str | None:
    """None where the libraries are installed, else a line that says so."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return "ggml: llama-cpp-python is not installed"
    return None


@cache
def _library() -> Any:
    """All functions of the two libraries; each returns an address unless it is said otherwise."""
    found = importlib.util.find_spec(_PACKAGE)
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so"), ctypes.RTLD_GLOBAL) for name in ("base", "cpu"))

    class Library:
        def __getattr__(self, name: str) -> Any:
            function = getattr(cpu if name.startswith("ggml_backend_cpu") else base, name)
            function.restype = ctypes.c_size_t if name in _SIZES else ctypes.c_void_p
            setattr(self, name, function)
            return function

    return Library()


_SIZES = ("ggml_row_size", "ggml_tensor_overhead", "ggml_graph_overhead_custom", "ggml_quantize_chunk")


@cache
def _backend() -> Any:
    return ctypes.c_void_p(_library().ggml_backend_cpu_init())


@cache
def _layout() -> Any:
    """The buffer type with layouts of its own, else the plain one."""
    lib = _library()
    device = ctypes.c_void_p(lib.ggml_backend_get_device(_backend()))
    registry = ctypes.c_void_p(lib.ggml_backend_dev_backend_reg(device))
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        types = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        lib.ggml_backend_buft_name.restype = ctypes.c_char_p
        for one in _listed(types):
            if b"REPACK" in lib.ggml_backend_buft_name(ctypes.c_void_p(one)):
                return ctypes.c_void_p(one)
    return ctypes.c_void_p(lib.ggml_backend_get_default_buffer_type(_backend()))


def _listed(addresses: Any) -> list[int]:
    """A list in C that ends with null."""
    found: list[int] = []
    while addresses and addresses[len(found)]:
        found.append(addresses[len(found)])
    return found


class Weight:
    """One copy of a weight [N, K] in a type of ggml's; products with it, a graph for each number of rows of x."""

    def __init__(self, weight: Tensor, kind: int) -> None:
        lib = _library()
        n, k = weight.shape
        weight = weight.float().contiguous()
        codes = ctypes.create_string_buffer(lib.ggml_row_size(kind, ctypes.c_int64(k)) * n)
        rows = (ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k))
        lib.ggml_quantize_chunk(kind, ctypes.c_void_p(weight.data_ptr()), codes, *rows, None)
        self._place(n, k, kind, codes)

    def copy(self) -> Weight:
        """The same in memory of its own."""
        other = object.__new__(Weight)
        other._place(self.n, self.k, self._kind, self._codes)
        return other

    def _place(self, n: int, k: int, kind: int, codes: Any) -> None:
        lib = _library()
        self.n, self.k, self.bytes, self._kind, self._codes = n, k, len(codes), kind, codes
        self._held: list[tuple[Any, Any]] = []
        self._graphs: dict[int, tuple[Any, Any, Any]] = {}
        context = self._context(2)
        self._tensor = self._matrix(context, kind, n)
        lib.ggml_backend_buffer_set_usage(self._allocate(context, _layout()), _WEIGHTS)
        lib.ggml_backend_tensor_set(self._tensor, codes, ctypes.c_size_t(0), ctypes.c_size_t(len(codes)))

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, K] float32 -> y [M, N] float32."""
        lib, rows = _library(), len(x)
        if rows not in self._graphs:
            self._graphs[rows] = self._graph(rows)
        graph, given, result = self._graphs[rows]
        y = x.new_empty(rows, self.n)
        zero = ctypes.c_size_t(0)
        lib.ggml_backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        lib.ggml_backend_tensor_set(given, ctypes.c_void_p(x.data_ptr()), zero, ctypes.c_size_t(4 * x.numel()))
        lib.ggml_backend_graph_compute(_backend(), graph)
        lib.ggml_backend_tensor_get(result, ctypes.c_void_p(y.data_ptr()), zero, ctypes.c_size_t(4 * y.numel()))
        return y

    def _graph(self, rows: int) -> tuple[Any, Any, Any]:
        lib = _library()
        context = self._context(_NODES, lib.ggml_graph_overhead_custom(ctypes.c_size_t(_NODES), False))
        given = self._matrix(context, _F32, rows)
        result = ctypes.c_void_p(lib.ggml_mul_mat(context, self._tensor, given))
        graph = ctypes.c_void_p(lib.ggml_new_graph_custom(context, ctypes.c_size_t(_NODES), False))
        lib.ggml_build_forward_expand(graph, result)
        plain = ctypes.c_void_p(lib.ggml_backend_get_default_buffer_type(_backend()))
        self._allocate(context, plain)
        return graph, given, result

    def _context(self, tensors: int, more: int = 0) -> Any:
        size = _library().ggml_tensor_overhead() * tensors + more
        return ctypes.c_void_p(_library().ggml_init(_Init(size, None, True)))

    def _allocate(self, context: Any, kind: Any) -> Any:
        buffer = ctypes.c_void_p(_library().ggml_backend_alloc_ctx_tensors_from_buft(context, kind))
        self._held.append((context, buffer))
        return buffer

    def __del__(self) -> None:
        for context, buffer in self._held:
            _library().ggml_backend_buffer_free(buffer)
            _library().ggml_free(context)

    def _matrix(self, context: Any, kind: int, rows: int) -> Any:
        size = (ctypes.c_int64(self.k), ctypes.c_int64(rows))
        return ctypes.c_void_p(_library().ggml_new_tensor_2d(context, kind, *size))
