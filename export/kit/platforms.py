"""The platforms that a kit can be made for: what its parts are, and which targets the published packages there run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.carried import TextPreprocessing


@dataclass(frozen=True)
class Platform:
    """One kind of device. Files are named by where their templates lie and where in the kit they go."""

    name: str
    title: str
    targets: tuple[str, ...]  # the first is taken where neither a device nor the user says otherwise
    model: str  # folder of the program and of what it carries
    always: Mapping[str, str]
    text: Mapping[str, str]
    picture: Mapping[str, str]
    talk: Mapping[str, str]  # instead of all these, for a language model
    packages: Mapping[str, str] = field(default_factory=dict)  # by target: what the app has to link or install
    python: bool = False  # has the Python sample, which reads any tokenizer, and the C++ one

    def files(self, told: object) -> dict[str, str]:
        """Templates and where they go, for a program with this preprocessing."""
        return {**self.always, **(self.text if isinstance(told, TextPreprocessing) else self.picture)}


_KOTLIN = "src/main/java/org/edgetune/kit"
_SWIFT = "Sources/EdgetuneKit"

ANDROID = Platform(
    name="android",
    title="Android",
    targets=("xnnpack", "portable", "vulkan", "qnn"),
    model="src/main/assets",
    always={
        "android/README.md": "README.md",
        "android/build.gradle.kts": "build.gradle.kts",
        "android/Model.kt": f"{_KOTLIN}/Model.kt",
        "android/Scores.kt": f"{_KOTLIN}/Scores.kt",
    },
    text={
        "android/Text.kt": f"{_KOTLIN}/Text.kt",
        "android/TextModel.kt": f"{_KOTLIN}/TextModel.kt",
    },
    picture={
        "android/Picture.kt": f"{_KOTLIN}/Picture.kt",
        "android/PictureModel.kt": f"{_KOTLIN}/PictureModel.kt",
    },
    talk={
        "android/talk.md": "README.md",
        "android/build.gradle.kts": "build.gradle.kts",
        "android/Talk.kt": f"{_KOTLIN}/Talk.kt",
    },
    packages={
        "vulkan": "org.pytorch:executorch-android-vulkan",
        "qnn": "org.pytorch:executorch-android-qnn",
        "": "org.pytorch:executorch-android",
    },
)

IOS = Platform(
    name="ios",
    title="iPhone, iPad and Mac",
    targets=("xnnpack", "coreml", "mps", "portable"),
    model=f"{_SWIFT}/Resources",
    always={
        "ios/README.md": "README.md",
        "ios/Package.swift": "Package.swift",
        "ios/Model.swift": f"{_SWIFT}/Model.swift",
    },
    text={"ios/Text.swift": f"{_SWIFT}/Text.swift"},
    picture={"ios/Picture.swift": f"{_SWIFT}/Picture.swift"},
    talk={
        "ios/talk.md": "README.md",
        "ios/Package.swift": "Package.swift",
        "ios/Talk.swift": f"{_SWIFT}/Talk.swift",
    },
    packages={"xnnpack": "backend_xnnpack", "coreml": "backend_coreml", "mps": "backend_mps", "": ""},
)

_LINUX = {
    "linux/sample.py": "sample.py",
    "linux/requirements.txt": "requirements.txt",
    "linux/CMakeLists.txt": "cpp/CMakeLists.txt",
    "linux/main.cpp": "cpp/main.cpp",
}
_LINUX_TEXT = {"linux/spec_text.hpp": "cpp/spec.hpp", "linux/text.hpp": "cpp/text.hpp"}
_LINUX_PICTURE = {"linux/spec_picture.hpp": "cpp/spec.hpp", "linux/picture.hpp": "cpp/picture.hpp"}
_LINUX_TALK = {
    "linux/talk.md": "README.md",
    "linux/talk.py": "talk.py",
    "linux/requirements.txt": "requirements.txt",
}

LINUX = Platform(
    name="linux",
    title="Linux",
    targets=("xnnpack", "portable"),
    model=".",
    always={"linux/README.md": "README.md", **_LINUX},
    text=_LINUX_TEXT,
    picture=_LINUX_PICTURE,
    talk=_LINUX_TALK,
    python=True,
)

JETSON = replace(LINUX, name="jetson", title="Jetson", always={"jetson/README.md": "README.md", **_LINUX})

PLATFORMS = {platform.name: platform for platform in (ANDROID, IOS, JETSON, LINUX)}


def find(name: str) -> Platform:
    """The platform of that name."""
    if name not in PLATFORMS:
        raise EdgetuneError("unknown kit", got=name, allowed=PLATFORMS)
    return PLATFORMS[name]


def target_for(platform: Platform, device: str | None, target: str | None) -> str:
    """What to lower to: what was asked for, or what the device prefers of what the platform's packages run.

    Raises `EdgetuneError` where the device is of another platform, or the packages do not run the target.
    """
    preferred = platform.targets
    if device is not None:
        from edgetune.profile.device import load

        known = load(device)
        kind = platform_of(known.family, known.targets)
        if platform.name != kind and not (platform is LINUX and kind in ("linux", "jetson")):
            raise EdgetuneError(f"{device} is not a device for this kit", got=platform.name, allowed=[kind])
        preferred = tuple(name for name in known.targets if name in platform.targets) or ("portable",)
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
