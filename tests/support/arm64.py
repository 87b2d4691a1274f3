"""An arm64 Linux in a folder, for tests/test_arm64.py: `python tests/support/arm64.py FOLDER` fetches and unpacks it.

Debian's qemu-user-static runs Debian's arm64 Python with the arm64 wheels of torch and executorch; half a gigabyte is
fetched, nothing is installed. The wheel of torch is built for CUDA, whose libraries (gigabytes) are left out: STAND-INS
of the same names take their place, in which every function says that there is no device. No program here calls them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

QEMU, BINUTILS = ("qemu-user-static",), ("binutils-aarch64-linux-gnu", "libjansson4")
SYSTEM = (
    "libc6", "libstdc++6", "libgcc-s1", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "zlib1g",
    "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libsqlite3-0", "libuuid1", "libcrypt1",
)  # fmt: skip
PURE = ("typing_extensions", "sympy", "mpmath<1.4", "networkx", "jinja2", "filelock", "fsspec", "packaging")
BUILT = ("numpy", "pyyaml", "markupsafe")
CUDA = ("libcudart.so.13", "libcupti.so.13", "libcudnn.so.9", "libcufile.so.0", "libnccl.so.2")
LEFT_OUT = re.compile(r"torch/(include|bin/(?!torch_shm_manager)|lib/libtorch_(cuda|nvshmem))")
# torch's collectives begin NCCL when they are imported
COLLECTIVES = {
    "torch/distributed/__init__.py": ('hasattr(torch._C, "_c10d_init")', "False"),
    "torch/distributed/rpc/__init__.py": ('hasattr(torch._C, "_rpc_init")', "False"),
}
# cores whose identity and features the libraries read from files: of a Raspberry Pi 5
MIDR = "0x00000000414fd0b1"
CORE = (
    "processor\t: {core}\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm "
    "lrcpc dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\n"
    "CPU revision\t: 1\n\n"
)


def made(folder: Path) -> None:
    """Fetch and unpack everything into `folder`, in one step at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="arm64-", dir=folder.parent) as name:
        work = Path(name)
        unpacked(QEMU, work / "host", apt(work / "apt", ""))
        unpacked(BINUTILS, work / "host", apt(work / "apt", ""))
        unpacked(SYSTEM, work / "root", apt(work / "apt", "arm64"))
        identity(work / "root")
        packages(work / "site")
        stand_ins(work)
        (work / "whole").mkdir()
        for part in ("host", "root", "site"):
            (work / part).rename(work / "whole" / part)
        (work / "whole").rename(folder)


def apt(folder: Path, architecture: str) -> dict[str, str]:
    """The environment in which apt-get fetches packages of that architecture, with lists of its own."""
    if not architecture:
        return dict(os.environ)
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    (folder / "apt.conf").write_text(
        f'APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\n'
        f'Dir::State "{folder}/state";\nDir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache";\nAPT::Sandbox::User "";\n'
    )
    environment = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
    return environment


