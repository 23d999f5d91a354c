"""Compiled code in one file, to be unpacked into another machine's compile cache.

The file is a zip of a folder that Inductor kept its cache in: graphs (which torch unpickles),
their wrappers in Python, kernels as shared libraries. Torch's own `save_cache_artifacts` leaves
the kernels out, which are what takes long. All of it is program code, and runs with the rights of
whoever loads it: an artifact file must come from where one would take a program from.

It fits the torch, Python and minifuse that it was made with, as many threads, and CPUs that have
every feature of the one that compiled it; anything else is refused before a byte is unpacked.
"""

import contextlib
import json
import os
import platform
import shutil
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import minifuse
from minifuse.errors import MinifuseError, UsageError, one_line
from minifuse.files import PARTIAL, check_room, hash_sources, is_inside, new_file, parse_json

FORMAT = 1
_MANIFEST = "minifuse-artifacts.json"
_FILES = "cache/"
# The cache's own locks, and what a build leaves half way.
_LEFT_OUT = {".lock", ".tmp"}


def describe_build() -> dict:
    """What compiled code depends on; artifacts are for machines that say the same."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = None
    return {
        "format": FORMAT,
        "minifuse": f"{minifuse.__version__} ({hash_sources()[:12]})",
        "torch": torch_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count()),
        "cpu": cpu_features(),
    }


def cpu_features() -> list[str]:
    """What instructions this CPU has, as Linux names them; elsewhere the processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(value.split())
    return [platform.processor()]


def save_artifacts(folder: Path, path: Path) -> int:
    """Write all that a compile cache holds into one file; how many files those are.

    raises: MinifuseError where the file cannot be written; nothing is left behind then
    """
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix not in _LEFT_OUT
        and PARTIAL not in file.name
        and "locks" not in file.parts
    )
    try:
        with new_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr(_MANIFEST, json.dumps(describe_build()))
            for file in found:
                name = _FILES + file.relative_to(folder).as_posix()
                archive.write(file, name, compress_type=zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror}") from None
    return len(found)


def load_artifacts(path: Path, folder: Path) -> int:
    """Unpack into a compile cache what it does not hold yet; how many files the artifacts have.

    raises: UsageError for a file that is none of ours, is damaged, or was made for another build;
            MinifuseError where the cache cannot be written
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_manifest(path, archive)
            listed = [name for name in archive.namelist() if name != _MANIFEST]
            names = [name.removeprefix(_FILES) for name in listed if name.startswith(_FILES)]
            odd = set(listed) - {_FILES + name for name in names if _is_file_name(name)}
            if odd:
                raise UsageError(f"{path} holds {one_line(min(odd))!r}, which lies in no cache")
            check_room(folder, sum(info.file_size for info in archive.infolist()), str(path))
            if damaged := archive.testzip():
                raise UsageError(f"{path} is damaged at {one_line(damaged)!r}; make it anew")
            for name in names:
                target = folder / name
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    # Piece by piece: what a file unpacks to need not fit into memory.
                    with (
                        archive.open(_FILES + name) as packed,
                        new_file(target) as temporary,
                        temporary.open("wb") as unpacked,
                    ):
                        shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError):
        raise UsageError(
            f"{path} is no file of compiled artifacts; wanted one that --save has written"
        ) from None
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is not there") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise MinifuseError(f"{error.filename or path}: {reason}") from None
    return len(names)


def _is_file_name(name: str) -> bool:
    return is_inside(name) and not name.endswith("/")


def _check_manifest(path: Path, archive: zipfile.ZipFile) -> None:
    try:
        made = parse_json(archive.read(_MANIFEST))
    except ValueError:
        made = None
    if not isinstance(made, dict):
        raise KeyError(_MANIFEST)
    here = describe_build()
    for name in here.keys() - {"cpu"}:
        if made.get(name) != here[name]:
            raise UsageError(
                f"{path} was made for {name} {one_line(str(made.get(name)))}, this is "
                f"{here[name]}; make it anew here with --save"
            )
    cpu = made.get("cpu")
    lacking = sorted(
        {str(name) for name in (cpu if isinstance(cpu, list) else [cpu])} - {*here["cpu"]}
    )
    if lacking:
        named = one_line(", ".join(lacking[:5]))
        raise UsageError(
            f"{path} was made for a CPU with {named}, which this one lacks; make it anew here with "
            "--save"
        )
