"""The platforms that a kit can be made for: their templates, and the targets that the published packages run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.carried import TextPreprocessing

_KOTLIN = "src/main/java/org/edgetune/kit"
_SWIFT = "Sources/EdgetuneKit"
_FOLDERS = {".kt": _KOTLIN, ".swift": _SWIFT, ".hpp": "cpp", ".cpp": "cpp"}  # by suffix


@dataclass(frozen=True)
class Platform:
    """One kind of device, with the templates of its kits."""

    name: str
    title: str
    targets: tuple[str, ...]  # the first is used if neither a device nor a target is given
    model: str  # folder of the program and its metadata
    common: tuple[str, ...]  # templates for every classifier
    text: tuple[str, ...]
    image: tuple[str, ...]
    generation: tuple[str, ...]  # instead of these, for a text-generation program
    packages: Mapping[str, str] = field(default_factory=dict)  # by target: what the app has to link or install
    python: bool = False  # has the Python sample, which reads any tokenizer, and the C++ one

    def files(self, preprocessing: object) -> dict[str, str]:
        """The templates for a classifier with this preprocessing, and their paths in the kit."""
        own = self.text if isinstance(preprocessing, TextPreprocessing) else self.image
        return {template: path_of(template) for template in (*self.common, *own)}


def path_of(template: str) -> str:
    """The path in a kit of the file made from a template."""
    name = template.rpartition("/")[2]
    if name.startswith("spec_"):
        return "cpp/spec.hpp"
    if name in ("Package.swift", "CMakeLists.txt"):
        return name if name == "Package.swift" else f"cpp/{name}"
    folder = _FOLDERS.get(name[name.rindex(".") :])
    return "README.md" if name == "generation.md" else f"{folder}/{name}" if folder else name


ANDROID = Platform(
    name="android",
    title="Android",
    targets=("xnnpack", "portable", "vulkan", "qnn"),
    model="src/main/assets",
    common=("android/README.md", "android/build.gradle.kts", "android/Model.kt", "android/Scores.kt"),
    text=("android/Text.kt", "android/TextModel.kt"),
    image=("android/Picture.kt", "android/PictureModel.kt"),
    generation=("android/generation.md", "android/build.gradle.kts", "android/Generator.kt"),
    packages={
        "vulkan": "org.pytorch:executorch-android-vulkan",
        "qnn": "org.pytorch:executorch-android-qnn",
        "": "org.pytorch:executorch-android",
    },
)

IOS = Platform(
    name="ios",
    title="iPhone, iPad and Mac",
    targets=("xnnpack", "coreml", "portable"),
    model=f"{_SWIFT}/Resources",
    common=("ios/README.md", "ios/Package.swift", "ios/Model.swift"),
    text=("ios/Text.swift",),
    image=("ios/Picture.swift",),
    generation=("ios/generation.md", "ios/Package.swift", "ios/Generator.swift"),
    packages={"xnnpack": "backend_xnnpack", "coreml": "backend_coreml", "": ""},
)

_SAMPLES = ("linux/sample.py", "linux/requirements.txt", "linux/CMakeLists.txt", "linux/main.cpp")

LINUX = Platform(
    name="linux",
    title="Linux",
    targets=("xnnpack", "portable"),
    model=".",
    common=("linux/README.md", *_SAMPLES),
    text=("linux/spec_text.hpp", "linux/text.hpp"),
    image=("linux/spec_picture.hpp", "linux/picture.hpp"),
    generation=("linux/generation.md", "linux/generate.py", "linux/requirements.txt"),
    python=True,
)

JETSON = replace(LINUX, name="jetson", title="Jetson", common=("jetson/README.md", *_SAMPLES))

PLATFORMS = {platform.name: platform for platform in (ANDROID, IOS, JETSON, LINUX)}


def find(name: str) -> Platform:
    """The platform with this name."""
    if name not in PLATFORMS:
        raise EdgetuneError("unknown kit", got=name, allowed=PLATFORMS)
    return PLATFORMS[name]


def target_for(platform: Platform, device: str | None, target: str | None) -> str:
    """The target to lower to: the given one, or the device's first one that the platform's packages run.

    Raises `EdgetuneError` if the device belongs to another platform, or the packages do not run the target.
    """
    preferred = platform.targets
    if device is not None:
        from edgetune.profile.device import load

        descriptor = load(device)
        kind = platform_of(descriptor.family, descriptor.targets)
        if platform.name != kind and not (platform is LINUX and kind in ("linux", "jetson")):
            raise EdgetuneError(f"{device} is not a device for this kit", got=platform.name, allowed=[kind])
        preferred = tuple(name for name in descriptor.targets if name in platform.targets) or ("portable",)
    if target is not None and target not in platform.targets:
        raise EdgetuneError(
            f"the packages that are published for {platform.title} do not run this target",
            got=target,
            allowed=platform.targets,
            exit_code=Exit.EXPORT,
        )
    return target or preferred[0]


def platform_of(family: str, targets: tuple[str, ...]) -> str:
    """The kit for a device of this family with these targets."""
    if family == "microcontroller" or (family == "computer" and "coreml" in targets):
        raise EdgetuneError(
            "there is no kit for this kind of device",
            got=family,
            action="lower with `edgetune export MODEL --device ID`",
        )
    if family == "phone":
        return "ios" if "coreml" in targets else "android"
    return "jetson" if family == "jetson" else "linux"
