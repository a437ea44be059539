"""The tables of `diffkern bench report`: what made-up records make of them."""

from __future__ import annotations

import pytest
from records import CPU, GPU, figures, form, network, spread, workload, write

from diffkern.bench.report import records, sections
from diffkern.bench.report.ops import row_of


@pytest.fixture
def gpu(tmp_path):
    graphed = "diffkern, graphed"
    variants = {
        "diffkern": form(8.0, 1.0, "diffkern"),
        graphed: form(4.0, 1.0, graphed),
        "diffusers": form(20.0, 2.5, "diffkern"),
        "diffusers, graphed": form(10.0, 2.5, graphed),
        "diffusers, accelerated, graphed": form(5.0, 1.25, graphed),
        "torch.compile": form(6.0, spread(0.75, 0.7, 0.9), "diffkern"),
        "torch.compile, max-autotune": form(6.0, 1.5, graphed),
    }
    ceilings = {"GB/s": 4300.0, "TFLOP/s": 788.0}
    noise = workload("randn", chosen="cuda", ceilings=ceilings, refused={"apex": "not installed"}, times={
        "cuda": figures(25, 0.8), "triton": figures(30, 0.6), "torch": figures(100, 0.2), "copy": figures(20, 1.0),
    })  # fmt: skip
    product = {"GFLOP/s": 400e3, "of matmul": 0.5}
    attention = workload("attention", chosen="torch", ceilings=ceilings, refused={}, times={
        "torch": figures(10, 0.5, **product), "triton": figures(20, 0.25, **product),
        "cuDNN": figures(9, 0.55, **product), "copy": figures(2, 1.0),
    })  # fmt: skip
    write(tmp_path, "h200/end_to_end-sd15", network("sd15", variants, {"torch.compile, graphed": "no | time"}), GPU)
    write(tmp_path, "h200/ops-randn", [noise], GPU)
    write(tmp_path, "h200/ops-attention", [attention], GPU)
    return sections.checked(tmp_path)


def test_a_network_on_a_gpu_is_compared_with_and_without_a_graph(gpu):
    summary = sections.summary("figures", gpu)
    assert "NVIDIA H200, torch 2.11.0+cu130. A call replayed from a CUDA graph" in summary
    assert "| with a graph | diffusers | torch.compile | accelerated diffusers | without | diffusers | torch" in summary
    assert "| sd15, bfloat16 | 4 ms | 2.50 | 1.50 | 1.25 | 8 ms | 2.50 | 0.75 |" in summary
    details = sections.details(gpu)
    assert "| torch.compile, max-autotune | 6 (6 to 6) | 1.50 (1.50 to 1.50) |" in details
    assert "| torch.compile, graphed | not timed: no \\| time |" in details


def test_what_the_one_line_does_to_a_call_on_a_gpu(tmp_path):
    graphed = "diffkern, graphed"
    variants = {"diffkern": form(8.0, 1.0, "diffkern"), graphed: form(4.0, 1.0, graphed),
                "diffusers": form(20.0, 2.5, "diffkern"),
                "diffusers, accelerated, recorded": form(5.0, 1.25, graphed)}  # fmt: skip
    write(tmp_path, "h200/end_to_end-sd15", network("sd15", variants), GPU)
    others = {name: figures for name, figures in variants.items() if "recorded" not in name}
    write(tmp_path, "h200/end_to_end-dit", network("dit", others), GPU)
    summary = sections.summary("figures", sections.checked(tmp_path))
    assert "how many times as fast diffusers is called after `diffkern.accelerate` as before:" in summary
    assert "| accelerated diffusers | without | diffusers | accelerate |" in summary
    assert "| sd15, bfloat16 | 4 ms | - | 8 ms | 2.50 | 4.00 |" in summary
    assert "| dit, bfloat16 | 4 ms | - | 8 ms | 2.50 | - |" in summary


