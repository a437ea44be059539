"""Weights and configs from somebody who means harm, or from a broken disk: 300 of them, the same in every run. Each
ends with a model or with one sentence, soon, in little memory, without a look at any file outside its folder."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import write_tiny
from sentences import expect_a_sentence

import diffkern
from diffkern import cli
from diffkern.models.folder import WEIGHTS, ModelError

SECRET = "secret.safetensors"
PATHS = (
    "../" + SECRET,
    "/etc/passwd",
    "..",
    "a/../../" + SECRET,
    "\0",
    "con\n",
    "https://example.com/x",
    "~/" + SECRET,
)
NUMBERS = (-1, 0, 1, 3, 65536, 65537, 1 << 31, 1 << 63, 1 << 64, 10**4000, 1e308, float("nan"), float("inf"), True)
OTHERS: tuple[Any, ...] = (
    None,
    "",
    "x" * 100_000,
    [],
    [[]],
    {},
    [1, 2, 3, 4],
    ["a"] * 1000,
    {"a": {"b": []}},
    *PATHS,
    *NUMBERS,
)
CONFIGS = ("config.json", "scheduler_config.json", "labels.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A good model, in a folder with a file beside it that nobody may read."""
    outer = tmp_path_factory.mktemp("outer")
    (outer / SECRET).write_bytes(b"secret")
    return write_tiny(outer / "model")


_opened: list[str] | None = None  # while somebody listens
_DOES = (
    "open",
    "exec",
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
)


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if _opened is not None and event in _DOES:
        _opened.append(f"{event} {args[0]}")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """The files that Python opens and the code that it runs. Hooks of audits stay for good: there is one."""
    global _opened
    if _hear not in _hooks:
        sys.addaudithook(_hear)
        _hooks.append(_hear)
    diffkern.load("emoji-32")  # which imports what is imported late
    _opened = []
    yield _opened
    _opened = None


_hooks: list[Any] = []


