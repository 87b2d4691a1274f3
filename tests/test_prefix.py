"""The cached prefix: the same losses and gradients, the same bits whatever the cache held, and what it refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import Mlp, bert, cnn, llama, mlp
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt.lora import LoRA
from edgetune.attach import apply
from edgetune.data import task
from edgetune.data.dataset import Rows, Split
from edgetune.plan import epoch_order
from edgetune.sparse.prefix import store as prefix_store
from edgetune.sparse.prefix.cache import PrefixCache
from edgetune.sparse.prefix.rows import Form, bytes_of, filled, mapped, nothing_in, tensor_of
from edgetune.sparse.prefix.store import RowStore
from edgetune.sparse.update import SparseUpdate
from edgetune.technique import EdgetuneError, call, logits_of

torch.set_num_threads(1)

ROWS = 14


def words(inputs: Sequence[Any], pad_to: int | None = None) -> dict[str, Tensor]:
    """Lists of token ids, padded on the right to the longest, rounded up to 4."""
    width = pad_to or -(-max(len(row) for row in inputs) // 4) * 4
    ids, mask = torch.zeros(len(inputs), width, dtype=torch.int64), torch.zeros(len(inputs), width, dtype=torch.int64)
    for n, row in enumerate(inputs):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def texts(causal: bool = False, changed: int | None = None) -> Split:
    """Rows of 2 to 15 tokens. `changed`: the row of which one token is another."""
    rows = [[3 + (7 * n + 5 * k) % 44 for k in range(2 + n)] for n in range(ROWS)]
    if changed is not None:
        rows[changed][0] += 1
    if causal:
        return Split("causal-lm", Rows(rows), words)
    return Split("text-classification", Rows(rows, [n % 3 for n in range(ROWS)]), words)


class Arrays:
    """Rows of one shape without lengths. `noise`: added anew at each call, as augmentation would."""

    lengths = None

    def __init__(self, *shape: int, noise: float = 0.0) -> None:
        self.inputs = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(9))
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.tensor(list(indices))
        values = self.inputs[rows]
        return values + self.noise * torch.rand_like(values) if self.noise else values, rows % 3


def sparse(model: nn.Module, scheme: Any = "last-1") -> nn.Module:
    return SparseUpdate(scheme=scheme).apply(model)


def freeze(model: nn.Module, *names: str) -> nn.Module:
    """Plain `requires_grad_(False)`."""
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def gradients(model: nn.Module, split: Any, indices: Sequence[int], kind: Any, cache: PrefixCache | None) -> Any:
    """Loss and gradients of one batch in training mode, with the same random numbers each time."""
    inputs, labels = split.batch(indices)
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(11)
    if cache is None:
        logits = logits_of(call(model, inputs))
    else:
        with cache.rows(indices):
            logits = logits_of(call(model, inputs))
    loss = task.loss(kind, logits, labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: Any, b: Any, tolerance: float) -> None:
    assert a[1].keys() == b[1].keys()
    assert abs(a[0] - b[0]) <= tolerance * abs(a[0])
    for name, value in a[1].items():
        assert (value - b[1][name]).abs().max() <= tolerance * max(value.abs().max(), 1e-3), name


def fit(model: nn.Module, split: Any, cache: PrefixCache | None, seed: int = 0, epochs: int = 2) -> list[float]:
    """A short training like edgetune's own; its losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    torch.manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        for indices in epoch_order(len(split), 4, split.lengths, seed, epoch):
            inputs, labels = split.batch(indices)
            optimizer.zero_grad()
            if cache is None:
                logits = logits_of(call(model, inputs))
            else:
                with cache.rows(indices):
                    logits = logits_of(call(model, inputs))
            loss = functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


