"""Repositories of the Hugging Face hub: found in the hub's own cache, fetched where they are not.

Everything goes through huggingface_hub, so that its settings hold here too: HF_HOME, HF_HUB_CACHE,
HF_ENDPOINT, HF_TOKEN and stored tokens, HF_HUB_OFFLINE. It is imported by the first call, which
keeps `--help` quick.
"""

import contextlib
import errno
import hashlib
import queue
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from minifuse.errors import CheckpointError, MinifuseError, ModelNotFoundError, one_line
from minifuse.files import (
    DISK_FULL,
    format_bytes,
    is_inside,
    list_names,
    read_json,
    rename_whole,
    tool_command,
    write_whole,
)
from minifuse.wheels import cache_dir

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import BlobLfsInfo, DatasetInfo, ModelInfo, RepoSibling

T = TypeVar("T")
Info = TypeVar("Info", bound="ModelInfo | DatasetInfo")

_REQUIRED_FILES = ("config.json", "tokenizer.json")
_SMALL_FILES = (
    *_REQUIRED_FILES,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/default.jinja",
)
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

# Branches, tags, commits, refs/pr/1. Not "..": the name becomes a path under the cache's refs/.
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+-]*(/\w[\w.+-]*)*")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# For the one answer that all else waits for: name lookup, each address and each read together.
PATIENCE_S = 8
# How long a broken download is tried again without a further byte.
_STALL_S = 10

_RESUMES = "run the same command again: the download goes on where it stopped"
_LOG_IN = "set HF_TOKEN or run: hf auth login"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub at a revision: a branch, a tag or a commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"hub {self.repository} at {self.revision}"


def parse_hub_id(text: str) -> HubSource | None:
    """Read ORG/NAME or ORG/NAME@REVISION, the revision being main unless named; else None.

    raises: MinifuseError where huggingface_hub refuses its settings
    """
    library = hub_library()
    repository, at, revision = text.partition("@")
    if repository.count("/") != 1 or (at and not _REVISION.fullmatch(revision)):
        return None
    try:
        library.utils.validate_repo_id(repository)
    except library.errors.HFValidationError:
        return None
    return HubSource(repository, revision or "main")


def find_snapshot(source: HubSource) -> Path | None:
    """The folder of a complete snapshot in the hub's cache, named by its commit; no network.

    raises: CheckpointError for an index of shards that is none; MinifuseError where the cache
            cannot be read
    """
    with explained(source):
        if _missing_files(source):
            return None
        return _in_cache(source, _REQUIRED_FILES[0]).parent


def fetch_snapshot(
    source: HubSource, check: Callable[[Path], object] = lambda folder: None
) -> Path:
    """The folder of a complete snapshot, named by its commit: the cached one, else downloaded.

    What is cached is taken without asking the hub, so that a branch does not move under the user.
    To take a branch's newest commit: `hf download ORG/NAME`, or name the commit as the revision.
    Where another tool filled the cache, the hub is asked once for the small files of that commit;
    where it does not answer, a warning names those that are not there.

    check:  looks at the folder when all but the weights is there; what it raises spares a download
    raises: ModelNotFoundError where the hub has no such model, keeps it to others, or is not
            reached; CheckpointError for files that do not belong together; MinifuseError where the
            download breaks off or the cache has no room. Whatever was fetched is kept for the next
            call, which also holds for KeyboardInterrupt.
    """
    folder = find_snapshot(source)
    if folder is not None:
        _complete(replace(source, revision=folder.name))
        return folder
    with explained(source):
        pinned = _download(source, check)
        return _in_cache(pinned, _REQUIRED_FILES[0]).parent


