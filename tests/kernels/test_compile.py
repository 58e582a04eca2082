"""Every Triton kernel compiles for a GPU, and fits its shared memory; no GPU is needed for that."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

SHARED_BYTES = 227 * 1024
"""What a block may use on compute capability 9.0."""

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorsa.kernels import triton_kernels

FIXED = {
    "ids_ptr": "*i32", "given_ptr": "*i32", "pairs_ptr": "*i64", "starts_ptr": "*i64",
    "ends_ptr": "*i64", "z_ptr": "*fp32", "lse_ptr": "*fp32", "dz_ptr": "*fp32",
    "sums_ptr": "*fp32", "norm_ptr": "*fp32", "d_acts_ptr": "*fp32", "parts_ptr": "*fp32",
    "sinks_ptr": "*fp32",
}

def compile(name, constants):
    kernel = getattr(triton_kernels, name)
    floats, warps = constants.pop("floats"), constants.pop("num_warps", 4)
    types, values = {}, {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument], values[argument] = "constexpr", constants[argument]
        elif argument.endswith("_ptr"):
            types[argument] = FIXED.get(argument, floats)
        else:
            types[argument] = "fp32" if argument in ("scale", "softcap") else "i32"
    source = ASTSource(kernel, types, values)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).metadata.shared

print(json.dumps([compile(name, constants) for name, constants in json.loads(sys.argv[1])]))
"""

SIZES = [(64, 1, 11), (64, 64, 1024), (64, 128, 1024), (128, 128, 512), (256, 256, 1024)]
"""d_qk_head, OV heads of a QK head, rows that a QK head has to work on"""
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
PLAIN = {"softcap": None, "window": None, "sinks_ptr": None}
DECODE = {"BLOCK_J": 16, "BLOCK_D": 256}
OTHERS = {
    "select_kernel": [
        {"given_ptr": None, "SELECT": "relu", "ROWS": 1, "BLOCK": 8192, "num_warps": 8},
        {"SELECT": "abs", "ROWS": 4, "BLOCK": 512},
    ],
    "row_sums_kernel": [{"GROUP": 128, "BLOCK": 64, "BLOCK_J": 16}],
    "decode_kernel": [DECODE],
    "dots_kernel": [DECODE],
    "dw_kernel": [DECODE, DECODE | {"db_ptr": None}],
}


def _asked(floats: str) -> list[tuple[str, dict[str, Any]]]:
    """Return every kernel with the constants of some Lorsas; the last has all there is."""
    from lorsa.kernels.triton_attention import constants
    from lorsa.kernels.triton_sparse import linear_constants

    asked = [(name, case) for name, cases in OTHERS.items() for case in cases]
    asked.append(("linear_kernel", linear_constants(DTYPES[floats])))
    for kernel in ("attend", "dq", "dkv"):
        cases = [constants(kernel, DTYPES[floats], *sizes) for sizes in SIZES]
        asked += [(f"{kernel}_kernel", case | PLAIN) for case in cases]
        asked.append((f"{kernel}_kernel", cases[1]))
    return [(name, case | {"floats": floats}) for name, case in asked]


@pytest.mark.triton
@pytest.mark.parametrize("floats", DTYPES)
def test_kernels_compile_for_a_gpu(floats: str) -> None:
    pytest.importorskip("triton")
    asked = _asked(floats)
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