class Counting:
    """How often the forward of these modules runs."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.count = 0
        for name in names:
            model.get_submodule(name).register_forward_hook(self._one)

    def _one(self, *_: object) -> None:
        self.count += 1


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "bert-last-1": (lambda: sparse(bert(3)), texts(), "text-classification"),
    "bert-last-2": (lambda: sparse(bert(3), "last-2"), texts(), "text-classification"),
    "llama": (lambda: sparse(llama()), texts(causal=True), "causal-lm"),
    "cnn": (lambda: sparse(cnn(), "last-2"), Arrays(3, 16, 16), "image-classification"),
    "mlp-plain": (lambda: freeze(mlp(), "stem", "blocks.0"), Arrays(32), "image-classification"),
    "sliced": (
        lambda: sparse(bert(3), {"bert.encoder.layer.2.*.dense": 0.25, "classifier": "full"}), texts(),
        "text-classification",
    ),
    "sparse-lora": (
        lambda: apply(
            bert(3),
            [SparseUpdate(scheme="last-1"), LoRA(rank=2, targets=["*.layer.1.*.query"], also_train=["classifier"])],
        ),
        texts(),
        "text-classification",
    ),
}  # fmt: skip


# The same losses and gradients


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_without_a_cache(name: str, tmp_path: Path) -> None:
    make, split, kind = MODELS[name]
    model = make()
    indices = [9, 2, 13, 4]
    expected = gradients(model, split, indices, kind, None)
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        first = gradients(model, split, indices, kind, cache)
        again = gradients(model, split, indices, kind, cache)
    close(expected, first, 1e-5)
    assert first[0] == again[0]
    assert all(torch.equal(value, again[1][key]) for key, value in first[1].items())


def test_half_precision_is_bounded_and_takes_half_the_room(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    expected = gradients(model, split, [9, 2, 13, 4], "text-classification", None)
    with PrefixCache.open(model, split, folder=tmp_path / "32") as whole:
        exact = kept_values(whole, split, 13)
    with PrefixCache.open(model, split, folder=tmp_path / "16", dtype="fp16") as cache:
        close(expected, gradients(model, split, [9, 2, 13, 4], "text-classification", cache), 1e-2)
        rounded = kept_values(cache, split, 13)
        assert cache.report.mib - ROWS * 32 / 2**20 == pytest.approx((whole.report.mib - ROWS * 32 / 2**20) / 2)
    assert not torch.equal(exact, rounded)
    assert ((exact - rounded).abs() <= exact.abs() / 2048 + 2**-24).all()


def kept_values(cache: PrefixCache, split: Any, row: int) -> Tensor:
    """What the cache gives for one row."""
    inputs, _ = split.batch([row])
    return cache.kept.load({**inputs} if isinstance(inputs, dict) else {0: inputs}, [row])[0]


def test_frozen_stages_run_once_for_each_row_and_then_no_more(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    inside = Counting(
        model, "bert.embeddings.LayerNorm", "bert.encoder.layer.0.attention", "bert.encoder.layer.1.output"
    )
    trained = Counting(model, "bert.encoder.layer.2.attention.self")
    with PrefixCache.open(model, split, folder=tmp_path, chunk_rows=4) as cache:
        fit(model, split, cache, epochs=1)
        first, after = inside.count, trained.count
        fit(model, split, cache, epochs=1)
        report = cache.report
    assert inside.count == first > 0
    assert trained.count == after + 4
    assert (report.rows, report.hits + report.misses) == (ROWS, 2 * ROWS)
    assert report.misses <= 4  # one in each chunk brings the others
    assert report.stages_skipped == ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1")
    assert (report.boundary, report.first_trained) == ("bert.encoder.layer.1", "bert.encoder.layer.2")


# The same bits, whatever the cache held


def bits(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(bytes_of(value.detach()))
    return digest.hexdigest()


def trained_bits(folder: Path, seed: int = 0, epochs: int = 2, **settings: Any) -> str:
    model = sparse(bert(3))
    with PrefixCache.open(model, texts(), folder=folder, chunk_rows=4, **settings) as cache:
        fit(model, texts(), cache, seed, epochs)
    return bits(model)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_training_ends_with_the_same_bits_on_an_empty_a_full_and_a_partly_filled_cache(
    dtype: str, tmp_path: Path
) -> None:
    expected = trained_bits(tmp_path / "a", dtype=dtype)
    assert trained_bits(tmp_path / "a", dtype=dtype) == expected
    trained_bits(tmp_path / "b", seed=3, epochs=1, dtype=dtype)  # filled in another order
    assert trained_bits(tmp_path / "b", dtype=dtype) == expected
    (cache,) = (entry for entry in (tmp_path / "b").iterdir() if entry.is_dir())
    with (cache / "rows.bin").open("r+b") as file:  # the first rows were never kept
        file.write(bytes(32 * 5))
    assert trained_bits(tmp_path / "b", dtype=dtype) == expected
    with_cache, without = sparse(bert(3)), sparse(bert(3))
    with PrefixCache.open(with_cache, texts(), folder=tmp_path / "a", chunk_rows=4) as reused:
        losses = fit(with_cache, texts(), reused)
    assert losses == pytest.approx(fit(without, texts(), None), rel=1e-4)


def test_weights_that_train_do_not_matter_and_frozen_ones_do(tmp_path: Path) -> None:
    model = sparse(bert(3))
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        fit(model, texts(), cache, epochs=1)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:  # its head and last block have moved on
        fit(model, texts(), cache, epochs=1)
        assert (cache.report.computed, cache.report.misses) == (0, 0)
        kept = kept_values(cache, texts(), 5)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.bias").add_(0.1)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        assert cache.report.computed > 0
        assert not torch.equal(kept_values(cache, texts(), 5), kept)


def test_rows_that_changed_since_are_computed_again(tmp_path: Path) -> None:
    # row 8 is none of those that tell one data set from another
    model = sparse(bert(3))
    with PrefixCache.open(model, Sampled(), folder=tmp_path) as cache:
        before = kept_values(cache, Sampled(), 8)
    with PrefixCache.open(model, Sampled(changed=8), folder=tmp_path) as cache:
        assert cache.report.computed == 0
        after = kept_values(cache, Sampled(changed=8), 8)
        assert cache.report.misses == 1
    assert not torch.equal(before, after)


class Sampled(Split):
    """Forty rows, so that not all of them are looked at when a cache is opened."""

    def __init__(self, changed: int | None = None) -> None:
        rows = [[3 + (7 * n + 5 * k) % 44 for k in range(2 + n % 9)] for n in range(40)]
        if changed is not None:
            rows[changed][0] += 1
        super().__init__("text-classification", Rows(rows, [n % 3 for n in range(40)]), words)


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


# What is refused, and leaves the model as it was


class Skip(Mlp):
    """The first block's output reaches the head, past the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = kept = self.blocks[0](self.stem(x))
        for block in self.blocks[1:]:
            x = block(x)
        return self.classifier(x + 0.0 * kept)