def hub_library() -> ModuleType:
    """huggingface_hub, which reads the environment as it is imported, and may not like it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ValueError as error:
        raise MinifuseError(
            f"huggingface_hub cannot be used ({_told(error)}); look at the variables HF_*"
        ) from error
    return huggingface_hub


def _cached(source: HubSource, name: str) -> Path | None:
    found = _lookup(source, name)
    return Path(found) if isinstance(found, str) else None


def _in_cache(source: HubSource, name: str) -> Path:
    """A file that is known to be there."""
    path = _cached(source, name)
    assert path is not None, name
    return path


def _lookup(source: HubSource, name: str) -> object:
    """A cached file's path; None where there is none; else the library's mark for a file that the
    commit does not have.
    """
    library = hub_library()
    return library.try_to_load_from_cache(source.repository, name, revision=source.revision)


def _missing_files(source: HubSource) -> list[str]:
    """What the cache lacks; the shards are known as soon as their index is there."""
    wanted = [*_REQUIRED_FILES]
    if not _cached(source, _SINGLE_FILE):
        index = _cached(source, _INDEX_FILE)
        wanted += _read_shards(index) if index else [_SINGLE_FILE]
    return [name for name in wanted if not _cached(source, name)]


def _read_shards(index: Path) -> list[str]:
    try:
        placed = read_json(index).get("weight_map")
        names = placed.values() if isinstance(placed, dict) else ()
        odd = [name for name in names if not isinstance(name, str) or not is_inside(name)]
        if names and not odd:
            return sorted(set(names))
        problem = f"it names {list_names(map(str, odd))}" if odd else "it has no weight_map"
    except CheckpointError as error:
        problem = str(error)
    raise CheckpointError(
        f"{index} is no index of shards ({problem}); wanted weight_map, tensor names to files of "
        "the repository: use another revision, or delete it to have it fetched again"
    )


def _download(source: HubSource, check: Callable[[Path], object]) -> HubSource:
    """Fetch what is missing of a revision, all of it at the one commit that it now stands for."""
    if hub_library().constants.HF_HUB_OFFLINE:
        raise _offline_error(source)
    info = _ask(source)
    files = {file.rfilename: file for file in info.siblings or ()}
    _check_listing(source, files)
    assert info.sha is not None, "no commit"
    print(f"fetching {source}, commit {info.sha}", file=sys.stderr)
    pinned = replace(source, revision=info.sha)
    _write_ref(source, info.sha)
    # Small files first: where the weights are whole, so is everything else.
    small = [name for name in _SMALL_FILES if name in files]
    for name in (*small, *([] if _SINGLE_FILE in files else [_INDEX_FILE])):
        if not _cached(pinned, name):
            _fetch_file(pinned, files[name])
    check(_in_cache(pinned, _REQUIRED_FILES[0]).parent)
    weights = _list_weights(pinned, files)
    _check_space(pinned, weights)
    for file in weights:
        _fetch_file(pinned, file)
    _write_marker(pinned, small)
    return pinned


def _complete(pinned: HubSource) -> None:
    """Fetch the small files of a commit that another tool left out, where the hub can be asked.

    What is there runs without them, so that whatever goes wrong is a warning.
    """
    if _has_marker(pinned):
        return
    unknown = [name for name in _SMALL_FILES if _lookup(pinned, name) is None]
    if not unknown:
        return
    is_offline = hub_library().constants.HF_HUB_OFFLINE
    try:
        if is_offline:
            raise MinifuseError("HF_HUB_OFFLINE forbids to ask for them")
        with explained(pinned):
            files = {file.rfilename: file for file in _ask(pinned).siblings or ()}
            absent = [name for name in unknown if name in files]
            if absent:
                print(f"fetching {', '.join(absent)} of {pinned}", file=sys.stderr)
            for name in absent:
                _fetch_file(pinned, files[name])
            _write_marker(pinned, [name for name in _SMALL_FILES if name in files])
    except MinifuseError as error:
        warnings.warn(
            f"another tool cached {pinned} without {', '.join(unknown)}; where the model has such "
            f"files, answers differ without them ({error})"
            + ("" if is_offline else "; HF_HUB_OFFLINE=1 spares the question"),
            stacklevel=3,
        )


def _marker(pinned: HubSource) -> Path:
    """Names the small files of a commit, one a line, once they have all been there."""
    return cache_dir() / "hub" / _repository_folder(pinned).name / pinned.revision


def _has_marker(pinned: HubSource) -> bool:
    try:
        names = _marker(pinned).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return False
    # Somebody may have deleted the snapshot and had another tool fetch it again.
    return all(_cached(pinned, name) for name in names)


def _write_marker(pinned: HubSource, names: list[str]) -> None:
    # Where it cannot be written, the next start asks once more.
    with contextlib.suppress(OSError):
        _write_note(_marker(pinned), "".join(f"{name}\n" for name in names))


def _ask(source: HubSource) -> "ModelInfo":
    """The commit that a revision stands for, and its files; asked once and without retries."""
    library = hub_library()

    def ask() -> "ModelInfo":
        return library.HfApi().model_info(
            source.repository,
            revision=source.revision,
            files_metadata=True,
            timeout=PATIENCE_S,
        )

    try:
        return checked_info(within(PATIENCE_S, ask))
    except Exception as error:
        is_answer = isinstance(error, library.errors.HfHubHTTPError)
        # A token that cannot be read, for one.
        is_local = isinstance(error, OSError) and error.errno is not None
        if is_answer or is_local or isinstance(error, MinifuseError):
            raise
        raise ModelNotFoundError(
            f"{source} is not whole in the cache {hub_cache()}, and {hub_endpoint()} cannot be "
            f"reached ({_told(error)}): connect, or correct HF_ENDPOINT, and run the same command "
            "again"
        ) from error


def checked_info(info: Info) -> Info:
    """What the hub says of a repository; commits and hashes in it become names in the cache.

    raises: CheckpointError where they are none
    """
    hashes = [file.lfs.sha256 for file in info.siblings or () if file.lfs is not None]
    odd = [str(text) for text in hashes if not _SHA256.fullmatch(str(text))]
    odd += [] if _COMMIT.fullmatch(str(info.sha)) else [str(info.sha)]
    if odd:
        raise CheckpointError(
            f"{hub_endpoint()} answers with {one_line(odd[0])!r} for a hash; wanted hex "
            "digits: correct HF_ENDPOINT"
        )
    return info


def within(seconds: float, call: Callable[[], T]) -> T:
    """What call() returns or raises, or TimeoutError.

    A thread, because the timeouts of sockets hold for each address and each read anew, and none
    holds for name lookup.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds} s") from None
    if error is not None:
        raise error
    return value


