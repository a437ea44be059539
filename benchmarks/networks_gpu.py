"""Whole networks on a GPU, in bfloat16, with random weights made on it; how `bench_end_to_end.py --device cuda` runs.

First every compiled rival is compiled, in parallel processes that leave what they made in torch.compile's cache; what
is not ready in time is left out, and the record says so. Then one process builds a network once, in every form, refuses
a form whose result is not that of diffusers in float32, and times all of them in turn: as they are called, and replayed
from a CUDA graph ("graphed"), without what Python and the launches take. max-autotune makes such a graph by itself.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import children
import gpu
import record
import torch
from networks import CIFAR, SD15, VAE, Change, Emoji, First, Prepare, Run, accelerated, as_loaded, channels_last
from torch import Tensor, nn
from tqdm import tqdm

import diffkern
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.folder import lay_out
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig
from diffkern.models.vae import AutoencoderKL, AutoencoderKLConfig

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32}
_TWO_LEVELS = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
# What makes each small, to see whether this script runs.
TINY: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_TWO_LEVELS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "UNet2DConditionModel": {
        **_TWO_LEVELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
    },
    "DiTTransformer2DModel": {"num_layers": 2},
    "AutoencoderKL": {
        **_TWO_LEVELS,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}
OURS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (UNet2D, UNet2DConfig),
    "UNet2DConditionModel": (UNet2DCondition, UNet2DConditionConfig),
    "DiTTransformer2DModel": (DiT, DiTConfig),
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig),
}
LIBRARY_PRODUCTS = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}
COMPILED = ("torch.compile", "torch.compile, max-autotune, library products", "torch.compile, max-autotune")
THEIRS: dict[str, Prepare] = {
    "diffusers": as_loaded,
    "diffusers, channels_last": channels_last,
    "diffusers, accelerated": accelerated,
    **dict.fromkeys(COMPILED, channels_last),
}
EACH = 150.0  # seconds that compiling, or timing, one network may take


class OnGpu(NamedTuple):
    """A call of a network. inputs: made of float32 and integers; told: those with names, as our network takes them, and
    as diffusers' does."""

    what: str
    kind: str
    config: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    told: Callable[[], dict[str, Tensor]] = dict
    method: str = "forward"


def latents(batch: int, size: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size)


