"""Triton's kernels of sparse codes compile for GPUs of three generations, and spill nothing.

They are compiled as at run time: pointers, and sizes that 16 divides, are known to be so. No GPU
is needed for that.
"""

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

SHARED_KB = {80: 163, 89: 99, 90: 227}
"""What a block may use, by compute capability."""

COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lorsa.kernels import triton_kernels

FIXED = {
    "ids_ptr": "*i32", "given_ptr": "*i32", "kept_ids_ptr": "*i32", "pairs_ptr": "*i64",
    "starts_ptr": "*i64", "z_ptr": "*fp32", "norm_ptr": "*fp32", "parts_ptr": "*fp32",
}
ALIGNED = [["tt.divisibility", 16]]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

def compile(name, floats, given, capability):
    kernel, given = getattr(triton_kernels, name), dict(given)
    warps, types, constants, attrs = given.pop("num_warps", 4), {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        value = given.get(argument)
        if argument.endswith("_ptr") and argument not in given:
            types[argument], attrs[(place,)] = FIXED.get(argument, floats), ALIGNED
        elif argument.isupper() or value is None or value == 1:
            types[argument], constants[argument] = "constexpr", value
        else:
            types[argument] = "i32"
            if value % 16 == 0:
                attrs[(place,)] = ALIGNED
    source = ASTSource(kernel, types, constants, attrs)
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):([0-9]+)", usage))
    return {"shared": made.metadata.shared, **{key: int(found[key]) for key in found}}

print(json.dumps([compile(*each) for each in json.loads(sys.argv[1])]))
"""


class Shape(NamedTuple):
    """Sizes of an SAE or a transcoder, and tokens of a step: the presets of bench_step.py."""

    width: int
    n_features: int
    top_k: int
    n_tokens: int


PRESETS = {
    "smollm2": Shape(576, 4_608, 32, 2_048),
    "smollm2-32x": Shape(576, 18_432, 32, 2_048),
    "pythia-160m": Shape(768, 6_144, 32, 32_768),
    "llama-3.1-8b": Shape(4_096, 32_768, 32, 16_384),
}
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}


def _asked(shape: Shape, floats: str) -> dict[str, dict[str, Any]]:
    """Return the kernels of a step, with what each is given."""
    from lorsa.kernels.triton_sparse import DECODE_TILE, linear_constants

    sizes = {"top_k": shape.top_k, "d_model": shape.width} | DECODE_TILE
    return {
        "linear_kernel": {
            "n_tokens": shape.n_tokens,
            "n_features": shape.n_features,
            "width": shape.width,
            **linear_constants(DTYPES[floats]),
        },
        "decode_kernel": sizes,
        "dots_kernel": sizes | {"n_tokens": shape.n_tokens},
        "dw_kernel": sizes,
        "dw_kernel without db": sizes | {"db_ptr": None},
    }


def _selections(shape: Shape) -> list[dict[str, Any]]:
    """Return what the selection is given, in one round or two."""
    import triton
    from lorsa.kernels.triton_select import SELECT_TILE, selection_constants

    sizes = {"n_rows": shape.n_tokens, "top_k": shape.top_k}
    tile = min(SELECT_TILE, triton.next_power_of_2(shape.n_features))
    n_tiles = triton.cdiv(shape.n_features, tile)
    entries = {"n_entries": shape.n_features, "n_tiles": n_tiles, "given_ptr": None}
    rounds: list[dict[str, Any]] = [sizes | entries | selection_constants(tile, "relu")]
    if n_tiles > 1:
        left = n_tiles * shape.top_k
        merged = selection_constants(triton.next_power_of_2(left), "relu")
        rounds.append(sizes | {"n_entries": left, "n_tiles": 1} | merged)
    return rounds


def _programs(capability: int) -> list[tuple[str, str, dict[str, Any], int]]:
    """Return each program that the presets need, once: most are the same for all."""
    programs: dict[str, tuple[str, str, dict[str, Any], int]] = {}
    for shape in PRESETS.values():
        asked = [
            (name.split()[0], floats, given, capability)
            for floats in DTYPES
            for name, given in _asked(shape, floats).items()
        ]
        asked += [("select_kernel", "*fp32", given, capability) for given in _selections(shape)]
        for program in asked:
            name, floats, given, _ = program
            same = {  # the compiler knows of a size only whether it is 1, and whether 16 divides it
                key: value if key.isupper() or value in (None, 1) else value % 16 == 0
                for key, value in given.items()
            }
            programs.setdefault(json.dumps([name, floats, same], sort_keys=True), program)
    return list(programs.values())


@pytest.mark.triton
@pytest.mark.parametrize("capability", SHARED_KB)
def test_nothing_is_spilled(capability: int) -> None:
    pytest.importorskip("triton")
    programs = _programs(capability)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(programs)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout)
    assert len(used) == len(programs)
    table = [(name, floats, use) for (name, floats, *_), use in zip(programs, used, strict=True)]
    assert [row for row in table if row[2]["STACK"] or row[2]["LOCAL"]] == []
    assert [row for row in table if row[2]["shared"] > 1024 * SHARED_KB[capability]] == []