def _check_listing(source: HubSource, files: dict[str, "RepoSibling"]) -> None:
    if _SINGLE_FILE not in files and _INDEX_FILE not in files:
        raise ModelNotFoundError(
            f"{source} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}; {_weights_hint(files)}"
        )
    for name in _REQUIRED_FILES:
        if name not in files:
            raise ModelNotFoundError(
                f"{source} holds no {name}, which minifuse needs: use a repository that has one, "
                "or download this one, add the file and give the folder"
            )


def _weights_hint(files: dict[str, "RepoSibling"]) -> str:
    if any(re.fullmatch(r"pytorch_model(-.*)?\.bin", name) for name in files):
        return (
            "it has pytorch_model.bin: download the repository (hf download) and run "
            f"{tool_command('convert_weights')} FOLDER TARGET"
        )
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if ggufs:
        return f"it has {ggufs[0]}: download it (hf download) and give the file as the model"
    return "minifuse reads weights from safetensors and GGUF: use a repository that has them"


def _list_weights(pinned: HubSource, files: dict[str, "RepoSibling"]) -> list["RepoSibling"]:
    """The weight files that the cache lacks."""
    is_single = _SINGLE_FILE in files
    names = [_SINGLE_FILE] if is_single else _read_shards(_in_cache(pinned, _INDEX_FILE))
    absent = [name for name in names if name not in files]
    if absent:
        raise CheckpointError(
            f"{_INDEX_FILE} of {pinned} names {', '.join(absent)}, which the repository does not "
            "hold: use another revision"
        )
    return [files[name] for name in names if not _cached(pinned, name)]


def _check_space(pinned: HubSource, weights: list["RepoSibling"]) -> None:
    wanted = sum(_count_rest(pinned, file) for file in weights)
    free = shutil.disk_usage(_repository_folder(pinned)).free
    if wanted > free:
        raise MinifuseError(
            f"{pinned.repository} takes another {format_bytes(wanted)}, but the cache "
            f"{hub_cache()} has {format_bytes(free)} free: make room, or set HF_HOME to a folder "
            "on a larger disk"
        )


def _count_rest(pinned: HubSource, file: "RepoSibling") -> int:
    """Bytes of a file that are not on the disk; another commit may have brought it."""
    if file.lfs is None:
        return file.size or 0
    partial, there = _partial(pinned, file), 0
    with contextlib.suppress(FileNotFoundError):
        there = partial.stat().st_size
    # Asked last: by now another process may have made the one into the other.
    return 0 if partial.with_name(file.lfs.sha256).exists() else file.lfs.size - there


