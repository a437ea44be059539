"""Calls every op's GPU kernels on all its small samples: what compute-sanitizer runs.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu_sanitize.py

Without PyTorch's cache every tensor is an allocation of its own, so that what is read or written beside one is seen.
"""

from __future__ import annotations

import argparse

import torch
from diffkern.kernels import configs

from diffkern.available import availability
from diffkern.op import OPS

# Beside what is chosen: those forms of a kernel that only a table chooses.
FORMS = {("group_norm_silu", "cuda"): [{configs.CUDA: block} for block in (1, 16)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="only this op (may be repeated)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if (reason := availability(options.backend)) is not None:
        raise SystemExit(f"{options.backend}: {reason}")
    calls = 0
    for name in options.op or sorted(OPS):
        for backend in OPS[name].backends:
            if backend.name != options.backend:
                continue
            for sample in OPS[name].make_samples(options.device, getattr(torch, options.dtype)):
                if sample.workload:
                    continue
                args = OPS[name].bind(*sample.args())
                if backend.why_not(args) is not None:
                    continue
                for shape in (None, *FORMS.get((name, options.backend), ())):
                    with configs.trying(lambda kernel, key, shape=shape: shape):
                        backend(*args)
                    calls += 1
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(f"{name}: {calls} calls so far", flush=True)
    if not calls:
        raise SystemExit(f"no op has a {options.backend} backend")


if __name__ == "__main__":
    with torch.no_grad():
        main()
