"""Descriptors of one's own through the command line: listed, shown, added, started from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError
from edgetune.profile import adding, calibration, device, listing
from edgetune.recipe import document


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder that does not exist yet, and an empty working directory."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "config" / "edgetune" / "devices"


def mine(name: str = "my-pi", like: str = "raspberry-pi-5") -> dict[str, Any]:
    content, _ = device.read(like)
    assert isinstance(content, dict)
    return {**content, "id": name}


def written(path: Path, content: object) -> Path:
    document.write_yaml(path, content)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["devices", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_added_is_found_by_name_and_kept_as_it_was_written(own_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "any-name.yaml"
    text = "# a comment of mine\n" + yaml.safe_dump(mine(), sort_keys=False)
    file.write_text(text, encoding="utf-8")
    target = adding.add(file)
    assert target == own_folder / "my-pi.yaml"
    assert target.read_text(encoding="utf-8") == text
    assert device.load("my-pi") == device.load(file)
    assert [path.name for path in own_folder.iterdir()] == ["my-pi.yaml"]


def test_one_of_your_own_is_replaced_only_when_asked(tmp_path: Path) -> None:
    adding.add(written(tmp_path / "a.yaml", mine()))
    other = written(tmp_path / "b.yaml", {**mine(), "name": "Another"})
    with pytest.raises(EdgetuneError, match="device 'my-pi' already exists") as caught:
        adding.add(other)
    assert "--replace" in caught.value.action
    assert device.load("my-pi").name == "Raspberry Pi 5"
    adding.add(other, replace=True)
    assert device.load("my-pi").name == "Another"


def test_a_fault_in_the_file_adds_nothing(own_folder: Path, tmp_path: Path) -> None:
    broken = mine()
    broken["memory"]["ram_gib"]["value"] = -1
    with pytest.raises(EdgetuneError, match=r"memory.ram_gib: -1 is outside"):
        adding.add(written(tmp_path / "a.yaml", broken))
    for name, reason in (("pixel-8", "is part of edgetune"), ("host", "is this machine")):
        for replace in (False, True):
            with pytest.raises(EdgetuneError, match=reason):
                adding.add(written(tmp_path / "a.yaml", mine(name)), replace=replace)
    with pytest.raises(EdgetuneError, match=r"a \.yaml file"):
        adding.add(tmp_path / "a.json")
    with pytest.raises(EdgetuneError, match="cannot read the file"):
        adding.add(tmp_path / "nowhere.yaml")
    assert not own_folder.exists()


@pytest.mark.parametrize("like", ["pixel-8", "iphone-15", "alif-ensemble-e7"])
def test_a_copy_is_the_same_device_that_nobody_trusts_yet(like: str, own_folder: Path) -> None:
    path = adding.copy(like, "my-phone")
    assert path == own_folder / "my-phone.yaml"
    copied, original = device.load("my-phone"), device.load(like)
    before, after = dict(original.facts()), dict(copied.facts())
    assert before.keys() == after.keys()
    for place, fact in after.items():
        assert fact.value == before[place].value
        assert fact.trust in (None, "low")
        assert fact.source == (f"copied from {like}: {before[place].source}" if before[place].source else "")
        assert fact.unknown == before[place].unknown
    assert copied.name == f"{original.name} (copy)"
    assert copied.notes[0].startswith(f"Copied from {like}: ")
    assert copied.notes[1:] == original.notes
    text = path.read_text(encoding="utf-8")
    assert text.count("copied from") <= len(mine(like=like)["sources"]) + 2  # once for each source, not for each number


def fitted(path: Path, name: str) -> Path:
    """A calibration beside the descriptor."""
    section = calibration.Calibration(
        device=name, date="2026-01-01", engine="ExecuTorch XNNPACK", versions={}, threads=4, programs=9, networks=0,
        error_pct=1.0, error_p90_pct=2.0, noise_pct=1.0, interval_pct=80.0,
        intervals=(calibration.Interval(from_us=0.0, log=0.1),), call_us=1.0, delegate_call_us=1.0,
        load_ms=1.0, load_ms_per_mib=1.0, near_cache_bytes=1e6, last_cache_bytes=1e6, tiles={}, traffic={},
        curves={"linear": calibration.Curve(kind="linear", delegated=True, rates={"macs": 1.0}, programs=9)},
    )  # fmt: skip
    calibration.write(calibration.calibration_path(path), section)
    return path


def test_a_calibration_comes_with_its_descriptor_and_with_no_other(own_folder: Path, tmp_path: Path) -> None:
    content = {**mine(), "threads": {"value": 2, "source": "tried", "trust": "high"}}
    content["sources"] = {key: item for key, item in content["sources"].items() if key != "all"}
    file = fitted(written(tmp_path / "a.yaml", content), "my-pi")
    adding.add(file)
    beside = own_folder / "my-pi.calibration.json"
    assert calibration.read(beside) == calibration.read(tmp_path / "a.calibration.json") is not None
    adding.copy("my-pi", "other-pi")
    assert sorted(path.name for path in own_folder.iterdir()) == [
        "my-pi.calibration.json",
        "my-pi.yaml",
        "other-pi.yaml",
    ]
    assert device.load("other-pi").threads.source == "copied from my-pi: tried"
    assert device.load("other-pi").threads.trust == "low"
    adding.add(own_folder / "my-pi.yaml", replace=True)
    assert beside.is_file()
    fitted(file, "another-pi")
    with pytest.raises(EdgetuneError, match="another device's"):
        adding.add(file, replace=True)
    (tmp_path / "a.calibration.json").write_text("{}", encoding="utf-8")
    with pytest.raises(EdgetuneError, match="the calibration cannot be read"):
        adding.add(file, replace=True)
    assert beside.is_file()
    (tmp_path / "a.calibration.json").unlink()
    adding.add(file, replace=True)
    assert not beside.exists()


def test_a_copy_needs_a_free_name_that_is_an_id(own_folder: Path) -> None:
    for name in ("My-Phone", "my_phone", "-x", "a--b", "", "../x", "a.yaml", "a\n"):
        with pytest.raises(EdgetuneError, match="an id consists of lower-case letters"):
            adding.copy("pixel-8", name)
    with pytest.raises(EdgetuneError, match="is part of edgetune"):
        adding.copy("pixel-8", "pixel-7")
    with pytest.raises(EdgetuneError, match="did you mean 'pixel-8'"):
        adding.copy("pixel8", "my-phone")
    assert not own_folder.exists()
    adding.copy("pixel-8", "my-phone")
    with pytest.raises(EdgetuneError, match="already"):
        adding.copy("pixel-7", "my-phone")
    adding.copy("pixel-7", "my-phone", replace=True)
    assert device.load("my-phone").soc == "Google Tensor G2"


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(EdgetuneError, match="cannot write to the folder") as caught:
        adding.copy("pixel-8", "my-phone")
    assert "XDG_CONFIG_HOME" in caught.value.action


def test_add_through_the_command_line(tmp_path: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "add", "--like", "pixel-8", "my-phone")
    assert (code, err) == (0, "")
    assert out.startswith(f"{own_folder / 'my-phone.yaml'}: a copy of pixel-8")
    code, out, _ = call(capsys, "add", str(written(tmp_path / "a.yaml", mine())), "--json")
    assert json.loads(out) == {"id": "my-pi", "path": str(own_folder / "my-pi.yaml")}
    assert call(capsys, "validate", "my-phone", "my-pi")[:2] == (0, "valid: my-phone, my-pi\n")
    for arguments, told in (
        (("add", "--like", "pixel-8", "my-phone"), "already"),
        (("add", "my-phone"), "add --like pixel-8 NAME"),
        (("add", "--like", "nothing", "x"), "unknown device"),
        (("add", "nowhere.yaml"), "cannot read the file"),
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert told in err
        assert err.count("edgetune:") == 1
        assert "Traceback" not in err


def test_the_list_is_a_table_by_family(capsys: pytest.CaptureFixture[str]) -> None:
    adding.copy("galaxy-s24", "my-phone")
    code, out, err = call(capsys, "list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    families = list(get_args(device.Family))
    assert [line for line in lines if line in families] == families
    ids = [line.split()[0] for line in lines[1:] if line.startswith("  ")]
    assert sorted(ids) == sorted(device.device_ids())
    assert len({line.find("GB/s") for line in lines if "GB/s" in line}) == 1
    row = next(line for line in lines if line.split()[:1] == ["my-phone"])
    assert row.endswith("8 GiB   76.8  your own")
    assert lines.index(row) < lines.index("board")
    assert next(line for line in lines if line.split()[:1] == ["alif-ensemble-e7"]).endswith("13.5 MiB    3.2")
    assert next(line for line in lines if line.split()[:1] == ["pixel-8"]).endswith("8 GiB      ?")
    assert all(len(line) < 140 for line in lines)
    plain = json.loads(call(capsys, "list", "--json")[1])
    assert [item["id"] for item in plain] == ids
    found = {item["id"]: item for item in plain}
    assert found["my-phone"]["own"] is True
    assert found["galaxy-s24"] == {
        "id": "galaxy-s24", "name": "Samsung Galaxy S24 (Snapdragon)", "soc": "Snapdragon 8 Gen 3 for Galaxy",
        "family": "phone", "ram_gib": 8.0, "bandwidth_gb_s": 76.8, "calibrated": False, "own": False, "fault": "",
    }  # fmt: skip


def test_a_file_that_cannot_be_used_is_listed_with_its_fault_and_hides_no_other(
    own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(own_folder / "broken.yaml", {**mine("broken"), "family": "fridge"})
    written(own_folder / "wrong-name.yaml", mine("right-name"))
    written(own_folder / "pixel-8.yaml", mine("pixel-8"))
    code, out, _ = call(capsys, "list")
    assert code == 0
    faults = out.split("\ninvalid descriptors\n")[1]
    assert "broken: " in faults
    assert "family: must be one of the allowed values" in faults
    assert "wrong-name: " in faults
    assert "is also defined in" in faults
    assert "raspberry-pi-5" in out.split("invalid descriptors")[0]
    assert [entry.id for entry in listing.list_entries() if entry.fault] == ["pixel-8", "broken", "wrong-name"]


def test_show_prints_every_number_with_trust_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("galaxy-s23", "jetson-orin-nx-16", "raspberry-pi-zero-w"):
        code, out, _ = call(capsys, "show", name)
        assert code == 0
        described = device.load(name)
        for path, fact in described.facts():
            line = next(line for line in out.splitlines() if line.split()[:1] == [path])
            assert line.endswith(fact.source or fact.unknown)
            assert fact.trust is None or f"  {fact.trust} " in line
            assert ("unknown" in line) >= (fact.value is None)
        for told in (described.name, *described.notes, *(found.name for found in described.accelerators)):
            assert told in out
    isa = next(line for line in out.splitlines() if line.split()[:1] == ["isa"])
    assert isa.split()[1:3] == ["none", "high"]  # without any flag is not the same as unknown
    plain = json.loads(call(capsys, "show", "galaxy-s23", "--json")[1])
    assert device.parse(plain, "x.yaml") == device.load("galaxy-s23")
