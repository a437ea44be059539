"""`diffkern bench ops`: what it is asked for, and whether that makes sense."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from diffkern import options
from diffkern.backend import BACKENDS
from diffkern.bench import ops, record
from diffkern.bench.cpus import pinned
from diffkern.bench.rivals import named, rivals
from diffkern.bench.shapes import MODELS, has_kernel, listed, ops_of
from diffkern.op import OPS
from diffkern.schedules import one_of

KERNELS = tuple(name for name in BACKENDS if name != "reference")


def add(commands: Any) -> None:
    """The arguments of the command, for the parser that argparse's `add_subparsers` gave."""
    o = commands.add_parser("ops", help="time every op against its rivals", description=_run.__doc__)
    o.add_argument("--op", action="append", metavar="NAME",
                   help=f"{', '.join(sorted(OPS))}; may be given again (default all)")  # fmt: skip
    o.add_argument("--backend", action="append", metavar="NAME",
                   help=f"{', '.join(KERNELS)}; may be given again (default all that can run)")  # fmt: skip
    o.add_argument("--dtype", action="append", metavar="NAME",
                   help=f"{', '.join(options.DTYPES)}; may be given again (default float32 and bfloat16, "
                        "with --quick float32; on a GPU bfloat16)")  # fmt: skip
    o.add_argument("--rivals", metavar="NAMES",
                   help=f"{','.join(rivals())}, or none; what is not here is left out, and said; compile takes minutes "
                        "(default all; with --quick eager)")  # fmt: skip
    o.add_argument("--shapes", metavar="MODEL|FILE",
                   help=f"workloads of one of {', '.join(MODELS)}, or calls in a JSON file: "
                        '{"rms_norm": [{"x": [8, 256, 1152], "weight": [1152]}]} (default all models)')  # fmt: skip
    o.add_argument("--list", action="store_true", help="print the ops, their workloads and models, and time nothing")
    o.add_argument("--quick", action="store_true", help="one workload an op, in fewer rounds: all of it in a minute")
    o.add_argument("--tiny", action="store_true", help="a small sample of each op: whether all of this runs")
    o.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    o.add_argument("--threads", type=int, help="of the CPU (default torch's)")
    o.add_argument("--rounds", type=int, help="in each all are timed in turn (default 20, on a GPU 9, with --quick 7)")
    o.add_argument("--processes", type=int, default=0, metavar="N", help="check and compile in N, time in another")
    o.add_argument("--seconds", type=float, default=3600, help="with --processes: what is left then is left out")
    o.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER",
                   help=f"of the records, FOLDER/<machine>/ops-<op>.json (default {record.RESULTS})")  # fmt: skip
    o.add_argument("--no-record", action="store_true", help="print, and write nothing")
    o.add_argument("--child", choices=("check", "time"), help=argparse.SUPPRESS)
    o.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Time the backends of ops on workloads of real networks, each in turn with its rivals and with what the machine
    can do at best: a copy of as many bytes, a product of as many operations. A kernel that is wrong is refused. Ctrl-C
    keeps what is done. Exit code 1: something was not timed."""
    device = options.device_of(args.device)
    if args.list:
        print(listed(device.type))
        return 0
    if args.tiny and args.shapes is not None:
        raise ValueError("give --tiny or --shapes, not both")
    have = ops_of(args.shapes, device.type)
    for name in args.op or ():
        one_of("op", name, OPS)
        if not has_kernel(OPS[name], device.type):
            raise ValueError(f"{name} has no kernel for {device.type}: nothing of it can be timed there")
        if name not in have:
            raise ValueError(f"{args.shapes} has no {name}: it has {', '.join(have)}")
    for name in args.backend or ():
        one_of("backend", name, KERNELS)
    for name in args.dtype or ():
        options.dtype_of(name)
    args.rivals = named(args.rivals or ("eager" if args.quick else ",".join(rivals())))
    cuda = device.type == "cuda"
    args.rounds = (7 if args.quick else 9 if cuda else 20) if args.rounds is None else args.rounds
    args.threads = torch.get_num_threads() if args.threads is None else args.threads
    options.at_least(1, rounds=args.rounds, threads=args.threads)
    options.at_least(0, processes=args.processes)
    defaults = ["bfloat16"] if cuda else ["float32", "bfloat16"]
    args.op, args.backend = args.op or have, args.backend or []
    args.dtype = args.dtype or (defaults[:1] if args.quick else defaults)
    args.device = device.type
    if not args.tiny and not any(ops.work(args)):
        raise ValueError(
            f"there is no workload of {args.shapes} for {' or '.join(args.op)} on {args.device}: see --list"
        )
    if cuda:
        torch.cuda.set_device(device)
    if not args.no_record:
        args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before hours of work
    with pinned(args.threads):
        return ops.run(args)
