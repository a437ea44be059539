"""`diffkern bench end-to-end`: what it is asked for, and whether that makes sense."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch

from diffkern import options
from diffkern.bench import end_to_end, end_to_end_gpu, networks_gpu, record
from diffkern.bench.cpus import keep_kernels, pinned
from diffkern.bench.networks import DTYPES, NETWORKS
from diffkern.bench.rivals import named, rivals
from diffkern.schedules import one_of

QUICK = ("cifar", "dit")  # a convolutional network and a transformer
QUICK_VARIANTS = ("diffkern", "diffusers")


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    e = commands.add_parser("end-to-end", help="time whole networks against their rivals", description=_run.__doc__)
    with_networks = ",".join(name for name, rival in rivals().items() if rival.networks)
    e.add_argument("--networks", metavar="NAMES",
                   help=f"of {','.join(NETWORKS)}; on a GPU of {','.join(networks_gpu.NETWORKS)} (default all; with "
                        f"--quick {','.join(QUICK)})")  # fmt: skip
    e.add_argument("--dtype", action="append", metavar="NAME",
                   help=f"{', '.join(DTYPES)}; may be given again (default both; with --quick float32; a GPU is timed "
                        "in bfloat16)")  # fmt: skip
    e.add_argument("--rivals", metavar="NAMES",
                   help=f"of {with_networks}, or none (default all; with --quick diffusers as it is loaded); what is "
                        "not here is left out, and said; compile takes minutes a network")  # fmt: skip
    e.add_argument("--variants", metavar="NAMES", help="only these forms, as records name them, between semicolons")
    e.add_argument("--quick", action="store_true", help="two networks in one dtype, in fewer rounds")
    e.add_argument("--tiny", action="store_true", help="what a GPU is given, with small networks, also on a CPU")
    e.add_argument("--device", default="auto", help="auto, cpu or cuda (default: a GPU if there is one)")
    e.add_argument("--rounds", type=int, help="in each all are timed in turn (default 5, with --quick 3)")
    e.add_argument("--processes", type=int, default=8, metavar="N", help="on a GPU: that compile at once (default 8)")
    e.add_argument("--seconds", type=float, default=3600, help="on a GPU: what is left then is left out")
    e.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER",
                   help="of the records, FOLDER/<machine>/end_to_end-<network>-<dtype>.json "
                        f"(default {record.RESULTS})")  # fmt: skip
    e.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Time networks and whole sampling runs of diffkern, each in turn with its rivals on the same weights, which are
    random. What is not as near to diffusers in float32 as its dtype allows is refused. Ctrl-C keeps what is done. Exit
    code 1: a network was not timed."""
    one_of("device", args.device, ("auto", "cpu", "cuda"))
    args.device = options.device_of(args.device).type
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("end-to-end compares with diffusers, which is not installed: pip install diffusers")
    on_gpu = args.device == "cuda" or args.tiny
    known = tuple(networks_gpu.NETWORKS if on_gpu else NETWORKS)
    quick = args.quick and not on_gpu
    args.networks = args.networks.split(",") if args.networks else list(QUICK if quick else known)
    dtypes = ["bfloat16"] if on_gpu else ["float32"] if args.quick else list(DTYPES)
    args.dtype = [name for given in args.dtype or dtypes for name in given.split(",")]
    for name in args.networks:
        one_of("network", name, known)
    for name in args.dtype:
        one_of("dtype", name, tuple(dtypes if on_gpu else DTYPES))
    args.rounds = (3 if args.quick else 5) if args.rounds is None else args.rounds
    options.at_least(1, rounds=args.rounds, processes=args.processes)
    names = tuple(rivals()) if args.rivals is None else named(args.rivals)
    if on_gpu:
        known_forms = ("diffkern", *(form for name in names for form in networks_gpu.RIVALS.get(name, ())))
        args.refused = {}
    else:
        known_forms = tuple(end_to_end.variants(names))
        args.refused = end_to_end.not_here(names)
    if args.variants:
        args.variants = args.variants.split(";")
        for name in args.variants:
            one_of("variant", name, known_forms)
        if args.variants[0] != "diffkern":
            raise ValueError("diffkern must be the first variant: the others are compared with it")
        args.refused = {name: reason for name, reason in args.refused.items() if name in args.variants}
    else:
        few = args.quick and args.rivals is None
        args.variants = [name for name in known_forms if not few or name in QUICK_VARIANTS]
    args.variants = [name for name in args.variants if name not in args.refused]
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before hours of work
    keep_kernels()
    with torch.no_grad(), pinned(torch.get_num_threads()):
        return end_to_end_gpu.run(args) if on_gpu else end_to_end.run(args)