def _write_ref(source: HubSource, commit: str) -> None:
    """Note which commit a revision stands for, as the hub's cache does: in refs/<revision>.

    The library notes it when a file is asked for by the revision's name, but then asks the hub
    once more for each, and a branch that moves meanwhile would leave files of two commits.
    """
    if source.revision == commit:
        return
    _write_note(_repository_folder(source) / "refs" / source.revision, commit)


def _write_note(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _fetch_file(pinned: HubSource, file: "RepoSibling") -> None:
    # The hub serves what is larger by its own protocol alone, which the library speaks.
    if file.lfs is not None and file.lfs.size <= hub_library().constants.MAX_HTTP_DOWNLOAD_SIZE:
        _fetch_blob(pinned, file)
    # Where the content is there, this only links the snapshot to it.
    hub_library().hf_hub_download(pinned.repository, file.rfilename, revision=pinned.revision)


def _fetch_blob(pinned: HubSource, file: "RepoSibling") -> None:
    """Fetch a large file to where the hub's cache keeps it, from where an earlier run stopped.

    huggingface_hub 1.18 and later throw a partial file away (its issue 4196). The lock is the one
    that it takes for the same file; the hash catches what locks that do not hold would let happen.
    """
    partial = _partial(pinned, file)
    blob = partial.with_name(_lfs(file).sha256)
    lock = hub_cache() / ".locks" / _repository_folder(pinned).name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with hub_library().utils.WeakFileLock(lock):
        if blob.exists():
            # By another tool, since an earlier run of this one broke off.
            partial.unlink(missing_ok=True)
            return
        _fetch_rest(pinned, file, partial)
        with partial.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != blob.name:
            partial.unlink()
            raise CheckpointError(
                f"{file.rfilename} of {pinned} came with the SHA-256 {found}; wanted {blob.name}: "
                "run the same command again to fetch it anew"
            )
        rename_whole(partial, blob)


def _fetch_rest(pinned: HubSource, file: "RepoSibling", partial: Path) -> None:
    """Append to a partial file until it is whole.

    The library tries again by itself, but not after every kind of break.
    """
    library = hub_library()
    url = library.hf_hub_url(pinned.repository, file.rfilename, revision=pinned.revision)
    # Bytes of a compressed answer could not be counted on.
    headers = library.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
    last_size, last_time = -1, 0.0
    while True:
        with partial.open("ab") as output:
            size = output.tell()
            if size > last_size:
                last_size, last_time = size, time.monotonic()
            if size >= _lfs(file).size:
                return
            try:
                library.file_download.http_get(
                    url,
                    output,
                    resume_size=size,
                    headers=headers,
                    expected_size=_lfs(file).size,
                    displayed_filename=file.rfilename,
                )
                return
            # httpx's or httpx2's, whichever the library goes by.
            except library.errors.HTTPError as error:
                is_answer = isinstance(error, library.errors.HfHubHTTPError)
                if is_answer or time.monotonic() - last_time > _STALL_S:
                    raise
        time.sleep(1)


def hub_cache() -> Path:
    return Path(hub_library().constants.HF_HUB_CACHE)


def hub_endpoint() -> str:
    """The hub's address, for messages: without the name and password that may stand in it."""
    return _without_secrets(hub_library().constants.ENDPOINT)


def _told(error: Exception) -> str:
    return one_line(_without_secrets(str(error))) or type(error).__name__


def _without_secrets(text: str) -> str:
    """A text whose addresses have neither name and password nor what signs them."""
    text = re.sub(r"//[^/\s'\"]*@", "//", text)
    return re.sub(r"(\w://[^?\s'\"]*)\?[^\s'\"]*", r"\1", text)


def _repository_folder(source: HubSource) -> Path:
    name = hub_library().file_download.repo_folder_name
    return hub_cache() / name(repo_id=source.repository, repo_type="model")


def _partial(pinned: HubSource, file: "RepoSibling") -> Path:
    return _repository_folder(pinned) / "blobs" / f"{_lfs(file).sha256}.part"


def _lfs(file: "RepoSibling") -> "BlobLfsInfo":
    """Size and hash of a large file."""
    assert file.lfs is not None, file.rfilename
    return file.lfs


@contextlib.contextmanager
def explained(source: HubSource) -> Iterator[None]:
    """Whatever goes wrong, as a MinifuseError of one line."""
    try:
        yield
    except MinifuseError:
        raise
    except Exception as error:
        raise _explain(source, error) from error


def _explain(source: HubSource, error: Exception) -> MinifuseError:
    errors = hub_library().errors
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        # How the library says that it could not look a file up; the reason is what helps.
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_answer(source, error)
    failed = MinifuseError(f"{source} could not be fetched ({_told(error)}); {_RESUMES}")
    if not isinstance(error, OSError):
        return failed
    number = error.errno
    if number in DISK_FULL:
        return MinifuseError(
            f"the disk of the cache {hub_cache()} is full ({error.strerror}): make room and "
            f"{_RESUMES}"
        )
    if number is not None and _is_of_cache(error):
        return MinifuseError(
            f"the cache {hub_cache()} cannot be used ({_told(error)}); set HF_HOME to a folder "
            "that can be written"
        )
    if number == errno.ENOENT and error.filename is None:
        # How the library for TLS reports it, without the name.
        return MinifuseError(
            f"{source} could not be fetched ({_told(error)}): a file that the settings name is "
            "missing; look at SSL_CERT_FILE and at the variables HF_*"
        )
    return failed


def _is_of_cache(error: OSError) -> bool:
    """Whether it names a file in the cache, or a folder that the cache lies in."""
    if not isinstance(error.filename, str):
        return False
    path, cache = Path(error.filename).absolute(), hub_cache().absolute()
    if error.errno == errno.ENOTDIR:
        # It is a folder above that is none.
        path = path.parent
    return path.is_relative_to(cache) or cache.is_relative_to(path)


def _explain_answer(source: HubSource, error: "HfHubHTTPError") -> MinifuseError:
    """The hub's own refusals; `error` carries its answer."""
    answer = error.response
    status = answer.status_code
    code = answer.headers.get("X-Error-Code")
    has_token = "authorization" in answer.request.headers
    page = f"{hub_endpoint()}/{source.repository}"
    host = answer.request.url.host
    is_hub = code is not None or host == urlsplit(hub_library().constants.ENDPOINT).hostname
    asked = hub_endpoint() if is_hub else host
    if code == "GatedRepo":
        return ModelNotFoundError(
            f"{source} is gated: ask for access at {page}, then log in as who was granted it: "
            f"{_LOG_IN}"
        )
    if code == "RevisionNotFound":
        return ModelNotFoundError(
            f"{source}: the repository has no such revision; wanted a branch, a tag or a commit, "
            f"see {page}/commits/main"
        )
    if code == "EntryNotFound":
        return ModelNotFoundError(f"{source} lists {answer.url.path}, but does not serve it")
    if status == 403 and not is_hub:
        return MinifuseError(
            f"{host}, where the hub keeps the content of {source}, answers 403: the address that "
            f"the hub gave has expired, or something on the way forbids it; {_RESUMES}"
        )
    if status == 401 and has_token:
        return ModelNotFoundError(
            f"{hub_endpoint()} refuses the token that {source} was asked for with: it is invalid "
            f"or has expired; make one at {hub_endpoint()}/settings/tokens, then {_LOG_IN}"
        )
    if status in (401, 404) and is_hub:
        return ModelNotFoundError(
            f"{source} does not exist on {hub_endpoint()} or is private: check its spelling (no "
            f"folder of that name is here either), or log in as someone who may read it: {_LOG_IN}"
        )
    if status == 403:
        said = answer.headers.get("X-Error-Message") or "no reason given"
        return ModelNotFoundError(
            f"{source} is forbidden to this account or token ({said}): give the token read access "
            f"to it at {hub_endpoint()}/settings/tokens, or use another: {_LOG_IN}"
        )
    if status == 429:
        return MinifuseError(
            f"{asked} answers 429: too many requests from here; wait some minutes and {_RESUMES}"
        )
    if status >= 500:
        return MinifuseError(
            f"{asked} answers {status}, an error of its own; wait some minutes and {_RESUMES}"
        )
    return MinifuseError(f"{asked} answers {status} for {source} ({_told(error)})")


def _offline_error(source: HubSource) -> ModelNotFoundError:
    state = "is not in"
    if _cached(source, _REQUIRED_FILES[0]):
        state = f"is half downloaded, without {', '.join(_missing_files(source))}, in"
    return ModelNotFoundError(
        f"{source} {state} the cache {hub_cache()}, and HF_HUB_OFFLINE forbids to fetch it: unset "
        "it and run the same command again, or set HF_HOME to where it is cached"
    )
