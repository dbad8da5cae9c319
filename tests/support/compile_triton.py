"""Compile every Triton kernel for an H100 (sm_90), without a GPU: prints one JSON line each.

TRITON_INTERPRET must be 0 and TRITON_DUMP_PTXAS_LOG 1 when this starts.
"""

from __future__ import annotations

import contextlib
import io
import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_vasp.kernels import cuda, cuda_latent, cuda_random, cuda_residual, triton_rows
from dist_vasp.kernels import triton_kernels as jit

H100 = GPUTarget("cuda", 90, 32)
ADDRESSES = ("Parts", "Offsets", "Sizes", "Grads", "Ps", "Ms", "Vs", "Copies", "Logits")
POINTERS = dict.fromkeys((*ADDRESSES, "Ids", "Ptr", "RowWords", "ColumnWords"), "*i64")
POINTERS |= dict.fromkeys(("P", "M", "V", "Denominators", "Norm", "Weights", "Loss", "By"), "*fp32")
POINTERS |= {"Copy": "*bf16", "IsOne": "*u8", "Offsets": "*i64"}
FLOATS = ("alpha", "gamma", "smallest", "low", "step")


def compile_kernel(
    kernel, constants: dict, warps: int, aligned: str = "", **pointers: str
) -> tuple[str, str]:
    """Compile one kernel; returns its PTX and what ptxas says of it.

    aligned: an integer that is a multiple of 16, as all addresses are then. pointers: types of
    arguments that differ from POINTERS. Other arguments are 32-bit integers.
    """
    types = POINTERS | dict.fromkeys(FLOATS, "fp32") | pointers
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {
        (k,): [["tt.divisibility", 16]]
        for k, (name, of) in enumerate(signature.items())
        if aligned and (name == aligned or of.startswith("*"))
    }
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(kernel, signature, values, attributes),
            target=H100,
            options={"num_warps": warps},
        )
    return compiled.asm["ptx"], log.getvalue()


def spilled(log: str) -> int | None:
    """Bytes of registers that a kernel stores to memory; None where ptxas does not say."""
    found = re.findall(r"(\d+) bytes spill stores", log)
    return sum(map(int, found)) if found else None


def main() -> None:
    sums = {"UNROLL": cuda._SUM["UNROLL"], "BLOCK": cuda._SUM["BLOCK"]}
    narrow = {"UNROLL": cuda._SUM_NARROW["UNROLL"], "BLOCK": cuda._SUM_NARROW["BLOCK"]}
    update = sums | {"HAS_DIAGONAL": True, "HAS_COPY": True}
    many = {"HAS_COPY": True, "COPY": tl.bfloat16, "BLOCK": cuda._UPDATE_BLOCK}
    focal = {"PATHS": 3, "BLOCK": cuda._FOCAL_BLOCK}
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        of = f"*{name}"
        cases = {
            "sum_rows": (jit.sum_rows, sums, 4, {"Table": of, "Out": of}),
            "update_sum": (jit.update_sum, update | {"HAS_V": True}, 4, {"Grad": of}),
            "update_sum lean": (jit.update_sum, update | {"HAS_V": False}, 4, {"Grad": of}),
            "update_many": (jit.update_many, many | {"GRAD": dtype}, 8, {}),
            "focal": (jit.focal, focal | {"GAMMA": 2, "TYPE": dtype}, 8, {}),
            "focal any gamma": (jit.focal, focal | {"GAMMA": -1, "TYPE": dtype}, 8, {}),
        }
        cases["sum_rows narrow"] = (jit.sum_rows, narrow, 4, {"Table": of, "Out": of})
        for what, (kernel, constants, warps, pointers) in cases.items():
            report(f"{what} {name}", *compile_kernel(kernel, constants, warps, **pointers))
    for normal in (False, True):
        constants = {"SEGMENTS": cuda_random.SEGMENTS, "NORMAL": normal, "BLOCK": cuda_random.BLOCK}
        tables = {"Out": "*fp32", "Offsets": "*fp64", "Slopes": "*fp64"}
        report(f"fill {normal}", *compile_kernel(cuda_random._fill, constants, 4, **tables))
    lean_rows()
    trunk_kernels()


def trunk_kernels() -> None:
    """The kernels of residual layers, of two widths, and of the latent code."""
    ends = ("H", "Sum", "Out", "NewSum", "GradOut", "GradNext", "GradH", "GradSum")
    vectors = ("Bias", "Weight", "Shift", "GradBias", "GradWeight", "GradShift")
    single = dict.fromkeys((*vectors, "Mean", "Scale", "Parts"), "*fp32")
    forward, backward = cuda_residual.residual_forward, cuda_residual.residual_backward
    for width in (512, 4096):
        for name in ("fp32", "bf16"):
            pointers = single | dict.fromkeys(ends, f"*{name}")
            for kernel, options in (
                (forward, cuda_residual.forward_options(width)),
                (backward, cuda_residual.backward_options(width)),
            ):
                warps = options.pop("num_warps")
                what = f"{kernel.__name__} {width} {name}"
                report(what, *compile_kernel(kernel, options, warps, "n_columns", **pointers))
    parts = {"PARTS": cuda_residual.PROGRAMS, "BLOCK": cuda_residual.PARTS_BLOCK}
    latents = ("Mu", "LogVar", "Noise", "Z", "Kl", "GradZ", "GradKl", "GradMu", "GradLogVar")
    for kernel in (cuda_latent.latent_forward, cuda_latent.latent_backward):
        pointers = dict.fromkeys(latents, "*bf16") | dict.fromkeys(
            ("Noise", "Kl", "GradKl"), "*fp32"
        )
        block = {"BLOCK": cuda_latent.LATENT["BLOCK"]}
        report(kernel.__name__, *compile_kernel(kernel, block, 4, "n_columns", **pointers))
    report("add_parts", *compile_kernel(cuda_residual.add_parts, parts, 4, **single))


def lean_rows() -> None:
    """`update_rows` of dense gradients and of sums, of the widths of three configurations."""
    for width in (512, 4096, 6144):
        for name, sums in (("fp32", False), ("bf16", False), ("fp32", True)):
            options = cuda.row_shape(width) | {"SUMS": sums, "HAS_COPY": True}
            warps = options.pop("num_warps")
            pointers = {"Grad": f"*{name}"}
            if not sums:
                pointers |= dict.fromkeys(("Ids", "Ptr"), f"*{name}")
            what = f"update_rows {'sums' if sums else 'dense'} {width} {name}"
            kernel = triton_rows.update_rows
            report(what, *compile_kernel(kernel, options, warps, "n_columns", **pointers))


def report(what: str, ptx: str, log: str) -> None:
    print(json.dumps({"kernel": what, "ptx": len(ptx), "spilled": spilled(log)}))


if __name__ == "__main__":
    main()