def test_a_network_says_what_would_be_left_to_win(tmp_path):
    variants = {"diffkern": form(4, 1), "torch.compile": form(6, 1.5), "torch.compile, max-autotune": form(5, 1.25)}
    write(tmp_path, "m/end_to_end-dit", network("dit", variants))
    details = sections.details(sections.checked(tmp_path))
    assert "Products, convolutions and attention are 50 % of it." in details
    assert "as each rival's fastest form: torch.compile 2.50." in details  # 1.25 of half the time


def test_an_op_on_a_gpu_is_measured_by_the_floor_of_the_device(gpu):
    details = sections.details(gpu)
    assert "NVIDIA H200, torch 2.11.0+cu130 (a copy 4300 GB/s, read and written; a bfloat16 product 788 TFL" in details
    assert "| randn | pictures | bfloat16 | cuda | 25 (25 to 25) | 3200 GB/s | 80 % | - | torch | 4.00 |" in details
    assert (
        "| attention | pictures | bfloat16 | torch | 10 (10 to 10) | 400 TFLOP/s | 50 % | - | cuDNN | 0.90" in details
    )
    assert "Not timed: apex in 1 of 1 workloads of randn: not installed" in details


def test_what_is_lost_is_listed_and_the_worst_comes_first(gpu):
    losses = sections.summary("losses", gpu).splitlines()
    assert losses[0] == (
        "NVIDIA H200, torch 2.11.0+cu130: in 2 of 4 networks, workloads and schedulers a rival is faster beyond noise, "
        "the worst first:"
    )
    assert losses[4:] == [
        "| sd15, bfloat16, no graph | diffkern, 8 ms (8 to 8) | torch.compile, 6 ms (6 to 6) | 0.75 |",
        "| attention, pictures, bfloat16 | torch, 10 us (10 to 10) | cuDNN, 9 us (9 to 9) | 0.90 |",
    ]


def test_what_is_within_noise_is_not_lost(tmp_path):
    near = {"diffkern": form(10, 1.0), "OpenVINO": form(9.8, spread(0.98, 0.9, 1.01))}
    op = workload("linear", {"cpu": figures(10), "torch": figures(9), "copy": figures(5)})
    op["times"]["torch"]["us"] = spread(9, 8.5, 10)  # touches ours
    write(tmp_path, "m/end_to_end-dit", network("dit", near))
    write(tmp_path, "m/ops-linear", [op])
    assert sections.summary("losses", sections.checked(tmp_path)).startswith(
        "a CPU with AVX2, 2 threads, torch 2.13.0: in none of 2 networks"
    )
    near["OpenVINO"]["diffkern is faster by"]["p80"] = 0.99
    op["times"]["torch"]["us"]["p80"] = 9.9
    write(tmp_path, "m/end_to_end-dit", network("dit", near))
    write(tmp_path, "m/ops-linear", [op])
    assert ": in 2 of 2 networks" in sections.summary("losses", sections.checked(tmp_path))


def test_a_readme_shows_five_losses_of_a_machine_and_counts_the_rest(tmp_path):
    rows = [
        workload("linear", {"cpu": figures(10 + i), "torch": figures(9), "copy": figures(5)}, f"shape {i}")
        for i in range(15)
    ]
    write(tmp_path, "m/ops-linear", rows)
    found = sections.checked(tmp_path)
    shown = sections.summary("losses", found)
    assert (
        "in 15 of 15 networks, workloads and schedulers a rival is faster beyond noise, the worst 5 of them:" in shown
    )
    assert shown.count("linear, shape") == 5
    assert shown.index("shape 14") < shown.index("shape 10")
    assert "shape 9," not in shown
    assert sections.details(found).count("linear, shape") == 15


