"""`diffkern bench compare`: what it calls faster, slower and noise, its exit code, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentences import expect_a_sentence

from diffkern.bench.compare import Change, Timing, compare, load
from diffkern.cli import main

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MACHINE = {"versions": {"torch": "2.13.0", "nvcc": None}, "devices": {"cpu": "a CPU"}, "threads": 2}


def spread(median: float, p20: float | None = None, p80: float | None = None) -> dict[str, float]:
    """By default a twentieth of noise to either side."""
    return {"median": median, "p20": p20 or 0.95 * median, "p80": p80 or 1.05 * median}


def ops(**us: float) -> list[dict[str, Any]]:
    times = {variant: {"us": spread(median), "GB/s": 1.0} for variant, median in us.items()}
    return [{"op": "randn", "sample": "latents", "dtype": "float32", "times": times}]


def network(**ms: float) -> dict[str, Any]:
    variants = {name: {"ms": spread(median), "peak memory, MB": 10} for name, median in ms.items()}
    return {"network": "dit", "what": "a DiT", "dtype": "bfloat16", "variants": variants, "refused": {}}


def bound(**ms: float) -> dict[str, Any]:
    variants = {name: {"ms a pair": spread(median)} for name, median in ms.items()}
    return {"what": "64 pictures", "dtype": "float32", "timesteps": 32, "variants": variants}


def schedulers(**us: float) -> list[dict[str, Any]]:
    each = {name: spread(median) for name, median in us.items()}
    return [{"scheduler": "DDIM", "sample": [1, 4, 8, 8], "dtype": "float32", "steps": 20, "us a step": each}]


def start(**seconds: float) -> dict[str, Any]:
    variants = {name: {"warm": spread(median)} for name, median in seconds.items()}
    return {"first picture": "emoji-32", "what": "a picture", "dtype": "float32", "variants": variants}


KINDS = {
    "ops-randn": (ops, "randn, latents, float32, a", "us"),
    "end_to_end-dit-bfloat16": (network, "dit, bfloat16, a", "ms"),
    "vlb-float32": (bound, "bound, float32, a", "ms"),
    "cold_start": (start, "emoji-32, float32, warm, a", "s"),
    "schedulers": (schedulers, "DDIM, 1 x 4 x 8 x 8, float32, a", "us"),
}


def write(name: str, results: Any, **machine: Any) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": {**MACHINE, **machine}, "results": results}), encoding="utf-8")
    return path


@pytest.fixture(name="here", autouse=True)
def make_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="say")
def make_say(capsys):
    """Runs the command: exit code, what it printed, and its warnings."""

    def run(*args: object) -> tuple[int, str, str]:
        code = main(["bench", "compare", *map(str, args)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_is_read(kind, say):
    make, name, unit = KINDS[kind]
    before, after = write("a.json", make(a=2000.0, b=10.0, c=3.0)), write("b.json", make(a=2200.0, b=5.0, c=3.1))
    record = load(before)
    assert record is not None
    assert len(timings := record.timings) == 3
    assert timings[name] == Timing(2000.0, 1900.0, 2100.0, unit)
    changes = {c.name[-1]: c for c in compare(before, after).changes}
    assert {key: c.verdict for key, c in changes.items()} == {"a": "noise", "b": "faster", "c": "noise"}
    assert {key: round(c.percent, 6) for key, c in changes.items()} == {"a": 10, "b": -50, "c": round(10 / 3, 6)}
    code, out, err = say(before, after)
    assert (code, err) == (0, "")
    assert f"faster  {name[:-1]}b" in out
    assert "-50.0 %" in out
    assert name not in out
    assert out.endswith("of 3 timings 1 are faster, 0 slower and 2 within noise; none slower by more than 5 %\n")
    _, out, _ = say(before, after, "--all")
    assert f"noise   {name}" in out
    assert f"2000 {unit} (1900 to 2100) 2200 {unit} (2090 to 2310) +10.0 %" in " ".join(out.split())


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((10, 9, 11), (12, 11, 13), "noise"),  # they touch
        ((10, 9, 11), (12, 11.01, 13), "slower"),
        ((12, 11.01, 13), (10, 9, 11), "faster"),
        ((12, 11, 13), (10, 9, 11), "noise"),
        ((10, 10, 10), (10, 10, 10), "noise"),
        ((10, 9, 30), (20, 19, 21), "noise"),  # within the other
    ],
)
def test_noise_is_where_the_intervals_meet(before, after, verdict):
    a, b = (Timing(median, p20, p80, "us") for median, p20, p80 in (before, after))
    assert Change("it", a, b).verdict == verdict


@pytest.mark.parametrize(
    ("before", "after", "copy", "verdict", "regresses"),
    [
        ((100, 95, 105), (150, 145, 155), 1.0, "slower", True),
        ((100, 95, 105), (150, 145, 155), 1.5, "noise", False),  # so did the copy: it is the machine
        ((100, 95, 105), (150, 145, 155), 1.3, "slower", True),  # 115, from 111.5
        ((100, 99, 101), (150, 149, 151), 1.46, "slower", False),  # 102.7, from 102.05: beyond noise, by 2.7 %
        ((100, 95, 105), (101, 96, 106), 0.5, "noise", False),  # as slow as it was on a machine twice as fast
        ((100, 95, 105), (50, 48, 52), 0.5, "noise", False),
        ((100, 95, 105), (30, 29, 31), 0.5, "faster", False),
        ((100, 95, 105), (150, 145, 155), 2.0, "noise", False),  # slower as measured, faster as a share
    ],
)
def test_what_the_machine_did_is_no_change(before, after, copy, verdict, regresses, say):
    for name, us, machine in (("a.json", before, 1.0), ("b.json", after, copy)):
        figures = {"cpu": {"us": spread(*us)}, "copy": {"us": spread(20 * machine)}}
        write(name, [{**ops()[0], "times": figures}])
    (change,) = compare(Path("a.json"), Path("b.json")).changes  # the copy is no result
    assert (change.verdict, change.regresses(5)) == (verdict, regresses)
    assert change.moved == pytest.approx(copy)
    code, out, _ = say("a.json", "b.json")
    assert code == regresses
    times = f"{copy:.3g} times as long (from {copy:.3g} to {copy:.3g}, beside 1 timings)"
    assert f"the machine itself: copy takes {times}\n" in out


def test_of_an_op_that_multiplies_the_product_is_the_yardstick(say):
    before = write("a.json", ops(cpu=10, torch=30, matmul=5, copy=4))
    after = write("b.json", ops(cpu=10, torch=30, matmul=10, copy=3))
    assert [c.moved for c in compare(before, after).changes] == [2.0, 2.0]
    assert (
        "the machine itself: matmul takes 2 times as long (from 2 to 2, beside 2 timings); copy takes 0.75 times"
        in (say(before, after)[1])
    )
    assert not compare(write("c.json", network(copy=1, ours=1)), write("d.json", network(copy=2, ours=1))).moved


def test_what_is_slower_by_more_than_the_limit_gives_exit_code_1(say):
    before = write("a.json", [{**ops()[0], "times": {"cpu": {"us": spread(100, 99.9, 100.1)}}}])
    after = write("b.json", [{**ops()[0], "times": {"cpu": {"us": spread(106, 105, 107)}}}])
    code, out, _ = say(before, after)
    assert code == 1
    assert "slower  randn, latents, float32, cpu  100 us (99.9 to 100.1)  106 us (105 to 107)  +6.0 %" in out
    assert out.endswith("of 1 timings 0 are faster, 1 slower and 0 within noise; 1 slower by more than 5 %\n")
    assert say(before, after, "--regression", 5.9)[0] == 1
    assert say(before, after, "--regression", 6.1)[0] == 0
    assert say(after, before, "--regression", 0)[0] == 0
    # Noise is no regression, however far the medians are apart.
    noisy = write("b.json", [{**ops()[0], "times": {"cpu": {"us": spread(150, 100, 200)}}}])
    assert say(before, noisy, "--regression", 0)[0] == 0


def test_the_worst_comes_first(say):
    before, after = write("a.json", ops(a=10, b=10, c=10, d=10)), write("b.json", ops(a=20, b=5, c=40, d=2))
    lines = [line for line in say(before, after)[1].splitlines() if line.startswith(("slower", "faster"))]
    assert [line.split()[4] for line in lines] == ["c", "a", "d", "b"]


def test_what_only_one_has_is_named(say):
    before, after = write("a.json", ops(cpu=10, torch=20)), write("b.json", ops(cpu=10, triton=5))
    code, out, _ = say(before, after)
    assert code == 0
    assert "only before: randn, latents, float32, torch\nonly after: randn, latents, float32, triton\n" in out


def test_other_machines_are_warned_of_in_one_line(say):
    before = write("a.json", network(a=1), threads=1, versions={"torch": "2.12.0", "python": "3.11"})
    after = write("b.json", {**network(a=1), "what": "a larger DiT"}, devices={"cpu": "a CPU", "cuda:0": "a GPU"})
    code, _, err = say(before, after)
    assert code == 0
    assert err == ("diffkern bench: warning: not the same threads 1 and 2; torch 2.12.0 and 2.13.0; the work a DiT and "
                   "a larger DiT; cuda:0 none and a GPU\n")  # fmt: skip


def test_folders_are_compared_file_by_file(say):
    for name, (make, *_) in KINDS.items():
        write(f"a/{name}.json", make(a=10, b=10))
        write(f"b/{name}.json", make(a=10, b=20), threads=4)
    write("a/ops-linear.json", ops(cpu=1))
    for folder in "ab":
        write(f"{folder}/likelihood.json", {"rows": []})
    code, out, err = say("a", "b")
    assert code == 1
    assert err == "diffkern bench: warning: not the same threads 2 and 4\n"
    assert len([line for line in out.splitlines() if line.startswith("slower")]) == 5
    assert "only before: ops-linear.json\n" in out
    assert "not compared: likelihood.json, which has no timings\n" in out
    assert out.endswith("of 10 timings 0 are faster, 5 slower and 5 within noise; 5 slower by more than 5 %\n")


def test_a_committed_record_is_as_fast_as_itself(say):
    folder = RESULTS / "nvidia-h200"
    code, out, err = say(folder, folder, "--regression", 0)
    assert (code, err) == (0, "")
    found = compare(folder, folder)
    records = [load(path) for path in folder.glob("*.json")]
    assert len(found.changes) == sum(len(record.timings) for record in records if record is not None) > 250
    assert all(c.verdict == "noise" and c.percent == 0 for c in found.changes)
    assert f"{len(found.changes)} within noise; none slower" in out


def test_every_committed_record_can_be_read():
    paths = sorted(RESULTS.glob("*/*.json"))
    records = {path: load(path) for path in paths}
    assert {path.name for path, record in records.items() if record is None} <= {"likelihood.json"}
    for path, record in records.items():
        assert record is None or path.name.startswith(record.kind)


SPOILT: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "b.json is not valid JSON"),
    "a list": ([1], "b.json is not a record of a benchmark: it has no machine and results"),
    "no devices": (
        {"machine": {"devices": None}, "results": ops(cpu=1)},
        "b.json is not a record of a benchmark: it has no machine and results",
    ),
    "no timings": ({"machine": {}, "results": {"rows": []}}, "b.json is not a record of timings: those are of ops,"),
    "empty": ({"machine": {}, "results": []}, "b.json is not a record of timings"),
    "a missing key": (
        {"machine": {}, "results": [{"op": "randn", "times": {"cpu": {}}}]},
        "b.json is not a record of ops: it lacks 'sample'",
    ),
    "no spread": (
        {"machine": {}, "results": [{**ops()[0], "times": {"cpu": {"us": 3.0}}}]},
        "b.json is not a record of ops: ",
    ),
    "a time of 0": (
        {"machine": {}, "results": [{**ops()[0], "times": {"cpu": {"us": spread(3.0, 1e-9, 2.0)}}}]},
        "b.json is not a record of ops: 3.0, from 1e-09 to 2.0, is no time",
    ),
    "twice the same": (
        {"machine": {}, "results": [*ops(cpu=1), *ops(cpu=2)]},
        "b.json is not a record of ops: randn, latents, float32, cpu is in it twice",
    ),
    "another kind": (
        {"machine": {}, "results": network(a=1)},
        "a.json is a record of ops and b.json of end_to_end: give two of the same kind",
    ),
    "nothing in common": ({"machine": {}, "results": ops(triton=1)}, "nothing was timed in both of a.json and b.json"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_record_gets_a_sentence(name, capsys):
    content, message = SPOILT[name]
    write("a.json", ops(cpu=1))
    Path("b.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    run = lambda: main(["bench", "compare", "a.json", "b.json"])  # noqa: E731
    expect_a_sentence(run, message, capsys, left=["a.json", "b.json"])


WRONG = {
    ("a.json", "c.json"): "diffkern bench: there is no c.json",
    ("a.json", "."): ". is a folder and a.json is a file: give two records, or two folders of records",
    ("empty", "empty"): "empty has no records in it: give a folder of .json files, that of one machine",
    (".", "other"): "a.json is a record of ops and other/a.json of something else",
    ("a.json",): "diffkern bench compare: the following arguments are required: after",
    ("a.json", "a.json", "--regression", "-1"): "--regression must be a percentage of 0 or more, not -1.0",
    ("a.json", "a.json", "--regression", "nan"): "--regression must be a percentage of 0 or more, not nan",
    ("a.json", "a.json", "--regression", "much"): "argument --regression: invalid float value: 'much'",
}


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_input_gets_a_sentence(args, capsys):
    write("a.json", ops(cpu=1))
    write("other/a.json", {"rows": []})
    Path("empty").mkdir()
    expect_a_sentence(lambda: main(["bench", "compare", *args]), WRONG[args], capsys, left=["a.json", "empty", "other"])
