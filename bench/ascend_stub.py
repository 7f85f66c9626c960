"""CANN libraries that do nothing, with which the real torch-npu can be loaded where there is neither CANN nor an NPU.

torch-npu's wheel is linked to six libraries of CANN and looks up the rest by name. Those names are read from the wheel
(nm, and the strings of its library), and a C file of functions with these names is compiled: device memory is host
memory, so that copies are real; events and streams are numbers; every kernel (aclnn...) returns at once, after writing
its name to stderr where STUB_TRACE is set. What torch-npu's C++ accepts or refuses on the way is real, numbers are not.

    STUB_CHIP   the chip, e.g. Ascend910B4;  STUB_DEVICES   how many there are
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

LIBRARIES = ("ascendcl", "acl_op_compiler", "opapi", "hccl", "ge_runner", "graph", "acl_tdt_channel")
TOOLS = ("gcc", "nm")
_HEAD = "#include <stdint.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"
_PREFIX = re.compile(r"(acl|Msprof|rt[A-Z]|Hccl)")
# Functions of the runtime that have to answer.
_ANSWERS = {
    "aclrtGetSocName": 'const char *NAME() { const char *e = getenv("STUB_CHIP"); return e ? e : "Ascend910B4"; }',
    "aclGetRecentErrMsg": 'const char *NAME() { return "nothing: these libraries do nothing"; }',
    "aclrtGetDeviceCount": (
        'int NAME(uint32_t *n) { const char *e = getenv("STUB_DEVICES"); *n = e ? atoi(e) : 1; return 0; }'
    ),
    "aclrtGetDevice": "int NAME(int32_t *d) { *d = 0; return 0; }",
    "aclrtGetDeviceInfo": "int NAME(uint32_t d, int k, int64_t *v) { *v = 20; return 0; }",
    "aclrtGetMemInfo": "int NAME(int k, size_t *f, size_t *t) { *f = *t = (size_t)8 << 30; return 0; }",
    "aclrtGetCurrentContext": "int NAME(void **c) { *c = (void *)16; return 0; }",
    "aclrtMemset": "int NAME(void *d, size_t m, int32_t v, size_t n) { memset(d, v, n); return 0; }",
    "aclrtPointerGetAttributes": "int NAME(const void *p, void *a) { memset(a, 0, 8); return 0; }",
    "aclrtQueryEventStatus": "int NAME(void *e, int *s) { *s = 1; return 0; }",
    "aclrtQueryEventWaitStatus": "int NAME(void *e, int *s) { *s = 1; return 0; }",
    "aclrtStreamQuery": "int NAME(void *e, int *s) { *s = 0; return 0; }",
    "aclrtGetSysParamOpt": "int NAME(int o, int64_t *v) { *v = 0; return 0; }",
}
_ALIKE = {
    "int NAME(void **p, size_t n) { *p = aligned_alloc(512, (n + 511) / 512 * 512); return !*p; }": (
        "aclrtMalloc",
        "aclrtMallocAlign32",
        "aclrtMallocWithCfg",
    ),
    "int NAME(void **p, size_t n) { *p = malloc(n); return !*p; }": ("aclrtMallocHost", "aclrtMallocHostWithCfg"),
    "int NAME(void *p) { free(p); return 0; }": ("aclrtFree", "aclrtFreeHost"),
    "int NAME(void *d, size_t m, const void *s, size_t n) { memcpy(d, s, n); return 0; }": (
        "aclrtMemcpy",
        "aclrtMemcpyAsync",
    ),
    "int NAME(void **p) { static long k = 1 << 20; *p = (void *)(k += 16); return 0; }": (
        "aclrtCreateStream",
        "aclrtCreateStreamWithConfig",
        "aclrtCreateEventExWithFlag",
    ),
}
_ANSWERS |= {name: code for code, names in _ALIKE.items() for name in names}
# What describes tensors to kernels.
_VALUES = ("Tensor", "Scalar", "TensorList", "IntArray", "FloatArray", "BoolArray", "ScalarList")
_DESCRIBE = {f"aclCreate{kind}": "void *NAME() { return malloc(8); }" for kind in _VALUES}
_DESCRIBE |= {f"aclDestroy{kind}": "int NAME(void *p) { free(p); return 0; }" for kind in _VALUES}
# With "disable" for every option torch-npu takes kernels that are compiled already, as it does by default.
_COMPILER = {
    "aclSetCompileopt": "long NAME() { return 0; }",
    "aclGetCompileoptSize": "long NAME(int o) { return 16; }",
    "aclGetCompileopt": 'int NAME(int o, char *v, size_t n) { memset(v, 0, n); strcpy(v, "disable"); return 0; }',
    "aclopSetCompileFlag": "long NAME() { return 0; }",
    "aclopCompileAndExecuteV2": "long NAME() { return 0; }",
    "aclGenGraphAndDumpForOp": "long NAME() { return 0; }",
    "aclCreateGraphDumpOpt": "void *NAME() { return malloc(8); }",
    "aclDestroyGraphDumpOpt": "long NAME(void *p) { free(p); return 0; }",
    "aclrtSetSysParamOpt": "int NAME(int o, int64_t v) { return 0; }",
    "aclrtCtxSetSysParamOpt": "int NAME(int o, int64_t v) { return 0; }",
    "aclrtGetSysParamOpt": _ANSWERS["aclrtGetSysParamOpt"],  # looked for in both libraries
}


def missing() -> str | None:
    """Which tool there is not; None: they can be built."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"no {' and no '.join(absent)} here" if absent else None