def test_a_network_on_a_cpu_stands_against_the_fastest_form_of_each_rival(tmp_path):
    variants = {"diffkern": form(100, 1.0), "diffkern, batch_invariant": form(120, 1.2),
                "diffusers": form(250, 2.5), "diffusers, channels_last": form(200, 2.0),
                "diffusers, slow": form(300, 3.0), "diffusers, accelerated": form(110, 1.1),
                "ONNX Runtime": form(90, 0.9)}  # fmt: skip
    write(tmp_path, "m/end_to_end-vae", network("vae", variants))
    found = sections.checked(tmp_path)
    summary, accelerated = sections.summary("figures", found), "| vae, bfloat16 | 250 ms | 110 ms | - | 2.27 | - | 0.91"
    assert "| | diffkern | diffusers | ONNX Runtime | first call: diffkern, torch.compile | memory" in summary
    assert "| vae, bfloat16 | 100 ms | 2.00 | 0.90 | 1.0 s, - | 10 MB, 10 MB |" in summary
    assert accelerated in sections.details(found)
    del variants["diffusers"]
    write(tmp_path, "m/end_to_end-vae", network("vae", variants))
    assert "| 110 ms |" not in sections.details(sections.checked(tmp_path)), "not without what it accelerates"


def test_an_op_timed_alone_has_no_rival(tmp_path):
    row = workload("randn", {"cpu": figures(10), "copy": figures(5)})
    assert row_of({**row, "times": {"torch": figures(10), "copy": figures(5)}}) is None, "no kernel of diffkern"
    write(tmp_path, "m/ops-randn", [row])
    found = sections.checked(tmp_path)
    details = sections.details(found)
    assert "| randn | - | 50 % of copy |" in details
    assert "| cpu | 10 (10 to 10) | 8000.0 GB/s | 50 % | - | - | - |" in details


def test_a_readme_has_the_machine_of_each_kind_with_the_most_records(tmp_path):
    other = {**CPU, "devices": {"cpu": "an old CPU, 2 of 2 threads, torch uses AVX512"}}
    variants = {"diffkern": form(10, 1.0), "diffusers": form(20, 2.0)}
    for name in ("dit", "vae"):
        write(tmp_path, f"new/end_to_end-{name}", network(name, variants))
    write(tmp_path, "old/end_to_end-dit", network("dit", variants), other)
    write(tmp_path, "gpu/end_to_end-dit", network("dit", variants), GPU)
    found = sections.checked(tmp_path)
    assert {records.device(r["machine"]) for r in records.foremost(found)} == {
        "NVIDIA H200", "a CPU with AVX2, 2 threads",
    }  # fmt: skip
    assert "an old CPU" not in (summary := sections.summary("figures", found))
    assert "NVIDIA H200" in summary
    assert "### dit, bfloat16, an old CPU with AVX512, 2 threads, torch 2.13.0" in sections.details(found)


def test_schedulers_bounds_and_likelihoods(tmp_path):
    scheduler = {"scheduler": "HeunDiscreteScheduler", "sample": [1, 4, 64, 64], "dtype": "float32", "steps": 20,
                 "us a step": {"fused": spread(100, 90, 110), "diffusers": spread(80)},
                 "faster by": spread(0.8, 0.7, 0.9)}  # fmt: skip
    write(tmp_path, "m/schedulers", [scheduler])
    ratios = {"diffkern": 1.0, "plain PyTorch": 1.5, "loop": 8.0}
    bound = {"what": "a bound", "dtype": "float32", "variants": {
        name: {"ms a pair": spread(2.5 * times), "diffkern is faster by": spread(times)}
        for name, times in ratios.items()
    }}  # fmt: skip
    write(tmp_path, "m/vlb-float32", bound)
    scores = [{"data": "noise", "method": method, "pictures": 4, "bits_per_dim": bits, "standard_error": 0.0125,
               "seconds": 10.0} for method, bits in (("vlb", 9.5), ("ode", 8.25))]  # fmt: skip
    write(tmp_path, "m/likelihood", {"command": "diffkern likelihood", "rows": scores})
    found = sections.checked(tmp_path)
    details, likelihoods = sections.details(found), sections.summary("likelihoods", found)
    assert likelihoods in details
    assert "| HeunDiscrete | 1 x 4 x 64 x 64 | float32 | 100 (90 to 110) | 0.80 (0.70 to 0.90) |" in details
    assert "| HeunDiscrete, 1 x 4 x 64 x 64, float32 | fused, 100 (90 to 110) us a step | diffusers, 80" in details
    assert "| float32 | 2.5 (2.5 to 2.5) | 1.50 (1.50 to 1.50) | 8.00 (8.00 to 8.00) |" in details
    assert "| bits/dim | pictures | VLB, 2.5 s a picture | ODE, 2.5 s a picture |" in likelihoods
    assert "| noise | 4 | 9.500 ± 0.013 | 8.250 ± 0.013 |" in likelihoods