class Centred(Mlp):
    """Rows meet: each block is given the batch without its mean."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x - x.mean(0))
        return self.classifier(x)


class Writing(Mlp):
    """Writes into what its stem gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += 1
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


class Pair(nn.Module):
    """Blocks that hand on a tuple: the rows, a table that is not of the rows, and nothing."""

    class Block(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.layer, self.first = nn.Linear(8, 8), first

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, None]:
            return functional.gelu(self.layer(x)) + bias, None

    class Table(nn.Module):
        """Parameter-free, with an output that has no rows: it runs as ever."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.linspace(0, 1, x.shape[-1])

    def __init__(self) -> None:
        super().__init__()
        self.table = Pair.Table()
        self.blocks = nn.ModuleList([Pair.Block(n == 0) for n in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(x)
        for block in self.blocks:
            x, _ = block(x, bias)
        return self.head(x)


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return kind()


def refused(model: nn.Module, split: Any, folder: Path, match: str) -> EdgetuneError:
    """Opening raises, and the model is as it was."""
    model.train()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(EdgetuneError, match=match) as error:
        PrefixCache.open(model, split, folder=folder)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    return error.value


def test_dropout_in_the_prefix_is_refused_and_named(tmp_path: Path) -> None:
    model = freeze(bert(3), "bert.embeddings", "bert.encoder.layer.0")
    error = refused(model, texts(), tmp_path, r"draws random numbers: bert\.embeddings\.dropout")
    assert "sparse-update" in error.action
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in model.bert.encoder.layer:  # also kept as a number
        block.attention.self.attention_dropout = 0.0
        if hasattr(block.attention.self, "dropout_prob"):
            block.attention.self.dropout_prob = 0.0
    PrefixCache.open(model, texts(), folder=tmp_path).close()


def test_a_prefix_put_into_eval_mode_by_hand_is_taken_as_it_is(tmp_path: Path) -> None:
    model = freeze(bert(3), "bert.embeddings", "bert.encoder.layer.0").train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[0].eval()
    expected = gradients_by_hand(model, None)
    with PrefixCache.open(model, texts(), folder=tmp_path) as cache:
        close(expected, gradients_by_hand(model, cache), 1e-5)


def gradients_by_hand(model: Any, cache: PrefixCache | None) -> Any:
    inputs, labels = texts().batch([1, 12])
    model.zero_grad()
    torch.manual_seed(0)
    if cache is None:
        logits = model(**inputs).logits
    else:
        with cache.rows([1, 12]):
            logits = model(**inputs).logits
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_batch_statistics_in_the_prefix_are_refused(tmp_path: Path) -> None:
    model = freeze(cnn(), "stem", "norm", "blocks.0")
    refused(model, Arrays(3, 16, 16), tmp_path, r"changes its buffers: norm, blocks\.0\.norm1")


def test_a_skip_connection_across_the_boundary_is_refused_even_if_it_adds_nothing(tmp_path: Path) -> None:
    error = refused(sparse(seeded(Skip)), Arrays(32), tmp_path, r"something reads what the stages before blocks\.1")
    assert "leave cache_prefix out" in error.action


def test_rows_that_meet_are_refused(tmp_path: Path) -> None:
    refused(sparse(seeded(Centred)), Meeting(), tmp_path, "depends on its batch or its padding")


class Meeting(Arrays):
    """Many rows, so that those of the check do not stand in one chunk."""

    def __init__(self) -> None:
        super().__init__(32)
        self.inputs = torch.randn(70, 32, generator=torch.Generator().manual_seed(9))

    def __len__(self) -> int:
        return 70


def test_nothing_frozen_at_the_front_is_refused(tmp_path: Path) -> None:
    refused(mlp(), Arrays(32), tmp_path, "nothing is frozen before the first stage that trains: got 'stem'")
    refused(sparse(mlp(), "bias"), Arrays(32), tmp_path, "nothing is frozen")
    refused(mlp().requires_grad_(False), Arrays(32), tmp_path, "nothing trains")


def test_augmented_rows_are_refused(tmp_path: Path) -> None:
    refused(sparse(mlp()), Arrays(32, noise=0.1), tmp_path, "the inputs of a row are not the same each time")


def test_rows_that_begin_to_change_are_refused(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        fit(model, split, cache, epochs=1)
        split.inputs[3] += 1
        with pytest.raises(EdgetuneError, match="the inputs of row 3 change"):
            fit(model, split, cache, epochs=1)


def test_other_inputs_than_those_of_the_rows_are_refused(tmp_path: Path) -> None:
    model, split = sparse(bert(3)), texts()
    inputs, _ = split.batch([1, 2])
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        with pytest.raises(EdgetuneError, match="4 tokens wide, and the longest row has more"), cache.rows([1, 3]):
            model(**inputs)
        with (
            pytest.raises(EdgetuneError, match="the attention mask does not fit the rows' lengths"),
            cache.rows([2, 1]),
        ):
            model(**inputs)
        with pytest.raises(EdgetuneError, match=r"input_ids is \(2, 4\) instead of \(3, 4\)"), cache.rows([1, 2, 0]):
            model(**inputs)
        with pytest.raises(EdgetuneError, match="attention_mask is missing"), cache.rows([1, 2]):
            model(input_ids=inputs["input_ids"])
        flipped = {name: value.flip(1) for name, value in inputs.items()}
        with pytest.raises(EdgetuneError, match="pad on the right"), cache.rows([1, 2]):
            model(**flipped)
        swapped = {"input_ids": inputs["input_ids"] + 1, "attention_mask": inputs["attention_mask"]}
        with pytest.raises(EdgetuneError, match="the inputs of row 1 change"), cache.rows([1, 2]):
            model(**swapped)
        with torch.no_grad(), cache.rows([1, 2]):  # and goes on working
            assert torch.isfinite(model(**inputs).logits).all()


def test_values_too_large_for_fp16_are_refused(tmp_path: Path) -> None:
    model = sparse(mlp())
    with torch.no_grad():
        model.stem.bias += 1e6  # type: ignore[union-attr]
    with pytest.raises(EdgetuneError, match="too large for fp16") as error:
        PrefixCache.open(model, Arrays(32), folder=tmp_path, dtype="fp16")
    assert error.value.action == "set cache_dtype to fp32"
    PrefixCache.open(model, Arrays(32), folder=tmp_path).close()


# Other ways to run a model


def test_stages_that_write_in_place_and_tuples_and_tables(tmp_path: Path) -> None:
    for kind, width in ((Writing, 32), (Pair, 8)):
        model, split = sparse(seeded(kind)), Arrays(width)
        expected = gradients(model, split, [3, 8, 1], "image-classification", None)
        with PrefixCache.open(model, split, folder=tmp_path) as cache:
            close(expected, gradients(model, split, [3, 8, 1], "image-classification", cache), 1e-5)
            assert "table" not in cache.report.stages_skipped


def test_outside_of_rows_and_after_closing_the_model_is_as_ever(tmp_path: Path) -> None:
    model, split = sparse(bert(3)).eval(), texts()
    inputs, _ = split.batch([4, 7])
    other, _ = split.batch([0])
    expected = [model(**each).logits for each in (inputs, other)]
    modules = [dict(module.__dict__) for module in model.modules()]
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    with PrefixCache.open(model, split, folder=tmp_path) as cache:
        with cache.rows([4, 7]):
            model(**inputs)
        assert torch.equal(model(**other).logits, expected[1])
        for other_model in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.bert.encoder.layer[0]))):
            assert not any("edgetune.sparse.prefix" in type(m.forward).__module__ for m in other_model.modules())
    assert torch.equal(model(**inputs).logits, expected[0])
    assert [module.__dict__.keys() for module in model.modules()] == [before.keys() for before in modules]
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_copy_made_while_the_cache_is_open_runs_on_its_own_weights(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with PrefixCache.open(model, split, folder=tmp_path):
        other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.weight.zero_()
        assert not torch.equal(other(split.inputs), model(split.inputs))


def test_under_autocast_the_values_keep_their_type(tmp_path: Path) -> None:
    model, split = sparse(mlp()), Arrays(32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, split, [3, 8, 1], "image-classification", None)
        with PrefixCache.open(model, split, folder=tmp_path) as cache:
            close(expected, gradients(model, split, [3, 8, 1], "image-classification", cache), 1e-2)
            with (
                torch.autocast("cpu", enabled=False),
                pytest.raises(EdgetuneError, match="autocast is not as it was") as error,
                cache.rows([0]),
            ):
                model(split.batch([0])[0])
    assert error.value.got == "off"
    with pytest.raises(EdgetuneError, match="was closed"), cache.rows([0]):
        pass


def test_forms_and_nests() -> None:
    form = Form(("rows", 2, "tokens"), torch.float32)
    assert (form.shape(3, 5), form.values(4), form.row_shape(4)) == ((3, 2, 5), 8, (2, 4))
    tensor = torch.arange(30.0).view(3, 2, 5)
    row = form.row(tensor, 1, 2)
    assert torch.equal(row, tensor[1, :, :2])
    assert torch.equal(tensor_of(bytearray(bytes_of(row)), torch.float32, form.row_shape(2)), row)
    template = {"a": (form, None), "b": [Form((4,), torch.int64), "c"]}
    blank = nothing_in(template, 3, 5, torch.device("cpu"), whole=False)
    assert blank["a"][0].isnan().all()
    assert blank["a"][0].untyped_storage().nbytes() == 4
    assert (blank["a"][1], blank["b"][0].tolist(), blank["b"][1]) == (None, [0, 0, 0, 0], "c")
    given = filled(template, [tensor, row])
    assert given["a"][0] is tensor
    assert given["b"][0] is row
    assert mapped(str, (1, [2])) == ("1", ["2"])


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.rglob("use-*.lock"))  # every cache was closed