def build(wheel: Path, torch: Path, out: Path) -> int:
    """Compile the libraries that the package torch_npu at `wheel` asks for, beside the package torch, into `out`; how
    many kernels they stand for. Raises CalledProcessError where a tool fails."""
    own = [wheel / "lib" / name for name in ("libtorch_npu.so", "libnpu_profiler.so", "libtensorpipe.so")]
    own = [path for path in (*own, *wheel.glob("_C.*.so")) if path.exists()]
    wanted = set().union(*(_symbols(path, "--undefined-only") for path in own))
    there = set().union(*(_symbols(path, "--defined-only") for path in (*own, *(torch / "lib").glob("*.so*"))))
    linked = {name for name in wanted - there if _PREFIX.match(name)}
    called = {name for name in _words(own[0]) if _PREFIX.match(name)}
    kernels = {name for name in called if name.startswith("aclnn")}
    runtime = ((linked | called) - kernels - _COMPILER.keys()) | _ANSWERS.keys() | _DESCRIBE.keys()
    answers = _ANSWERS | _DESCRIBE
    out.mkdir(parents=True, exist_ok=True)
    _compile(out, "ascendcl", {name: answers.get(name, _nothing(name, "acl")) for name in runtime})
    _compile(out, "acl_op_compiler", _COMPILER)
    _compile(out, "opapi", {name: _nothing(name, "aclnn") for name in kernels} | _DESCRIBE)
    for name in LIBRARIES[3:]:
        _compile(out, name, {})
    return len(kernels)


def _symbols(path: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", which, str(path)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.strip()}


def _words(path: Path) -> set[str]:
    found = re.findall(rb"(?<=\0)[A-Za-z_][A-Za-z0-9_]{3,80}(?=\0)", path.read_bytes())
    return {word.decode() for word in found}


def _nothing(name: str, kind: str) -> str:
    said = f'if (getenv("STUB_TRACE")) fprintf(stderr, "[{kind}] {name}\\n");' if kind == "aclnn" else ""
    return f"long NAME() {{ {said} return 0; }}"


def _compile(out: Path, name: str, functions: dict[str, str]) -> None:
    source = out / f"{name}.c"
    lines = [code.replace("NAME", function) for function, code in sorted(functions.items())]
    source.write_text(_HEAD + "\n".join(lines) + "\n")
    library = out / f"lib{name}.so"
    options = ["-std=gnu11", "-O1", "-fPIC", "-shared", "-w", f"-Wl,-soname,lib{name}.so"]
    subprocess.run(["gcc", *options, "-o", str(library), str(source)], check=True, capture_output=True)
