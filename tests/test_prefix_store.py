"""What the cached prefix makes of damage, kills, other processes and too little room."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.core.errors import EdgetuneError
from edgetune.train.prefix import store as prefix_store
from edgetune.train.prefix.cache import PrefixCache
from edgetune.train.prefix.store import RowStore
from support.laws import bert, mlp
from support.prefixes import (
    Arrays,
    bits,
    fit,
    sparse,
    texts,
    trained_bits,
)

torch.set_num_threads(1)

# Damage, kills, and others


@pytest.mark.parametrize(("file", "place"), [("tensor-0.bin", 32 * 4 * 3), ("rows.bin", 32 * 2 + 20)])
def test_one_changed_byte_is_found_and_mended(file: str, place: int, tmp_path: Path) -> None:
    expected = trained_bits(tmp_path)
    (cache,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    with (cache / file).open("r+b") as handle:
        handle.seek(place)
        value = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([value ^ 1]))
    model = sparse(bert(3))
    with PrefixCache.open(model, texts(), folder=tmp_path, chunk_rows=4) as opened:
        fit(model, texts(), opened)
        assert opened.report.damaged == 1
    assert bits(model) == expected


def test_files_cut_short_are_filled_again(tmp_path: Path) -> None:
    expected = trained_bits(tmp_path)
    (cache,) = (entry for entry in tmp_path.iterdir() if entry.is_dir())
    os.truncate(cache / "tensor-0.bin", 1000)
    os.truncate(cache / "rows.bin", 100)
    assert trained_bits(tmp_path) == expected
    (cache / "about.json").unlink()  # never finished: made anew
    assert trained_bits(tmp_path) == expected


def light_bits(folder: Path, epochs: int = 2, chunk_rows: int = 4) -> str:
    """A training that needs no library of models, for children."""
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=folder, chunk_rows=chunk_rows) as cache:
        fit(model, split, cache, epochs=epochs)
    return bits(model)


def filling(pipe: Connection, folder: str) -> None:
    """In a child: fill the cache, and before each write into it ask the parent how much of it to do."""
    torch.set_num_threads(1)
    plain = prefix_store._write_at

    def asked(file: Any, offset: int, value: bytes) -> None:
        pipe.send("write")
        half = len(value) // 2 if pipe.recv() == "half" else len(value)
        plain(file, offset, value[:half])
        if half < len(value):
            pipe.send("half")
            pipe.recv()

    prefix_store._write_at = asked  # type: ignore[assignment]
    light_bits(Path(folder), epochs=1)
    pipe.send("done")


@contextmanager
def started(work: Callable[[Connection, str], None], folder: Path) -> Iterator[tuple[Any, Connection]]:
    """A child that does `work`, and our end of the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(theirs, str(folder)))
    child.start()
    theirs.close()
    yield child, ours
    child.join()
    ours.close()


def let(pipe: Connection, writes: int) -> None:
    for _ in range(writes):
        assert pipe.recv() == "write"
        pipe.send("whole")


@pytest.mark.parametrize("writes", [8, 15])
def test_a_kill_in_the_middle_of_a_write_leaves_nothing_half_valid(writes: int, tmp_path: Path) -> None:
    with started(filling, tmp_path / "killed") as (child, pipe):
        let(pipe, writes)  # each row is two: its values, and what vouches for them
        assert pipe.recv() == "write"
        pipe.send("half")
        assert pipe.recv() == "half"
        os.kill(child.pid, signal.SIGKILL)
    assert list(tmp_path.rglob("use-*.lock"))
    assert light_bits(tmp_path / "killed") == light_bits(tmp_path / "whole")


def beside(pipe: Connection, folder: str) -> None:
    """In a child: open the cache, wait for the other one to have it open too, and train."""
    torch.set_num_threads(1)
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=Path(folder), chunk_rows=2) as cache:
        pipe.send("open")
        pipe.recv()
        fit(model, split, cache)
    pipe.send(bits(model))


