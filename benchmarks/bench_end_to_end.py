"""Whole networks and sampling runs, diffkern against what users have today, on the same weights.

    python benchmarks/bench_end_to_end.py [--networks cifar,dit,...] [--dtypes float32,bfloat16] [--rounds 5]
    python benchmarks/bench_end_to_end.py --device cuda [--seconds 240]    # see end_to_end_gpu.py

Every variant is first run in a process of its own: how long its first call takes, what memory it needs, and whether
its result is that of diffusers in float32. One that is wrong is refused. Then all are timed in turn in one process, and
diffkern is profiled. A record is written for each network and dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import end_to_end_gpu
import networks_gpu
import torch
from networks import NETWORKS, Network, Prepare, Run, accelerated, as_loaded, channels_last
from torch import nn

import diffkern
from diffkern.bench import record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = 3.0  # seconds of a call: above, there are fewer of them


def _theirs(prepare: Prepare, mode: str = "") -> Callable[[Network, Path, torch.dtype], Run]:
    """diffusers, eager or under torch.compile in a mode."""

    def change(model: nn.Module) -> Any:
        return torch.compile(model, mode=mode) if mode else model

    return lambda network, folder, dtype: network.theirs(folder, dtype, prepare, change)


def _invariant(network: Network, folder: Path, dtype: torch.dtype) -> Run:
    call = network.ours(folder, dtype)

    def run() -> torch.Tensor:
        with diffkern.batch_invariant():
            return call()

    return run


def _openvino(network: Network, folder: Path, dtype: torch.dtype) -> Run:
    """Converted from float32, as its bfloat16 is a way to run."""
    import openvino

    precision = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}

    def change(model: nn.Module) -> Callable[..., torch.Tensor]:
        compiled: list[Any] = []

        def call(*args: torch.Tensor) -> torch.Tensor:
            if not compiled:
                converted = openvino.convert_model(model, example_input=args, input=[tuple(a.shape) for a in args])
                compiled.append(openvino.compile_model(converted, "CPU", precision))
            return torch.from_numpy(compiled[0]([a.numpy() for a in args])[0].copy())

        return call

    return network.theirs(folder, torch.float32, as_loaded, change)


VARIANTS: dict[str, Callable[[Network, Path, torch.dtype], Run]] = {
    "diffkern": lambda n, folder, dtype: n.ours(folder, dtype),
    "diffkern, batch_invariant": _invariant,
    "diffusers": _theirs(as_loaded),
    "diffusers, channels_last": _theirs(channels_last),
    "diffusers, accelerated": _theirs(accelerated),
    "diffusers, accelerated, torch.compile": _theirs(accelerated, mode="default"),
    "torch.compile": _theirs(channels_last, mode="default"),
    "torch.compile, max-autotune": _theirs(channels_last, mode="max-autotune"),
    "OpenVINO": _openvino,
}


def _memory(key: str) -> int:
    """A figure of this process in MB: VmRSS or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


@torch.no_grad()
def first(network: str, variant: str, dtype: str, folder: Path, result: Path) -> None:
    """What a process of its own finds out about a variant: prints it as JSON, and leaves the result in a file."""
    import diffusers  # noqa: F401  its memory is nobody's

    before = _memory("VmRSS")
    run = VARIANTS[variant](NETWORKS[network], folder, DTYPES[dtype])
    start = time.perf_counter()
    out = run()
    seconds = [time.perf_counter() - start]
    while len(seconds) < 2 or (len(seconds) < 4 and seconds[-1] < SLOW):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    torch.save(out.float(), result)
    print(json.dumps({"first": seconds[0], "later": min(seconds[1:]), "MB": _memory("VmHWM") - before}))


@torch.no_grad()
def interleaved(network: str, variants: list[str], dtype: str, folder: Path, rounds: int) -> None:
    runs = {v: VARIANTS[v](NETWORKS[network], folder, DTYPES[dtype]) for v in variants}
    for run in runs.values():
        run()
    print(json.dumps(record.interleave(runs, rounds)))


@torch.no_grad()
def profile(network: str, dtype: str, folder: Path) -> None:
    """Where diffkern's time goes: the share of every kernel that takes 1 % or more."""
    run = VARIANTS["diffkern"](NETWORKS[network], folder, DTYPES[dtype])
    run()
    with torch.profiler.profile() as found:
        run()
    times = {e.key: e.self_cpu_time_total for e in found.key_averages()}
    shares = {k: t / sum(times.values()) for k, t in sorted(times.items(), key=lambda item: -item[1])}
    print(json.dumps({k: round(share, 3) for k, share in shares.items() if share >= 0.01}))


