"""Descriptors: what ships is whole and sourced; what is wrong is refused with its field and the reason."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from edgetune.profile import device, yaml_file
from edgetune.technique import EdgetuneError

SHIPPED = {
    "pixel-8", "galaxy-s22", "galaxy-s23", "galaxy-s24", "oneplus-12", "iphone-15-pro", "raspberry-pi-4",
    "raspberry-pi-5", "jetson-nano", "jetson-orin-nano", "jetson-agx-orin",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration folder, so that this machine's own descriptors stay out of the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "edgetune" / "devices"
    folder.mkdir(parents=True)
    return folder


def content(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load(device._shipped()[name])
    assert isinstance(loaded, dict)
    return loaded


def put(tree: Any, path: str, value: Any) -> Any:
    """A copy with the value at the dotted path replaced, or removed for `...`."""
    changed = copy.deepcopy(tree)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    node = changed
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return changed


def test_the_promised_devices_ship() -> None:
    assert set(device.ids()) >= SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_number_is_sourced_or_null_with_a_reason(name: str) -> None:
    facts = list(device.load(name).facts())
    assert len(facts) > 10
    for path, fact in facts:
        if fact.value is None:
            assert len(fact.unknown) > 10, path
        else:
            assert fact.trust in ("high", "medium", "low"), path
            assert len(fact.source) > 5, path


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_mutated_number_is_refused_with_its_field(name: str) -> None:
    whole = content(name)
    for path, fact in device.load(name).facts():
        if isinstance(fact, device.Flags) or fact.value is None:
            continue
        for bad in (0, -1.0, math.nan, math.inf, 1e308, True, "4", None, ...):
            with pytest.raises(EdgetuneError) as caught:
                device.parse(put(whole, f"{path}.value", bad), "x.yaml")
            assert path.rpartition(".")[0] in str(caught.value) or path in str(caught.value), (path, bad)
        for key, bad in (("source", ""), ("trust", "certain"), ("unit", "furlong"), ("unknown", "both"), ("extra", 1)):
            with pytest.raises(EdgetuneError, match=path.split(".")[0]):
                device.parse(put(whole, f"{path}.{key}", bad), "x.yaml")


def test_every_missing_and_every_unknown_key_is_refused() -> None:
    whole = content("pixel-8")
    for key in whole:
        if key != "notes":
            with pytest.raises(EdgetuneError, match=rf"(?i){key}.*required"):
                device.parse(put(whole, key, ...), "x.yaml")
    for path in ("colour", "memory.colour", "clusters.0.colour", "gpu.colour", "power.colour"):
        with pytest.raises(EdgetuneError, match=rf"{path}: extra inputs"):
            device.parse(put(whole, path, 1), "x.yaml")


def test_bandwidth_must_agree_with_bus_and_rate() -> None:
    whole = content("raspberry-pi-4")
    with pytest.raises(
        EdgetuneError, match=r"memory: bandwidth_gb_s is 17.1, but 32 bit / 8 x 3200 MT/s / 1000 is 12.8"
    ):
        device.parse(put(whole, "memory.bandwidth_gb_s.value", 17.1), "x.yaml")
    for name in SHIPPED:
        memory = device.load(name).memory
        if memory.bandwidth_gb_s.value is not None:
            assert memory.bus_bits.value is not None
            assert memory.mega_transfers_per_s.value is not None
            expected = memory.bus_bits.value / 8 * memory.mega_transfers_per_s.value / 1000
            assert memory.bandwidth_gb_s.value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("threads.value", 5, "threads is 5, but there are 4 cores"),
        ("memory.usable_app_memory_mib", {"value": 9000.0, "source": "a test", "trust": "low"}, "more than the 4 GiB"),
        ("caches.last_level_kib.value", 512, "less than the 1024"),
        ("power.low_w", {"value": 20.0, "source": "a test", "trust": "low"}, "above high_w 15"),
        ("targets", ["xnnpack", "xnnpack"], "named twice"),
        ("targets", ["xnpack"], "targets"),
        ("clusters", [], "clusters"),
        ("clusters.0.count", {"value": None, "unknown": "lost"}, "number of cores"),
        ("threads", {"value": None, "unknown": "lost"}, "threads"),
        ("isa", {"value": None}, "needs the reason"),
        ("isa.value", ["sse9"], "isa"),
        ("threads.value", 1.5, "whole number"),
        ("format", 2, "format"),
        ("id", "Pi 4", "id"),
    ],
)
def test_fields_are_held_against_each_other(path: str, value: Any, reason: str) -> None:
    with pytest.raises(EdgetuneError, match=reason):
        device.parse(put(content("raspberry-pi-4"), path, value), "x.yaml")


def test_all_faults_come_in_one_error() -> None:
    broken = put(put(content("pixel-8"), "clusters.0.ghz.value", -1), "memory.ram_gib.value", 0)
    with pytest.raises(EdgetuneError) as caught:
        device.parse(broken, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert "clusters.0.ghz" in str(caught.value)
    assert "memory.ram_gib" in str(caught.value)


def test_facts_that_devices_md_fixes() -> None:
    def flags(name: str) -> set[str]:
        return set(device.load(name).isa.value or ())

    assert "sve2" in flags("pixel-8")
    assert "sve2" not in flags("galaxy-s24")
    assert flags("raspberry-pi-4") == flags("jetson-nano") == {"neon"}
    for name in ("raspberry-pi-5", "jetson-orin-nano", "jetson-agx-orin"):
        assert {"dotprod", "fp16"} <= flags(name)
        assert "i8mm" not in flags(name)
    assert device.load("pixel-8").memory.bandwidth_gb_s.value is None
    assert device.load("iphone-15-pro").isa.value is None
    for name in ("jetson-nano", "jetson-orin-nano", "jetson-agx-orin"):
        assert any("No public ExecuTorch measurement" in note for note in device.load(name).notes)
    orin = device.load("jetson-orin-nano").gpu
    assert orin is not None
    assert orin.dense_int8_tops.value == 20


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(EdgetuneError, match="did you mean 'pixel-8'"):
        device.load("pixel8")
    with pytest.raises(EdgetuneError, match="devices calibrate"):
        device.load("host")
    with pytest.raises(EdgetuneError, match="could not be read"):
        device.load("nowhere/mine.yaml")


def test_a_descriptor_of_ones_own_is_found_by_name_and_by_path(own_folder: Path) -> None:
    mine = {**content("raspberry-pi-5"), "id": "my-pi", "name": "Mine"}
    path = own_folder / "my-pi.yaml"
    yaml_file.write_yaml(path, mine)
    assert "my-pi" in device.ids()
    assert device.load("my-pi") == device.load(path) == device.load(str(path))
    assert device.load("my-pi").name == "Mine"
    path.rename(own_folder / "other.yaml")
    with pytest.raises(EdgetuneError, match="must be the file's name"):
        device.load("other")


def test_a_shipped_name_cannot_be_shadowed_in_silence(own_folder: Path) -> None:
    yaml_file.write_yaml(own_folder / "pixel-8.yaml", content("pixel-8"))
    with pytest.raises(EdgetuneError, match="also stands in"):
        device.load("pixel-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2\n", "'a' is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases are not allowed"),
        ("a: [1\n", "not readable as YAML"),
        ("!!python/object/apply:os.getcwd []\n", "not readable as YAML"),
        ("- 1\n", "a descriptor is a mapping"),
        ("", "a descriptor is a mapping"),
        ("a: " + "x" * 300_000, "longer than"),
        ("[" * 5000, "not readable as YAML"),
    ],
)
def test_unsafe_or_malformed_yaml_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EdgetuneError, match=reason):
        device.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgetuneError, match="could not be read"):
        device.load(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    shared = {"value": None, "unknown": "nobody knows"}
    yaml_file.write_yaml(tmp_path / "x.yaml", {"a": shared, "b": shared, "c": ["é", 1.5, True]})
    text = (tmp_path / "x.yaml").read_text(encoding="utf-8")
    assert yaml_file.read_yaml(text, "x.yaml") == {"a": shared, "b": shared, "c": ["é", 1.5, True]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.yaml"
    yaml_file.write_yaml(path, {"a": 1})
    with pytest.raises(yaml.YAMLError):
        yaml_file.write_yaml(path, {"a": object()})
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [item.name for item in path.parent.iterdir()] == ["x.yaml"]