def load(folder: Path, heard: list[str]) -> str | None:
    """The sentence that loading ends with, or None."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    heard.clear()
    try:
        diffkern.load(folder)
        sentence = None
    except ModelError as error:
        sentence = str(error)
        assert sentence
        assert "\n" not in sentence
        assert len(sentence) < 1000, f"{len(sentence)} letters are no sentence"
    assert time.monotonic() - start < 20  # of a busy machine: it takes a hundredth of that
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "kilobytes"
    outside = [what for what in heard if not what.startswith(f"open {folder}/")]
    assert not outside, "a file outside the folder was opened, or code was run"
    return sentence


def parts(weights: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def wrong_weights(weights: bytes, r: random.Random) -> bytes:
    """A weights file with something wrong in its header, or with another length."""
    header, data = parts(weights)
    names = [name for name in header if name != "__metadata__"]
    name, other = r.sample(names, 2)
    entry = header[name]
    size = r.choice((0, 1, len(data), len(data) + 1, 1 << 31, 1 << 62, (1 << 64) - 1, -1))
    changes: list[Callable[[], Any]] = [
        lambda: entry.update(
            shape=r.choice([[], [0], [-1], [1 << 63], [1 << 32, 1 << 32], [1.5], "x", None, [8] * 99])
        ),
        lambda: entry.update(dtype=r.choice(["F64", "I64", "BOOL", "F8_E4M3", "Q4", "", None, 7, "O"])),
        lambda: entry.update(data_offsets=[entry["data_offsets"][0], size]),
        lambda: entry.update(data_offsets=[size, entry["data_offsets"][1]]),
        lambda: entry.update(
            data_offsets=r.choice([[], [0], [0, 1, 2], "01", None, [0.5, 1], header[other]["data_offsets"]])
        ),
        lambda: header.update({r.choice(PATHS): header.pop(name)}),
        lambda: header.update({name + r.choice((".", "s", " ", "\0")): header.pop(name)}),
        lambda: header.update({name: r.choice(OTHERS)}),
        lambda: header.update(__metadata__=r.choice(OTHERS)),
        lambda: header.pop(name),
        lambda: entry.update(extra=r.choice(OTHERS)),
    ]
    kind = r.random()
    if kind < 0.7:
        r.choice(changes)()
        return joined(json.dumps(header).encode(), data)
    plain = json.dumps(header).encode()
    if kind < 0.8:
        return weights[: r.randrange(len(weights))]
    if kind < 0.9:
        return joined(plain, data, r.choice((0, 1, len(plain) - 1, len(plain) + 1, 1 << 40, (1 << 64) - 1)))
    nested = r.choice((b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe" + plain, plain + b"}", b"null", b""))
    return joined(nested, data)


def wrong_json(text: str, r: random.Random) -> bytes:
    """A JSON file with something wrong in it."""
    value = json.loads(text)
    kind = r.random()
    if kind < 0.75:
        for key in r.sample(sorted(value), r.choice((1, 1, min(2, len(value))))):
            old = value[key]
            if isinstance(old, list) and old and r.random() < 0.7:
                old[r.randrange(len(old))] = r.choice(OTHERS)
                if r.random() < 0.3:
                    value[key] = old * r.choice((2, 10, 10_000))
            else:
                value[key] = r.choice(OTHERS)
        if r.random() < 0.2:
            value[r.choice(PATHS)] = r.choice(OTHERS)
        sys.set_int_max_str_digits(0)  # to write what nobody should be able to read
        try:
            return json.dumps(value).encode()
        finally:
            sys.set_int_max_str_digits(4300)
    if kind < 0.85:
        return text.encode()[: r.randrange(len(text))]
    deep = r.choice(
        ("[" * 200_000, '{"a":' * 200_000, "[" * 50_000 + "]" * 50_000, "1" * 100_000, "\ufeff" + text, '"')
    )
    return r.choice((deep.encode(), text.encode("utf-16"), b"\xff" + text.encode(), text.encode() * 2, b""))


def copy_of(folder: Path, where: Path) -> Path:
    return Path(shutil.copytree(folder, where, dirs_exist_ok=True))


def test_weights_that_mean_harm(folder, tmp_path, heard):
    r, refused = random.Random(8), 0
    copy, weights = copy_of(folder, tmp_path / "model"), (folder / WEIGHTS).read_bytes()
    assert load(copy, heard) is None
    for _ in range(150):
        (copy / WEIGHTS).write_bytes(wrong_weights(weights, r))
        refused += load(copy, heard) is not None
    assert refused > 120, "most of them are no weights"


def test_configs_that_mean_harm(folder, tmp_path, heard):
    r, refused = random.Random(8), 0
    copy = copy_of(folder, tmp_path / "model")
    for i in range(150):
        file = copy / CONFIGS[i % 3]
        good = file.read_text()
        file.write_bytes(wrong_json(good, r))
        refused += load(copy, heard) is not None
        file.write_text(good)
    assert refused > 75, "many of them are no configs; a number or a name may be another"
    assert load(copy, heard) is None


@pytest.mark.parametrize("name", PATHS)
def test_an_index_leads_nowhere(folder, tmp_path, heard, name):
    """Of weights in several files: none is looked for outside the folder, whatever the index calls it."""
    copy = copy_of(folder, tmp_path / "outer" / "model")
    (copy / WEIGHTS).rename(copy.parent / SECRET)  # good weights, were they read
    header, _ = parts((copy.parent / SECRET).read_bytes())
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(header, name)}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert WEIGHTS in (load(copy, heard) or "")


def test_what_is_no_file_is_not_waited_for(folder, tmp_path, heard):
    for name in (*CONFIGS[:2], WEIGHTS):
        copy = copy_of(folder, tmp_path / name)
        (copy / name).unlink()
        os.mkfifo(copy / name)
        assert name in (load(copy, heard) or "")
    copy = copy_of(folder, tmp_path / "large")
    with open(copy / "config.json", "ab") as file:
        file.truncate(1 << 40)  # a hole
    assert "which is no config" in (load(copy, heard) or "")


@pytest.mark.parametrize("timesteps", [0, -5, 10**6 + 1, 1 << 31, float("inf"), float("nan")])
def test_a_schedule_has_a_length(folder, tmp_path, heard, timesteps):
    """It asked for all the memory there is, or for an integer that is none."""
    copy = copy_of(folder, tmp_path / "model")
    config = json.loads((copy / CONFIGS[1]).read_text())
    (copy / CONFIGS[1]).write_text(json.dumps(config | {"num_train_timesteps": timesteps}))
    assert CONFIGS[1] in (load(copy, heard) or "")


@pytest.mark.parametrize("name", [["UNet2DModel"], {}, 3, "os.system", "x" * 10_000, "a\nb"])
def test_a_class_is_a_known_name(folder, tmp_path, heard, name):
    copy = copy_of(folder, tmp_path / "model")
    config = json.loads((copy / CONFIGS[0]).read_text())
    (copy / CONFIGS[0]).write_text(json.dumps(config | {"_class_name": name}))
    assert "holds a" in (load(copy, heard) or "")


@pytest.mark.parametrize("command", [["sample"], ["likelihood", "--data", "noise"]], ids=["sample", "likelihood"])
def test_the_command_line_says_it_in_one_sentence(folder, tmp_path, capsys, monkeypatch, command):
    weights, config = (folder / WEIGHTS).read_bytes(), (folder / CONFIGS[0]).read_bytes()
    monkeypatch.chdir(tmp_path)
    for name, damage in (
        (WEIGHTS, weights[:100]),
        (WEIGHTS, joined(b"[" * 1000, weights)),
        (WEIGHTS, b""),
        (CONFIGS[0], config[:50]),
        (CONFIGS[0], b'{"_class_name": ["os.system"]}'),
    ):
        (copy_of(folder, tmp_path / "model") / name).write_bytes(damage)
        expect_a_sentence(lambda: cli.main([*command, "--model", "model"]), "model", capsys, ["model"])