def test_a_record_says_how_it_was_made(tmp_path):
    write(tmp_path, "m/ops-randn", [workload("randn", {"cpu": figures(10), "copy": figures(5)})])
    details = sections.details(sections.checked(tmp_path))
    assert "| m/ops-randn.json | 2026-11-27 | `abc1234` | `diffkern bench ops` |" in details
    assert "a CPU with AVX2, 2 threads. cpu: a CPU, 2 of 2 threads, AVX2; torch 2.13.0, c++ g++ 12.2." in details


def test_the_first_picture(tmp_path):
    variants = {"diffkern": {"cold": spread(30), "warm": spread(2.5, 2.4, 2.6)},
                "diffusers": {"warm": spread(5), "diffkern is faster by": spread(2.0, 1.9, 2.1)}}  # fmt: skip
    results = {"first picture": "emoji-32", "what": "a picture", "dtype": "float32", "variants": variants,
               "phases": {"torch": spread(1.25), "rest": spread(0.5)},
               "refused": {"torch.compile": "no compiler"}}  # fmt: skip
    write(tmp_path, "m/cold_start", results)
    details = sections.details(sections.checked(tmp_path))
    assert "| diffkern | 30 (30 to 30) | 2.5 (2.4 to 2.6) | - |" in details
    assert "| diffusers | - | 5 (5 to 5) | 2.00 (1.90 to 2.10) |" in details
    assert "Where diffkern's time goes, warm: torch 1.2 s, rest 0.5 s." in details
    assert "torch.compile: no compiler" in details


def test_a_long_job(tmp_path):
    jobs = [{"processes": p, "pictures_per_second": spread(15.0 * p)} for p in (1, 2)]
    growth = [{"n": n, "ms_per_picture": spread(ms), "peak_mb": mb} for n, ms, mb in ((64, 70, 500), (1024, 65, 510))]
    results = {"model": "emoji-32", "steps": 4, "n": 512, "jobs": jobs, "growth": growth,
               "efficiency": spread(0.96, 0.94, 0.98)}  # fmt: skip
    write(tmp_path, "m/dataset", results)
    details = sections.details(sections.checked(tmp_path))
    assert "1 process draws 15 (15 to 15) pictures a second, 2 draw 30 (30 to 30): each 96 % (94 to 98 %)" in details
    assert "From 64 to 1024 pictures one takes 65 to 70 ms of one process" in details
    assert "| 1024 | 65 (65 to 65) | 510 |" in details

    rates = [72.0, 71, 72, 72, 73, 72, 72, 72, 72, 71.5]
    whole = {"model": "emoji-32", "steps": 4, "whole": 50000, "processes": 2, "seconds": 696.0,
             "pictures_per_second_by_tenth": rates, "peak_mb_before": [450, 451], "peak_mb": [460, 458]}  # fmt: skip
    write(tmp_path, "m/dataset-whole", whole)
    details = sections.details(sections.checked(tmp_path))
    assert "1 process draws 15" in details
    assert "50000 pictures of emoji-32 in 4 steps by 2 processes, takes 11.6 minutes" in details
    assert "72 pictures a second in its first tenth, 72 in its last, 71 to 73 in all of them" in details
    assert "is 451 MB before the first picture of the job, 460 MB after the last" in details