def test_two_processes_fill_one_cache_at_once(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with started(beside, tmp_path / "both") as (_, pipe):
        assert pipe.recv() == "open"
        with PrefixCache.open(model, split, folder=tmp_path / "both", chunk_rows=2) as cache:
            pipe.send("go")
            fit(model, split, cache)
        theirs = pipe.recv()
    assert len(list(tmp_path.glob("both/*/about.json"))) == 1
    assert theirs == bits(model) == light_bits(tmp_path / "alone", chunk_rows=2)


def test_two_models_at_once_in_one_folder(tmp_path: Path) -> None:
    expected = [trained_bits(tmp_path / "alone", seed=seed) for seed in (0, 1)]
    models = [sparse(bert(3)) for _ in range(2)]
    caches = [PrefixCache.open(model, texts(), folder=tmp_path / "both", chunk_rows=4) for model in models]
    for seed, (model, cache) in enumerate(zip(models, caches, strict=True)):
        fit(model, texts(), cache, seed)
        cache.close()
    assert [bits(model) for model in models] == expected
    assert caches[1].report.computed == 0


# Room


def store(folder: Path, name: str, mib: float, max_mib: float) -> RowStore:
    return RowStore.open(folder, {"name": name}, [[int(mib * 2**20 / 4)] * 4], max_mib, "take fp16")


def test_the_room_that_is_needed_is_known_before_anything_runs(tmp_path: Path) -> None:
    model = sparse(bert(3))
    with pytest.raises(EdgetuneError, match=r"14 rows needs 0\.0 MiB, more than cache_max_mib \(0\.001\)") as error:
        PrefixCache.open(model, texts(), folder=tmp_path, max_mib=0.001)
    assert "set cache_max_mib to 1, set cache_dtype to fp16" in error.value.action
    assert not list(tmp_path.glob("*/*"))
    assert not any("forward" in module.__dict__ for module in model.modules())


def names_in(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["name"] for path in folder.glob("*/about.json")}


def test_the_least_recently_used_cache_makes_room_unless_it_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "not-a-cache").mkdir()
    (tmp_path / "not-a-cache" / "precious").write_text("kept")
    used = store(tmp_path, "used", 1, 4)
    for n, name in enumerate(("old", "new")):
        opened = store(tmp_path, name, 1, 4)
        opened.close()
        os.utime(opened.folder / "about.json", (n, n))
    os.utime(used.folder / "about.json", (0, 0))
    assert names_in(tmp_path) == {"used", "old", "new"}
    store(tmp_path, "more", 1, 3.5).close()
    assert names_in(tmp_path) == {"used", "new", "more"}
    with pytest.raises(EdgetuneError, match=r"needs 2\.5 MiB, but other trainings use 1\.0 MiB of the 3 "):
        store(tmp_path, "most", 2.5, 3)
    used.close()
    store(tmp_path, "most", 2.5, 3).close()
    assert names_in(tmp_path) == {"most"}
    assert (tmp_path / "not-a-cache" / "precious").exists()


def test_a_disk_without_the_room_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**19))
    with pytest.raises(EdgetuneError, match=r"needs 1\.0 MiB, and there are 0\.5 in"):
        store(tmp_path, "any", 1, 4)


def test_a_store_gives_back_what_it_got(tmp_path: Path) -> None:
    opened = RowStore.open(tmp_path, {}, [[3, 0, 2], [1, 1, 1]], 1, "")
    assert opened.read(0) is None
    opened.write(2, b"i" * 16, [b"ab", b"c"])
    opened.write(1, b"j" * 16, [b"", b"d"])
    assert opened.read(2) == (b"i" * 16, [b"ab", b"c"])
    assert opened.read(1) == (b"j" * 16, [b"", b"d"])
    assert (opened.read(0), opened.inputs(0), opened.inputs(1)) == (None, None, b"j" * 16)
    with pytest.raises(EdgetuneError, match="row 0 takes 2 bytes instead of 3"):
        opened.write(0, b"k" * 16, [b"ab", b"c"])
    opened.close()
    opened = RowStore.open(tmp_path, {}, [[3, 0, 2], [1, 1, 1]], 1, "")
    assert opened.read(2) == (b"i" * 16, [b"ab", b"c"])
    opened.clear()
    assert opened.read(2) is None
    opened.close()


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("use-*.lock"))  # every cache was closed