def vae(pixels: int) -> OnGpu:
    what = f"Stable Diffusion 1.5 VAE, a latent of {pixels // 8} x {pixels // 8} decoded, one call"
    return OnGpu(what, "AutoencoderKL", VAE, lambda: (latents(1, pixels // 8),), method="decode")


def cifar(batch: int) -> OnGpu:
    what = f"CIFAR-10 DDPM UNet, {batch} picture{'s' if batch > 1 else ''} of 32 x 32, one call"
    return OnGpu(what, "UNet2DModel", CIFAR, lambda: (latents(batch, 32, 3), torch.arange(batch) * 15))


NETWORKS: dict[str, OnGpu | None] = {
    "emoji": None,  # a whole run
    "cifar-1": cifar(1),
    "cifar-64": cifar(64),
    "sd15": OnGpu(
        "Stable Diffusion 1.5 UNet, 2 latents of 64 x 64, 77 tokens, one call",
        "UNet2DConditionModel",
        SD15,
        lambda: (latents(2, 64), torch.tensor([500, 500]), torch.randn(2, 77, 768)),
    ),
    "dit-xl": OnGpu(
        "DiT-XL/2, 8 latents of 32 x 32, one call",
        "DiTTransformer2DModel",
        DIT_XL,
        lambda: (latents(8, 32), torch.arange(8) * 100, torch.arange(8)),
    ),
    "vae-512": vae(512),
    "sdxl": OnGpu(
        "SDXL UNet, 2 latents of 128 x 128, 77 tokens, one call",
        "UNet2DConditionModel",
        SDXL,
        lambda: (latents(2, 128), torch.tensor([500, 500]), torch.randn(2, 77, 2048)),
        lambda: {"text_embeds": torch.randn(2, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)},
    ),
    "vae-1024": vae(1024),
}


def change(variant: str) -> Change:
    """What is called in place of a model."""
    options: dict[str, Any] = {} if variant == "torch.compile" else torch._inductor.list_mode_options("max-autotune")
    if variant.endswith("library products"):
        options = options | LIBRARY_PRODUCTS
    return lambda model: torch.compile(model, options=options) if variant in COMPILED else model


class Built:
    """A network on a device, as diffusers has it in bfloat16, and its inputs: what all forms of it are made from."""

    def __init__(self, network: OnGpu, device: str, tiny: bool) -> None:
        import diffusers

        self.network, self.device = network, device
        config = network.config | (TINY[network.kind] if tiny else {})
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, network.kind).from_config(config).eval()
        for p in model.parameters():  # what starts as zeros, such as DiT's gates, would leave its block without effect
            if p.dim() > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
        self.model = model.to(device, torch.bfloat16)
        torch.manual_seed(1)
        inputs, told = network.inputs(), network.told()
        if tiny:
            inputs = tuple(t[..., :16, :16] if t.dim() == 4 else t for t in inputs)
        self.inputs = tuple(t.to(device) for t in inputs)
        self.told = {k: t.to(device) for k, t in told.items()}

    def weights(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def given(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return tuple(map(cast, self.inputs)), {k: cast(t) for k, t in self.told.items()}

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        model = THEIRS[variant](copy.deepcopy(self.model).to(dtype))
        args, told = self.given(dtype)
        named = {"added_cond_kwargs": told} if told else {}
        call = change(variant)(First(model, self.network.method))
        return lambda: call(*args, **named)

    def ours(self) -> Run:
        cls, config = OURS[self.network.kind]
        with torch.device("meta"):
            model = cls(config.from_dict(dict(self.model.config)))
        model.load_state_dict(self.model.state_dict(), assign=True)
        call = getattr(lay_out(model, self.device).eval(), self.network.method)
        args, told = self.given(torch.bfloat16)
        return lambda: call(*args, **told)

    def run(self, variant: str) -> Run:
        return self.ours() if variant == "diffkern" else self.theirs(variant)


class BuiltEmoji:
    """A whole run of the bundled model, whose graphs are those of `diffkern.sample`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def weights(self) -> int:
        model = diffkern.load("emoji-32", dtype=torch.bfloat16).model
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        return Emoji.theirs(record.Path(), dtype, THEIRS[variant], change(variant), self.device)

    def run(self, variant: str) -> Run:
        if variant in THEIRS:
            return self.theirs(variant)
        return Emoji.ours(record.Path(), torch.bfloat16, self.device)


def build(name: str, options: argparse.Namespace) -> Built | BuiltEmoji:
    network = NETWORKS[name]
    return BuiltEmoji(options.device) if network is None else Built(network, options.device, options.tiny)


def graphed(run: Run) -> Run:
    """The run in a CUDA graph: nothing is left for the host to do but to start it."""
    replay = gpu.Replay(lambda: run, [()], calls=1)

    def again() -> Tensor:
        replay.graph.replay()
        return replay.results[0]

    return again


@torch.no_grad()
def compile_one(item: list[str], options: argparse.Namespace) -> float:
    """Seconds until the first result of a compiled form."""
    name, variant = item
    run = build(name, options).run(variant)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    run()  # max-autotune records its graph
    return seconds


@torch.no_grad()
def measure(item: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """The record of a network. item: its name, and the compiled forms that are ready, with their seconds."""
    name, ready = item
    built, cuda = build(name, options), options.device == "cuda"
    expected = built.theirs("diffusers", torch.float32)().float()
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}

    def admit(variant: str, make: Callable[[], Run], cold: float | None = None) -> None:
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        try:
            run = make()
            before = torch.cuda.memory_allocated() if cuda else 0
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                out = run().float()
                delta = ((out - expected).abs().max() / expected.std()).item()
                seconds.append(time.perf_counter() - start)
        except RuntimeError as error:
            if "illegal" in str(error):  # nothing runs in this process any more
                raise
            refused[variant] = str(error).strip().splitlines()[0][:200]
            return
        if not delta <= 1.0:  # bfloat16: three digits in a few hundred layers
            refused[variant] = f"another result, max |delta| {delta:.3g} of its std"
            return
        peak = (torch.cuda.max_memory_allocated() - before if cuda else 0) + built.weights()
        rows[variant] = {
            "first call, seconds": float(f"{seconds[0] if cold is None else cold:.4g}"),
            "later call, seconds": float(f"{min(seconds[1:]):.4g}"),
            "peak memory, MB": peak >> 20,
            "max delta": float(f"{delta:.2g}"),
        }
        runs[variant] = run

    for variant in options.variants:
        if variant in COMPILED and variant not in ready:
            refused[variant] = "not compiled in the time there was"
            continue
        admit(variant, functools.partial(built.run, variant), ready.get(variant))
        if cuda and variant in runs and not variant.startswith("torch.compile, max") and isinstance(built, Built):
            admit(f"{variant}, graphed", functools.partial(graphed, runs[variant]))
    if "diffkern" not in runs:
        raise RuntimeError(f"diffkern is refused: {refused['diffkern']}")
    seconds = record.interleave(runs, options.rounds, at_least=0.05)
    for variant, row in rows.items():
        alone = variant.endswith("graphed") or variant.startswith("torch.compile, max")
        against = "diffkern, graphed" if alone and "diffkern, graphed" in runs else "diffkern"
        row["ms"] = record.spread([1000 * s for s in seconds[variant]])
        row |= {"against": against, "diffkern is faster by": record.ratio(seconds[variant], seconds[against])}
    what = f"emoji-32, {Emoji.N} pictures, {Emoji.STEPS} steps" if isinstance(built, BuiltEmoji) else built.network.what
    return {
        "network": name, "what": what, "dtype": "bfloat16", "variants": rows, "refused": refused,
        "profile": profile(runs["diffkern"], cuda),
    }  # fmt: skip


def profile(run: Run, cuda: bool) -> dict[str, float]:
    """The share of every kernel that takes 1 % or more."""
    with torch.profiler.profile() as found:
        run()
    times = {e.key[:80]: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(times.values()) or 1
    ordered = sorted(times.items(), key=lambda entry: -entry[1])
    return {name: round(t / total, 3) for name, t in ordered if t / total >= 0.01}


def records(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(network, its record or why there is none)."""
    start = time.monotonic()
    compiled = [v for v in COMPILED if v in options.variants]
    # The forms in order, and of each the networks that take longest first.
    jobs = [[name, v] for v in compiled for name in sorted(options.networks, key=list(NETWORKS).index, reverse=True)]
    ready: dict[str, dict[str, float]] = {name: {} for name in options.networks}
    found = children.answers(
        [*sys.argv, "--child", "compile"], jobs, options.processes, start + 0.55 * options.seconds, EACH
    )
    for (name, variant), seconds in tqdm(found, total=len(jobs), desc="compile", disable=None):
        if isinstance(seconds, children.Failure):
            print(f"{name}, {variant}: {seconds}", flush=True)
        else:
            ready[name][variant] = seconds
    print(f"compiled {sum(map(len, ready.values()))} of {len(jobs)} in {time.monotonic() - start:.0f} s", flush=True)
    items = [[name, ready[name]] for name in options.networks]
    for (name, _), found in children.answers([*sys.argv, "--child", "time"], items, 1, start + options.seconds, EACH):
        yield name, found


def main(options: argparse.Namespace) -> None:
    """options: networks, variants, device, rounds, processes, seconds, tiny, out, child."""
    if options.device == "cuda":
        gpu.settings()
    if options.child:
        children.serve(functools.partial({"compile": compile_one, "time": measure}[options.child], options=options))
        return
    failed = False
    for name, found in records(options):
        if isinstance(found, children.Failure):
            print(f"{name}: {found}", flush=True)
            failed = True
            continue
        for variant, row in found["variants"].items():
            print(f"{name:10}{variant:50}{row['ms']['median']:9.3f} ms  {row['diffkern is faster by']['median']:.2f}")
        for variant, reason in found["refused"].items():
            print(f"{name:10}{variant:50}not timed: {reason}")
        print(record.write(f"end_to_end-{name}-bfloat16", options.device, found, options.out), flush=True)
    raise SystemExit(1 if failed else 0)
