"""Every Triton kernel compiles for a GPU, and fits its shared memory; no GPU is needed for that."""

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = 227 * 1024
"""What a block may use on compute capability 9.0."""

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorsa.kernels import triton_kernels

POINTERS = {
    "q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16",
    "dq_ptr": "*bf16", "dk_ptr": "*bf16", "dv_ptr": "*bf16", "dy_ptr": "*bf16", "dw_ptr": "*bf16",
    "ids_ptr": "*i32", "given_ptr": "*i32", "pairs_ptr": "*i64", "starts_ptr": "*i64",
    "ends_ptr": "*i64",
}

def compile(name, constants):
    kernel = getattr(triton_kernels, name)
    types, values = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument], values[(i,)] = "constexpr", constants[argument]
        elif argument.endswith("_ptr"):
            types[argument] = POINTERS.get(argument, "*fp32")
        else:
            types[argument] = "fp32" if argument in ("scale", "softcap") else "i32"
    source = ASTSource(kernel, types, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).metadata.shared

print(json.dumps([compile(name, constants) for name, constants in json.loads(sys.argv[1])]))
"""

ATTENTION = {"softcap": None, "window": None, "PRECISION": None}
WIDE = {"WIDTH": 128, "GROUP": 128, "BLOCK_K": 128, "BLOCK_G": 128, "BLOCK_T": 64, "BLOCK_S": 64}
SINGLE = {"WIDTH": 64, "GROUP": 1, "BLOCK_K": 64, "BLOCK_G": 16, "BLOCK_T": 128, "BLOCK_S": 64}
DECODE = {"BLOCK_J": 16, "BLOCK_D": 256}
KERNELS = {
    "attend_kernel": [WIDE | ATTENTION, SINGLE | {"PRECISION": None}],
    "dq_kernel": [WIDE | ATTENTION],
    "dkv_kernel": [WIDE | ATTENTION],
    "select_kernel": [
        {"given_ptr": None, "SELECT": "relu", "ROWS": 1, "BLOCK": 8192},
        {"SELECT": "abs", "ROWS": 4, "BLOCK": 512},
    ],
    "row_sums_kernel": [{"GROUP": 128, "BLOCK": 64, "BLOCK_J": 16}],
    "decode_kernel": [DECODE],
    "d_acts_kernel": [DECODE],
    "dw_kernel": [DECODE],
}


@pytest.mark.triton
def test_kernels_compile_for_a_gpu() -> None:
    pytest.importorskip("triton")
    asked = [(name, constants) for name, cases in KERNELS.items() for constants in cases]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(asked)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout)
    assert len(shared) == len(asked)
    assert max(shared) <= SHARED_BYTES