def child(cache: Path, *args: object) -> Any:
    """Run this script again for one thing. cache: where torch.compile finds what it has compiled before. Returns what
    is printed last; raises RuntimeError with the error."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
        raise RuntimeError(errors[-1] if errors else f"exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _cache(folder: Path, dtype: str, variant: str) -> Path:
    return folder / f"{dtype}-{list(VARIANTS).index(variant)}"  # compilers are given this path: no spaces


def measure(network: str, dtype: str, variants: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """The record of one network in one dtype."""
    expected_file = folder / "expected.pt"
    if not expected_file.exists():
        child(folder, "first", network, "diffusers", "float32", folder, expected_file)
    expected = torch.load(expected_file)
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for variant in variants:
        try:
            cache = _cache(folder, dtype, variant)  # empty, so that the first call compiles
            cold = child(cache, "first", network, variant, dtype, folder, folder / "result.pt")
        except RuntimeError as e:
            refused[variant] = str(e)
            continue
        delta = ((torch.load(folder / "result.pt") - expected).abs().max() / expected.std()).item()
        # bfloat16: three digits in a few hundred layers, and in a whole run steps that add up
        if not delta <= (1e-2 if dtype == "float32" else 1.0):
            refused[variant] = f"another result, max |delta| {delta:.3g} of its std"
            continue
        rows[variant] = {
            "first call, seconds": float(f"{cold['first']:.4g}"),
            "later call, seconds": float(f"{cold['later']:.4g}"),
            "peak memory, MB": cold["MB"],
            "max delta": float(f"{delta:.2g}"),
        }
        print(f"  {variant:<28}{rows[variant]}", flush=True)
    if "diffkern" not in rows:
        raise SystemExit(f"diffkern is refused: {refused['diffkern']}")
    seconds = child(
        _cache(folder, dtype, "torch.compile"), "interleaved", network, ";".join(rows), dtype, folder, rounds
    )
    for variant, row in rows.items():
        row["ms"] = record.spread([1000 * s for s in seconds[variant]])
        row["diffkern is faster by"] = record.ratio(seconds[variant], seconds["diffkern"])
        print(f"  {variant:<28}{row['ms']}  diffkern is faster by {row['diffkern is faster by']['median']:.2f}")
    for variant, reason in refused.items():
        print(f"  {variant:<28}{reason}")
    where = child(folder, "profile", network, "diffkern", dtype, folder, 0)
    return {
        "network": network, "what": NETWORKS[network].what, "dtype": dtype, "variants": rows, "refused": refused,
        "profile": where,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", help=f"of {', '.join(NETWORKS)}; on a GPU of {', '.join(networks_gpu.NETWORKS)}")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}; on a GPU bfloat16")
    parser.add_argument("--variants", help=f"of {'; '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="the folder of the records")
    parser.add_argument("--processes", type=int, default=8, help="on a GPU: that compile at once")
    parser.add_argument("--seconds", type=float, default=3600, help="on a GPU: what is left then is left out")
    parser.add_argument("--tiny", action="store_true", help="the GPU's benchmark with small networks, also on a CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda" or args.tiny
    all_networks: Any = networks_gpu.NETWORKS if on_gpu else NETWORKS
    all_variants = ("diffkern", *networks_gpu.THEIRS) if on_gpu else tuple(VARIANTS)
    args.networks = args.networks.split(",") if args.networks else list(all_networks)
    args.variants = args.variants.split(";") if args.variants else list(all_variants)
    dtypes = args.dtypes.split(",")
    for given, known in ((args.networks, all_networks), (dtypes, DTYPES), (args.variants, all_variants)):
        for name in given:
            if name not in known:
                parser.error(f"there is no {name!r}: choose of {', '.join(known)}")
    if args.variants[0] != "diffkern":
        parser.error("diffkern must be the first variant: the others are compared with it")
    if on_gpu:
        end_to_end_gpu.main(args)
        return
    for network in args.networks:
        with tempfile.TemporaryDirectory() as name:
            NETWORKS[network].make(Path(name))
            for dtype in dtypes:
                print(f"{network}, {dtype}", flush=True)
                results = measure(network, dtype, args.variants, args.rounds, Path(name))
                print(record.write(f"end_to_end-{network}-{dtype}", "cpu", results, args.out), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, network, variant, dtype, folder, last = sys.argv[2:]
        if what == "first":
            first(network, variant, dtype, Path(folder), Path(last))
        elif what == "profile":
            profile(network, dtype, Path(folder))
        else:
            interleaved(network, variant.split(";"), dtype, Path(folder), int(last))
    else:
        main()