def unpacked(names: tuple[str, ...], to: Path, environment: dict[str, str]) -> None:
    """Debian packages, fetched and unpacked below a folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", *names], cwd=folder, env=environment, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, to], check=True)


def identity(root: Path) -> None:
    """What the kernel of the board would say of its two cores; the emulator looks here before it asks the host."""
    for core in (0, 1):
        folder = root / f"sys/devices/system/cpu/cpu{core}/regs/identification"
        folder.mkdir(parents=True)
        (folder / "midr_el1").write_text(MIDR + "\n")
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text("".join(CORE.format(core=core) for core in (0, 1)))


def packages(site: Path) -> None:
    """The arm64 wheels, of the versions that are installed here."""
    wanted = [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("torch", "executorch")]
    platform = ["--platform", "manylinux_2_28_aarch64", "--python-version", "3.11", "--only-binary=:all:", "--no-deps"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=site.parent) as wheels:
        subprocess.run([*pip, "install", "-q", *platform, "--target", site, *PURE, *BUILT], check=True)
        subprocess.run([*pip, "download", "-q", *platform, "--dest", wheels, *wanted], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [name for name in archive.namelist() if not LEFT_OUT.match(name)])
    (site / "torch/bin/torch_shm_manager").chmod(0o755)
    for name, (there, here) in COLLECTIVES.items():
        text = (site / name).read_text(encoding="utf-8")
        assert there in text, name
        (site / name).write_text(text.replace(there, here), encoding="utf-8")
    (site / "torch/distributed/_meta_registrations.py").write_text("")


def tool(work: Path, name: str) -> tuple[str, dict[str, str]]:
    """One of the cross binutils, and the environment in which it finds its libraries."""
    libraries = ":".join(map(str, (work / "host/usr/lib").glob("*-linux-gnu")))
    return str(work / f"host/usr/bin/aarch64-linux-gnu-{name}"), {**os.environ, "LD_LIBRARY_PATH": libraries}


def symbols(work: Path, library: Path) -> tuple[set[str], dict[str, str]]:
    """What a library defines, and what it needs, with the kind of each."""
    readelf, environment = tool(work, "readelf")
    told = subprocess.run(
        [readelf, "-W", "--dyn-syms", library], env=environment, capture_output=True, text=True, check=True
    ).stdout
    rows = [row for row in map(str.split, told.splitlines()) if len(row) >= 8 and row[0].endswith(":")]
    defined = {row[7].partition("@")[0] for row in rows if row[6] != "UND"}
    return defined, {row[7].partition("@")[0]: row[3] for row in rows if row[6] == "UND" and row[4] != "WEAK"}


def stand_ins(work: Path) -> None:
    """In place of libtorch_cuda and CUDA's own libraries: every symbol that the rest of torch needs of them."""
    torch = work / "site/torch/lib"
    system = [file for file in work.glob("root/**/*-linux-gnu/*.so*") if file.is_file() and file.suffix != ".py"]
    ours = sorted(file for file in torch.glob("*.so*") if file.is_file())
    read = [symbols(work, library) for library in (*ours, *system, work / "root/usr/bin/python3.11")]
    defined = set().union(*(found for found, _ in read))
    needed = {name: kind for _, wants in read[: len(ours)] for name, kind in wants.items() if name not in defined}
    code, data = [".text"], [".data", ".balign 16", "zeros: .zero 4096"]
    for name, kind in sorted(needed.items()):
        if name.startswith("_ZTI"):  # a type's name is read when Python's classes are made
            data += [f".globl {name}", f".type {name},%object", ".balign 16"]
            data += [
                f"{name}: .quad _ZTVN10__cxxabiv117__class_type_infoE+16",
                f".quad {name}_name",
                f".size {name},16",
            ]
            data.append(f'{name}_name: .asciz "{name[4:]}"')
        elif kind == "OBJECT":
            data += [f".globl {name}", f".type {name},%object", ".balign 16", f"{name}: .zero 256", f".size {name},256"]
        else:  # CUDA's error 100: no device
            answer = ["adrp x0, zeros", "add x0, x0, :lo12:zeros"] if name.startswith("_Z") else ["mov w0, #100"]
            code += [f".globl {name}", f".type {name},%function", f"{name}:", *answer, "ret"]
    for name in ("libtorch_cuda.so", *CUDA):
        lines = [*code, *data] if name == "libtorch_cuda.so" else [".text"]
        source, built = work / "stand_in.s", work / "stand_in.o"
        source.write_text("\n".join(lines) + "\n")
        assembler, environment = tool(work, "as")
        subprocess.run([assembler, "-o", built, source], env=environment, check=True)
        linker, environment = tool(work, "ld")
        subprocess.run([linker, "-shared", "-soname", name, "-o", torch / name, built], env=environment, check=True)


def command(folder: Path, core: str = "cortex-a76") -> list[str]:
    """The arm64 Python, emulated on this core; options and a script follow."""
    root = folder / "root"
    environment = [f"PYTHONPATH={folder / 'site'}", f"PYTHONHOME={root / 'usr'}", "PYTHONDONTWRITEBYTECODE=1"]
    settings = [word for setting in environment for word in ("-E", setting)]
    return [
        str(folder / "host/usr/bin/qemu-aarch64-static"), "-cpu", core, "-L", str(root), *settings,
        str(root / "usr/bin/python3.11"),
    ]  # fmt: skip


if __name__ == "__main__":
    here = Path(sys.argv[1]).resolve()
    if not here.is_dir():
        for needed in ("apt-get", "dpkg-deb"):
            if shutil.which(needed) is None:
                sys.exit(f"arm64: {needed} is not here; these tests need Debian's packages")
        made(here)
