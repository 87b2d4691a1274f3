"""Descriptors: what ships is whole and sourced; what is wrong is refused with its field and the reason."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from edgetune.core.errors import EdgetuneError
from edgetune.profile import device
from edgetune.recipe import document
from support.trees import put

SHIPPED = (
    # phones
    "pixel", "pixel-2", "pixel-3a", "pixel-6", "pixel-7", "pixel-8", "pixel-9", "galaxy-s22", "galaxy-s23",
    "galaxy-s24", "galaxy-s24-exynos", "galaxy-s25", "oneplus-12", "xiaomi-14", "vivo-x100", "galaxy-a54",
    "galaxy-a14", "redmi-note-12", "iphone-12", "iphone-13", "iphone-14", "iphone-15", "iphone-15-pro", "iphone-16",
    # boards, computers, a microcontroller
    "raspberry-pi-2", "raspberry-pi-3", "raspberry-pi-4", "raspberry-pi-5", "raspberry-pi-zero-2-w", "jetson-nano",
    "jetson-xavier-nx", "jetson-orin-nano", "jetson-orin-nano-super", "jetson-orin-nx-16", "jetson-agx-orin",
    "laptop-i5-1135g7", "macbook-air-m2", "alif-ensemble-e7",
)  # fmt: skip
EVERY = device.packaged_ids()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration folder, so that this machine's own descriptors stay out of the tests."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "edgetune" / "devices"
    folder.mkdir(parents=True)
    return folder


def content(name: str) -> dict[str, Any]:
    loaded, _ = device.read(name)
    assert isinstance(loaded, dict)
    return loaded


def test_the_promised_devices_ship() -> None:
    assert set(EVERY) >= set(SHIPPED)
    assert len(SHIPPED) >= 36
    assert {device.load(name).family for name in EVERY} == set(get_args(device.Family))
    assert set(device.device_ids()) == set(EVERY)
    assert "published" not in device.device_ids()  # measurements, which lie in the same folder


@pytest.mark.parametrize("name", EVERY)
def test_every_number_is_sourced_or_null_with_a_reason(name: str) -> None:
    described = device.load(name)
    facts = list(described.facts())
    assert len(facts) >= 18
    known = [fact for _, fact in facts if fact.value is not None]
    assert len(known) >= 10
    for path, fact in facts:
        if fact.value is None:
            assert len(fact.unknown) > 10, path
        else:
            assert fact.trust in ("high", "medium", "low"), path
            assert len(fact.source) > 10, path
            # what is only remembered is not sold as more
            assert "from memory" not in fact.source or fact.trust == "low", path
    text = (resources.files("edgetune.devices") / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text) < 8192
    assert len(text.splitlines()) <= 80
    assert text.startswith(f"format: 1\nid: {name}\n")
    assert all(len(note) > 20 for note in described.notes)


@pytest.mark.parametrize("name", EVERY)
def test_yaml_to_device_to_yaml_to_device(name: str, tmp_path: Path) -> None:
    described = device.load(name)
    document.write_yaml(tmp_path / "x.yaml", described.model_dump(mode="json", exclude_unset=True))
    again = device.load(tmp_path / "x.yaml")
    assert again == described
    assert again.model_dump(mode="json", exclude_unset=True) == described.model_dump(mode="json", exclude_unset=True)


def test_bandwidth_must_agree_with_bus_and_rate() -> None:
    whole = content("raspberry-pi-4")
    told = r"memory.bandwidth_gb_s: 17.1, but 32 bit / 8 x 3200 MT/s / 1000 is 12.8 GB/s"
    for path, bad, reason in (
        ("memory.bandwidth_gb_s.value", 17.1, told),
        ("memory.bandwidth_gb_s.value", 6.4, "memory.bandwidth_gb_s: 6.4, but"),
        ("memory.bus_bits.value", 64, "but 64 bit / 8 x 3200 MT/s / 1000 is 25.6 GB/s"),
        ("memory.mega_transfers_per_s.value", 4266, "but 32 bit / 8 x 4266 MT/s"),
    ):
        with pytest.raises(EdgetuneError, match=reason):
            device.parse(put(whole, path, bad), "x.yaml")
    agreeing = 0
    for name in EVERY:
        memory = device.load(name).memory
        bits, rate, given = memory.bus_bits.value, memory.mega_transfers_per_s.value, memory.bandwidth_gb_s.value
        if bits is not None and rate is not None:
            assert given == pytest.approx(bits / 8 * rate / 1000, rel=0.01)
            agreeing += 1
    assert agreeing >= 36


def fact(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": "a test", "trust": "low"}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("threads.value", 5, "^x.yaml: threads: 5, but there are 4 cores"),
        ("memory.usable_app_memory_mib", fact(9000, "MiB"), "memory.usable_app_memory_mib: .* more than the 4 GiB"),
        ("caches.last_level_kib", fact(512, "KiB"), "caches.last_level_kib: .* less than the 1024"),
        ("power.low_w", fact(20, "W"), "power.low_w: 20, above high_w 15"),
        ("accelerators.0.target", "vulkan", "accelerators.0.target: either a target reaches it, or"),
        ("accelerators.0.unreached", "", "accelerators.0.target: either a target reaches it, or"),
        ("accelerators.0.kind", "fpu", "accelerators.0.kind"),
        ("family", "microcontroller", "memory.ram_gib: 4 GiB is not a microcontroller's"),
        ("memory.ram_gib", fact(0.01, "GiB"), "memory.ram_gib: 0.01 GiB is not a board's"),
        ("clusters.0.ghz", fact(0.1, "GHz"), "clusters.0.ghz: 0.1 GHz is a microcontroller's"),
        (
            "storage.kind.value",
            "tape",
            "storage.kind.value: must be one of the allowed values: got 'tape'; allowed: ufs",
        ),
        ("isa.value", ["neon", "neon"], "isa: neon is named twice"),
        ("targets", ["xnnpack", "xnnpack"], "named twice"),
        ("targets", ["xnpack"], "targets"),
        ("clusters", [], "clusters"),
        ("clusters.0.count", {"value": None, "unknown": "lost"}, "number of cores"),
        ("threads", {"value": None, "unknown": "lost"}, "threads"),
        ("isa", {"value": None}, "isa: a null needs the reason"),
        ("isa.value", ["sse9"], "isa"),
        ("threads.value", 1.5, "whole number"),
        ("format", 2, "format"),
        ("id", "Pi 4", "id"),
    ],
)
def test_fields_are_held_against_each_other(path: str, value: Any, reason: str) -> None:
    with pytest.raises(EdgetuneError, match=reason):
        device.parse(put(content("raspberry-pi-4"), path, value), "x.yaml")


def test_an_accelerator_is_reached_by_a_target_of_the_device() -> None:
    whole = content("galaxy-s24")
    with pytest.raises(EdgetuneError, match=r"^x.yaml: accelerators.0.target: coreml is not among the targets"):
        device.parse(put(whole, "accelerators.0.target", "coreml"), "x.yaml")
    for name in EVERY:
        described = device.load(name)
        for accelerator in described.accelerators:
            assert accelerator.target in (*described.targets, None)
            assert accelerator.target is not None or len(accelerator.unreached) > 20


def test_all_faults_come_in_one_error() -> None:
    broken = put(put(content("pixel-8"), "clusters.0.ghz.value", -1), "memory.ram_gib.from", "nowhere")
    with pytest.raises(EdgetuneError) as caught:
        device.parse(broken, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert "clusters.0.ghz: -1 is outside" in str(caught.value)
    assert "memory.ram_gib.from: 'nowhere' is not under sources" in str(caught.value)


def flags(name: str) -> set[str]:
    return set(device.load(name).isa.value or ())


def test_instruction_sets_that_devices_md_fixes() -> None:
    for name in ("galaxy-s22", "galaxy-s23", "galaxy-s24", "oneplus-12", "xiaomi-14", "galaxy-s25", "vivo-x100"):
        assert {"dotprod", "fp16", "i8mm", "bf16"} <= flags(name), name
        assert "sve2" not in flags(name), name
    for name in ("pixel-8", "galaxy-s24-exynos"):
        assert {"i8mm", "sve2"} <= flags(name), name
    for name in ("raspberry-pi-5", *(name for name in EVERY if "orin" in name)):
        assert {"dotprod", "fp16"} <= flags(name), name
        assert "i8mm" not in flags(name), name
    for name in ("raspberry-pi-2", "raspberry-pi-3", "raspberry-pi-4", "jetson-nano", "pixel"):
        assert flags(name) == {"neon"}, name
    for name in (name for name in EVERY if name.startswith("iphone")):
        assert device.load(name).isa.value is None, name


def test_facts_that_devices_md_fixes() -> None:
    assert device.load("pixel-8").memory.bandwidth_gb_s.value is None
    assert device.load("galaxy-s23").thread_count == 4
    jetsons = [name for name in EVERY if device.load(name).family == "jetson"]
    assert len(jetsons) >= 6
    for name in jetsons:
        assert any("No public ExecuTorch measurement" in note for note in device.load(name).notes)
    dense = {"orin-nano": 20, "orin-nano-super": 33.5, "orin-nx-16": 50, "agx-orin": 137}
    for name, tops in dense.items():
        gpu = device.load(f"jetson-{name}").accelerators[0]
        assert (gpu.kind, gpu.target, gpu.dense_int8_tops.value) == ("gpu", "cuda", tops)
    for name in EVERY:  # what vendors print for phones is marketing
        if device.load(name).family == "phone":
            assert all(found.dense_int8_tops.value is None for found in device.load(name).accelerators), name


def test_a_microcontroller_is_small() -> None:
    small = device.load("alif-ensemble-e7")
    assert small.targets == ("ethos-u",)
    assert small.accelerators[0].kind == "npu"
    assert small.accelerators[0].dense_int8_tops.value == pytest.approx(256 * 2 * 400e6 / 1e12)
    assert (small.memory.ram_gib.value or 1) * 1024 < 16
    assert (small.clusters[0].ghz.value, small.thread_count) == (0.4, 1)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(EdgetuneError, match="did you mean 'pixel-8'"):
        device.load("pixel8")
    with pytest.raises(EdgetuneError, match="devices calibrate"):
        device.load("host")
    with pytest.raises(EdgetuneError, match="cannot read the file"):
        device.load("nowhere/mine.yaml")


def test_a_descriptor_of_ones_own_is_found_by_name_and_by_path(own_folder: Path) -> None:
    mine = {**content("raspberry-pi-5"), "id": "my-pi", "name": "Mine"}
    path = own_folder / "my-pi.yaml"
    document.write_yaml(path, mine)
    assert "my-pi" in device.device_ids()
    assert device.load("my-pi") == device.load(path) == device.load(str(path))
    assert device.load("my-pi").name == "Mine"
    path.rename(own_folder / "other.yaml")
    with pytest.raises(EdgetuneError, match="must equal the file name"):
        device.load("other")


def test_a_shipped_name_cannot_be_shadowed_in_silence(own_folder: Path) -> None:
    document.write_yaml(own_folder / "pixel-8.yaml", content("pixel-8"))
    with pytest.raises(EdgetuneError, match="is also defined in"):
        device.load("pixel-8")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\na: 2\n", "line 2, a: given twice, first in line 1"),
        ("a: &x [1]\nb: [*x" + ", *x" * 16 + "]\n", "more than 16 aliases"),
        ("a: [1\n", "not YAML: while parsing a flow sequence"),
        ("!!python/object/apply:os.getcwd []\n", "tags are not supported"),
        ("- 1\n", "a descriptor is a mapping"),
        ("", "a descriptor is a mapping"),
        ("a: " + "x" * 300_000, "larger than 256 KiB"),
        ("[" * 5000, "nested deeper than 16 levels"),
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
    with pytest.raises(EdgetuneError, match="the file is not UTF-8"):
        device.load(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    shared = {"value": None, "unknown": "nobody knows"}
    document.write_yaml(tmp_path / "x.yaml", {"a": shared, "b": shared, "c": ["é", 1.5, True]})
    text = (tmp_path / "x.yaml").read_text(encoding="utf-8")
    assert document.read(text, "x.yaml").value == {"a": shared, "b": shared, "c": ["é", 1.5, True]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.yaml"
    document.write_yaml(path, {"a": 1})
    with pytest.raises(yaml.YAMLError):
        document.write_yaml(path, {"a": object()})
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {"a": 1}
    assert [item.name for item in path.parent.iterdir()] == ["x.yaml"]
