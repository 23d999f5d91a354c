"""The hub by its real client and a local server: what is asked for, kept, resumed and refused."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor as Pool
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stub import HubStub, Repository
from tiny_files import make_model, write_hub_folder

from minifuse import hub
from minifuse.errors import CheckpointError
from minifuse.hub import HubSource, parse_hub_id

NAME = "org/tiny"
# In chunks of the library's own size a test file would be one chunk. Its pauses are cut short.
CLIENT = """
import json, os, resource, signal, sys, time, warnings
from minifuse import hub
from minifuse.errors import MinifuseError
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.05))
hub._STALL_S = 1
# A shell without job control starts what runs in its background with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
if "FILE_LIMIT" in os.environ:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, [int(os.environ["FILE_LIMIT"])] * 2)
start = time.monotonic()
heard = warnings.catch_warnings(record=True)
said = heard.__enter__()
try:
    hub.hub_library().constants.DOWNLOAD_CHUNK_SIZE = 1000
    result = {"folder": str(hub.fetch_snapshot(hub.parse_hub_id(sys.argv[1])))}
except MinifuseError as error:
    result = {"kind": type(error).__name__, "message": str(error)}
result["warnings"] = [str(warning.message) for warning in said]
print(json.dumps(result | {"seconds": time.monotonic() - start}))
"""

JSON = {"config.json": b'{"a": 1}', "tokenizer.json": b'{"b": 2}'}
EXTRAS = {
    "generation_config.json": b"{}",
    "tokenizer_config.json": b'{"c": 3}',
    "special_tokens_map.json": b'{"bos_token": "<s>"}',
    "chat_template.jinja": b"{{ messages[1] }}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/default.jinja": b"{{ messages }}",
}
UNWANTED = {
    "README.md": b"# tiny",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"graph",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
WEIGHTS = bytes(i * i % 251 for i in range(20_500))
SINGLE = JSON | {"model.safetensors": WEIGHTS}
SHARD_NAMES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = {"weight_map": {f"tensor{i}": SHARD_NAMES[i % 3] for i in range(7)}}
SHARDED = (
    JSON
    | {name: WEIGHTS[i:] for i, name in enumerate(SHARD_NAMES)}
    | {"model.safetensors.index.json": json.dumps(INDEX).encode()}
)


@pytest.fixture
def stub():
    with HubStub() as server:
        server.repositories[NAME] = Repository()
        yield server


@pytest.fixture
def environ(tmp_path, stub):
    """What a client runs with: nothing of the machine's own hub settings."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    own = {"HF_HOME": str(tmp_path / "hf"), "MINIFUSE_HOME": str(tmp_path / "minifuse")}
    return kept | {"NO_PROXY": "*", "HF_ENDPOINT": stub.url, "OMP_NUM_THREADS": "1"} | own


@pytest.fixture
def fetch(environ):
    """fetch_snapshot in a process of its own, because the client reads its settings once."""

    def run(name: str = NAME, **settings: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, name],
            env=environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def assert_snapshot(result: dict, files: dict[str, bytes]) -> None:
    assert "folder" in result, result
    folder = Path(result["folder"])
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert {str(path.relative_to(folder)): path.read_bytes() for path in found} == files


def assert_error(result: dict, *parts: str, kind: str = "ModelNotFoundError") -> None:
    assert "message" in result, result
    for part in parts:
        assert part in result["message"]
    assert "\n" not in result["message"]
    assert result["kind"] == kind


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/name", HubSource("org/name", "main")),
        ("Org-1/n_a.me", HubSource("Org-1/n_a.me", "main")),
        ("org/name@v1.0", HubSource("org/name", "v1.0")),
        ("org/name@refs/pr/7", HubSource("org/name", "refs/pr/7")),
        ("org/name@", None),
        ("org/name@../../x", None),
        ("org/name@/etc", None),
        ("org/name@a b", None),
        ("org/name@-x", None),
        ("name", None),
        ("org/name/more", None),
        ("./name", None),
        ("../name", None),
        ("/name", None),
        ("~/name", None),
        ("org/a--b", None),
        ("org/name.git", None),
        ("org/" + "x" * 97, None),
        ("", None),
        ("a\0/b", None),
    ],
)
def test_hub_ids(text, wanted):
    assert parse_hub_id(text) == wanted


def test_source_names_repository_and_revision():
    assert str(HubSource("org/name", "v1")) == "hub org/name at v1"


@pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
def test_what_is_asked_for(stub, fetch, tmp_path, files):
    commit = stub.repositories[NAME].commit(UNWANTED | files | EXTRAS)
    result = fetch()
    assert_snapshot(result, files | EXTRAS)
    home = tmp_path / "hf/hub/models--org--tiny"
    assert Path(result["folder"]) == home / "snapshots" / commit
    assert (home / "refs/main").read_text() == commit
    assert not list(home.glob("blobs/*.part"))
    asked = [seen.path for seen in stub.seen if "/api/" not in seen.path]
    asked = [re.sub(rf"/({NAME}/resolve|blobs)/{commit}/", "", path) for path in asked]
    assert set(asked) == files.keys() | EXTRAS.keys()
    # Weights come last, and each file once.
    weights = [name for name in asked if name.endswith(".safetensors")]
    assert asked[-len(weights) :] == weights
    assert len(stub.files_sent()) == len(files | EXTRAS)
    assert [seen.sent for seen in stub.blob_requests()] == [
        len(files[name]) for name in sorted(set(weights))
    ]


def test_single_file_is_preferred_to_shards(stub, fetch):
    stub.repositories[NAME].commit(SHARDED | SINGLE)
    assert_snapshot(fetch(), SINGLE)


@pytest.mark.parametrize("is_large", [False, True])
def test_any_file_may_be_stored_as_large_or_not(stub, fetch, monkeypatch, is_large):
    monkeypatch.setattr("hub_stub._is_large", lambda file: is_large)
    stub.repositories[NAME].commit(SINGLE | EXTRAS)
    assert_snapshot(fetch(), SINGLE | EXTRAS)
    assert len(stub.blob_requests()) == is_large * len(SINGLE | EXTRAS)


def test_what_another_commit_brought_is_not_fetched_again(stub, fetch):
    repository = stub.repositories[NAME]
    repository.commit(SINGLE, "v1")
    repository.commit(SINGLE | EXTRAS, "v2")
    fetch(f"{NAME}@v1")
    # Nor is there room wanted for it.
    stub.claimed_size = 10**16
    assert_snapshot(fetch(f"{NAME}@v2"), SINGLE | EXTRAS)
    assert len(stub.blob_requests()) == 1


def test_second_start_asks_nothing(stub, fetch):
    stub.repositories[NAME].commit(SHARDED)
    first = fetch()
    seen = len(stub.seen)
    stub.repositories[NAME].commit(SINGLE)
    assert fetch()["folder"] == first["folder"]
    assert len(stub.seen) == seen
    assert fetch(HF_HUB_OFFLINE="1")["folder"] == first["folder"]
    stub.stop()
    assert fetch()["folder"] == first["folder"]


def test_the_library_finds_what_was_fetched_and_the_other_way_round(stub, fetch, environ):
    stub.repositories[NAME].commit(SHARDED)

    def library(call: str) -> None:
        code = f"import huggingface_hub as h; {call}"
        subprocess.run([sys.executable, "-c", code], env=environ, check=True)

    folder = fetch()["folder"]
    find = f"h.snapshot_download({NAME!r}, local_files_only=True)"
    library(f"assert {find} == {folder!r}")
    environ["HF_HOME"] += "-other"
    library(f"[h.hf_hub_download({NAME!r}, name) for name in {[*SHARDED]}]")
    sent = len(stub.files_sent())
    assert_snapshot(fetch(), SHARDED)
    assert len(stub.files_sent()) == sent


@pytest.fixture
def foreign(stub, environ):
    """A commit of which another tool cached what it needed; the branch has moved on since."""
    commit = stub.repositories[NAME].commit(SINGLE | EXTRAS)
    code = f"import huggingface_hub as h; [h.hf_hub_download({NAME!r}, n) for n in {[*SINGLE]}]"
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    stub.repositories[NAME].commit(SHARDED | {"generation_config.json": b'{"other": 1}'})
    stub.seen.clear()
    return commit


def test_what_another_tool_left_out_is_completed_once(stub, fetch, foreign, tmp_path):
    result = fetch()
    assert_snapshot(result, SINGLE | EXTRAS)
    assert not result["warnings"]
    assert Path(result["folder"]).name == foreign
    listings = [seen.path for seen in stub.seen if seen.path.startswith("/api/models/")]
    assert listings == [f"/api/models/{NAME}/revision/{foreign}"]
    assert {*stub.files_sent()} == {*EXTRAS}
    marker = tmp_path / f"minifuse/hub/models--org--tiny/{foreign}"
    assert {*marker.read_text().splitlines()} == EXTRAS.keys() | JSON.keys()
    seen = len(stub.seen)
    assert fetch()["folder"] == result["folder"]
    assert len(stub.seen) == seen


def test_a_snapshot_that_was_deleted_and_came_back_is_completed_again(stub, fetch, foreign):
    folder = Path(fetch()["folder"])
    (folder / "chat_template.jinja").unlink()
    assert_snapshot(fetch(), SINGLE | EXTRAS)


@pytest.mark.parametrize("fault", ["offline", "gone", "refused", "full"])
def test_what_another_tool_left_out_is_named_where_the_hub_is_silent(
    stub, fetch, foreign, environ, fault
):
    if fault == "offline":
        environ["HF_HUB_OFFLINE"] = "1"
        reason = "(HF_HUB_OFFLINE forbids to ask for them)"
    elif fault == "gone":
        stub.stop()
        reason = f"{stub.url} cannot be reached"
    elif fault == "refused":
        stub.repositories[NAME].token = "hf_good"
        reason = "or is private"
    else:
        environ["FILE_LIMIT"] = "1"
        reason = "is full (File too large)"
    result = fetch()
    assert_snapshot(result, SINGLE)
    (warning,) = result["warnings"]
    assert warning.startswith(f"another tool cached hub org/tiny at {foreign} without ")
    assert all(name in warning for name in EXTRAS)
    assert reason in warning
    assert "\n" not in warning
    assert ("HF_HUB_OFFLINE=1 spares the question" in warning) == (fault != "offline")


def test_what_a_commit_is_known_not_to_have_is_not_asked_for(stub, fetch, environ):
    stub.repositories[NAME].commit(SINGLE)
    code = f"""
import huggingface_hub as h
for name in {[*SINGLE, *EXTRAS]}:
    try: h.hf_hub_download({NAME!r}, name)
    except h.errors.EntryNotFoundError: pass
"""
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)
    seen = len(stub.seen)
    result = fetch()
    assert_snapshot(result, SINGLE)
    assert not result["warnings"]
    assert len(stub.seen) == seen


def test_a_home_that_cannot_be_written_spoils_no_download(stub, fetch, tmp_path):
    stub.repositories[NAME].commit(SINGLE | EXTRAS)
    (tmp_path / "file").touch()
    for _ in range(2):
        assert_snapshot(fetch(MINIFUSE_HOME=str(tmp_path / "file/home")), SINGLE | EXTRAS)


def test_a_file_too_large_for_http_is_left_to_the_library(monkeypatch):
    asked = []
    library = hub.hub_library()
    monkeypatch.setattr(library.constants, "MAX_HTTP_DOWNLOAD_SIZE", 100)
    monkeypatch.setattr(library, "hf_hub_download", lambda *args, **_: asked.append(args))
    monkeypatch.setattr(hub, "_fetch_blob", lambda _, file: asked.append(file.rfilename))
    for name, size in {"small": 100, "large": 101}.items():
        file = SimpleNamespace(rfilename=name, lfs=SimpleNamespace(size=size))
        hub._fetch_file(HubSource(NAME, "c" * 40), file)
    assert asked == ["small", (NAME, "small"), (NAME, "large")]


def test_a_partial_file_goes_when_another_tool_brought_the_whole(stub, fetch, tmp_path):
    repository = stub.repositories[NAME]
    repository.commit(SINGLE, "v1")
    repository.commit(SINGLE | EXTRAS, "v2")
    fetch(f"{NAME}@v1")
    blobs = tmp_path / "hf/hub/models--org--tiny/blobs"
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part").write_bytes(bytes(7000))
    assert_snapshot(fetch(f"{NAME}@v2"), SINGLE | EXTRAS)
    assert not list(blobs.glob("*.part"))


def test_revisions_lie_beside_each_other(stub, fetch):
    repository = stub.repositories[NAME]
    old = repository.commit(SINGLE | EXTRAS, "v1")
    repository.commit(SHARDED)
    repository.commit(JSON | {"model.safetensors": WEIGHTS[::-1]}, "refs/pr/3")
    assert_snapshot(fetch(), SHARDED)
    assert_snapshot(fetch(f"{NAME}@v1"), SINGLE | EXTRAS)
    assert_snapshot(fetch(f"{NAME}@{old}"), SINGLE | EXTRAS)
    assert_snapshot(fetch(f"{NAME}@refs/pr/3"), JSON | {"model.safetensors": WEIGHTS[::-1]})
    stub.stop()
    for revision in ("main", "v1", old, "refs/pr/3"):
        assert "folder" in fetch(f"{NAME}@{revision}")


def test_a_branch_that_moves_meanwhile_mixes_no_files(stub, fetch):
    repository = stub.repositories[NAME]
    commit = repository.commit(SHARDED)
    other = {name: content + b" " for name, content in SHARDED.items()}
    stub.on_file = lambda name: repository.commit(other)
    result = fetch()
    assert_snapshot(result, SHARDED)
    assert Path(result["folder"]).name == commit
    assert repository.revisions["main"] != commit
    assert fetch(HF_HUB_OFFLINE="1")["folder"] == result["folder"]


@pytest.mark.parametrize("resets", [False, True], ids=["end", "reset"])
def test_a_connection_that_breaks_once(stub, fetch, resets):
    stub.repositories[NAME].commit(SINGLE)
    stub.cuts["model.safetensors"] = (7000, 1)
    stub.resets = resets
    assert_snapshot(fetch(), SINGLE)
    assert [seen.range for seen in stub.blob_requests()] == [None, "bytes=7000-"]
    assert sum(seen.sent for seen in stub.blob_requests()) == len(WEIGHTS)


@pytest.mark.parametrize("resets", [False, True], ids=["end", "reset"])
def test_a_connection_that_always_breaks_is_resumed_by_the_next_run(stub, fetch, resets):
    stub.repositories[NAME].commit(SHARDED)
    stub.cuts[SHARD_NAMES[1]] = (7000, math.inf)
    stub.resets = resets
    result = fetch()
    assert_error(
        result,
        "hub org/tiny at main could not be fetched (",
        "run the same command again: the download goes on where it stopped",
        kind="MinifuseError",
    )
    result = fetch(HF_HUB_OFFLINE="1")
    assert_error(result, f"is half downloaded, without {', '.join(SHARD_NAMES[1:])}, in the cache")
    assert_error(result, "HF_HUB_OFFLINE forbids to fetch it: unset it")
    before = len(stub.seen)
    stub.cuts.clear()
    assert_snapshot(fetch(), SHARDED)
    again = [seen for seen in stub.seen[before:] if seen.path.startswith("/blobs/")]
    assert [seen.range for seen in again] == ["bytes=7000-", None]
    total = sum(len(SHARDED[name]) for name in SHARD_NAMES)
    assert sum(seen.sent for seen in stub.blob_requests()) == total


def test_a_server_that_ignores_ranges_is_taken_from_the_start(stub, fetch):
    stub.repositories[NAME].commit(SINGLE)
    stub.ignores_range = True
    stub.cuts["model.safetensors"] = (7000, 1)
    assert_snapshot(fetch(), SINGLE)


def test_content_of_another_hash_is_refused_and_not_kept(stub, fetch, tmp_path):
    commit = stub.repositories[NAME].commit(SINGLE)
    blobs = tmp_path / "hf/hub/models--org--tiny/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part").write_bytes(bytes(7000))
    result = fetch()
    assert_error(result, "model.safetensors of hub org/tiny", "SHA-256", kind="CheckpointError")
    assert commit in result["message"]
    assert_snapshot(fetch(), SINGLE)


def test_an_interrupted_download_is_resumed(stub, fetch, environ, tmp_path):
    stub.repositories[NAME].commit(SINGLE)
    stub.cuts["model.safetensors"] = (17_000, 1)
    stub.stalls = True
    command = [sys.executable, "-c", CLIENT, NAME]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    blobs = tmp_path / "hf/hub/models--org--tiny/blobs"
    partial = blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part"
    # What the client still buffers is not on the disk.
    wait_for(lambda: partial.exists() and partial.stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    kept = partial.stat().st_size
    assert 0 < kept <= 17_000
    assert_snapshot(fetch(), SINGLE)
    assert [seen.range for seen in stub.blob_requests()] == [None, f"bytes={kept}-"]


def wait_for(condition) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_two_processes_at_once_fetch_each_byte_once(stub, fetch, environ):
    stub.repositories[NAME].commit(SHARDED)
    command = [sys.executable, "-c", CLIENT, NAME]
    both = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        stdout, _ = process.communicate()
        assert_snapshot(json.loads(stdout), SHARDED)
    assert len(stub.blob_requests()) == 3


def test_a_full_disk(stub, fetch):
    stub.repositories[NAME].commit(SINGLE)
    result = fetch(FILE_LIMIT="9000")
    assert_error(result, "the disk of the cache", "is full (File too large)", kind="MinifuseError")
    assert_error(result, "make room and run the same command again", kind="MinifuseError")
    assert_snapshot(fetch(), SINGLE)
    assert stub.blob_requests()[1].range == "bytes=9000-"


def test_too_little_room_is_seen_before_the_download(stub, fetch):
    stub.repositories[NAME].commit(SINGLE)
    stub.claimed_size = 10**16
    result = fetch()
    assert_error(result, "org/tiny takes another 10,000,000.0 GB", kind="MinifuseError")
    assert_error(result, "B free: make room, or set HF_HOME", kind="MinifuseError")
    assert not stub.blob_requests()


def test_a_cache_that_cannot_be_written(stub, fetch, tmp_path):
    stub.repositories[NAME].commit(SINGLE)
    (tmp_path / "file").touch()
    result = fetch(HF_HOME=str(tmp_path / "file"))
    assert_error(result, f"the cache {tmp_path}/file/hub cannot be used", kind="MinifuseError")
    assert_error(result, "set HF_HOME to a folder that can be written", kind="MinifuseError")


def test_a_file_outside_of_the_cache_does_not_blame_the_cache(fetch, tmp_path):
    token = tmp_path / "token"
    token.mkdir()
    for name, parts in {
        "SSL_CERT_FILE": ["a file that the settings name is missing; look at SSL_CERT_FILE"],
        "HF_TOKEN_PATH": ["could not be fetched (", "Is a directory"],
    }.items():
        path = token if name == "HF_TOKEN_PATH" else tmp_path / "nowhere.pem"
        result = fetch(**{name: str(path), "HF_ENDPOINT": "https://127.0.0.1:9"})
        assert_error(result, "hub org/tiny at main", *parts, kind="MinifuseError")
        assert "cannot be used" not in result["message"]


def test_where_the_cache_lies(stub, fetch, tmp_path):
    stub.repositories[NAME].commit(SINGLE)
    assert fetch(HF_HOME=str(tmp_path / "a"))["folder"].startswith(f"{tmp_path}/a/hub/")
    assert fetch(HF_HUB_CACHE=str(tmp_path / "b"))["folder"].startswith(f"{tmp_path}/b/models--")


@pytest.mark.parametrize("is_stored", [False, True])
def test_the_token_goes_to_the_hub_alone(stub, fetch, tmp_path, is_stored):
    stub.repositories[NAME] = Repository(token="hf_good")
    stub.repositories[NAME].commit(SINGLE)
    if is_stored:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/token").write_text("hf_good")
        result = fetch()
    else:
        result = fetch(HF_TOKEN="hf_good")
    assert_snapshot(result, SINGLE)
    to_hub = {seen.authorization for seen in stub.seen if f"/{NAME}" in seen.path}
    assert to_hub == {"Bearer hf_good"}
    assert {seen.authorization for seen in stub.blob_requests()} == {None}


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_good"}], ids=["stranger", "known"])
def test_missing_or_private(stub, fetch, token):
    result = fetch("org/nowhere", **token)
    assert_error(result, f"hub org/nowhere at main does not exist on {stub.url} or is private")
    assert_error(result, "check its spelling", "set HF_TOKEN or run: hf auth login")


def test_token_that_is_refused(stub, fetch):
    stub.repositories[NAME].commit(SINGLE)
    result = fetch(HF_TOKEN="hf_old")
    assert_error(result, "refuses the token", "is invalid or has expired", "/settings/tokens")


@pytest.mark.parametrize("token", [{}, {"HF_TOKEN": "hf_good"}], ids=["stranger", "known"])
def test_gated(stub, fetch, token):
    stub.repositories[NAME] = Repository(granted={"hf_friend"})
    stub.repositories[NAME].commit(SINGLE)
    assert_error(fetch(**token), f"is gated: ask for access at {stub.url}/{NAME}", "hf auth login")
    stub.known_tokens.add("hf_friend")
    assert_snapshot(fetch(HF_TOKEN="hf_friend"), SINGLE)


def test_missing_revision(stub, fetch):
    stub.repositories[NAME].commit(SINGLE)
    result = fetch(f"{NAME}@v9")
    assert_error(result, "hub org/tiny at v9: the repository has no such revision", "a branch, a")


@pytest.mark.parametrize("start", ["/api/", f"/{NAME}/resolve/"], ids=["listing", "file"])
@pytest.mark.parametrize(
    ("status", "headers", "kind", "parts"),
    [
        (
            403,
            {"X-Error-Message": "This token may not"},
            "ModelNotFoundError",
            ["is forbidden to this account or token (This token may not): give the token read"],
        ),
        (429, {}, "MinifuseError", ["answers 429: too many requests", "wait some minutes"]),
        (500, {}, "MinifuseError", ["answers 500, an error of its own", "wait some minutes"]),
        (503, {}, "MinifuseError", ["answers 503, an error of its own", "wait some minutes"]),
        (418, {}, "MinifuseError", ["answers 418 for hub org/tiny at main"]),
    ],
)
def test_refusals(stub, fetch, start, status, headers, kind, parts):
    stub.repositories[NAME].commit(SINGLE)
    stub.refusals[start] = (status, headers)
    assert_error(fetch(), *parts, kind=kind)


@pytest.mark.parametrize(
    ("status", "headers", "kind", "part"),
    [
        (403, {}, "MinifuseError", "answers 403: the address that the hub gave has expired, or"),
        (401, {}, "MinifuseError", "answers 401 for hub org/tiny at main ("),
        (404, {}, "MinifuseError", "answers 404 for hub org/tiny at main ("),
        (429, {}, "MinifuseError", "answers 429: too many"),
        (503, {}, "MinifuseError", "answers 503, an error of its own"),
        (418, {}, "MinifuseError", "answers 418 for hub org/tiny at main ("),
        (403, {"X-Error-Code": "GatedRepo"}, "ModelNotFoundError", "is gated: ask for access"),
    ],
)
def test_refusals_of_the_host_that_keeps_the_content(stub, fetch, status, headers, kind, part):
    stub.repositories[NAME].commit(SINGLE)
    stub.signature = "?Signature=secret&Key-Pair-Id=secret"
    stub.refusals["/blobs/"] = (status, headers)
    result = fetch(HF_TOKEN="hf_good")
    assert_error(result, part, kind=kind)
    assert "secret" not in result["message"]
    if kind == "MinifuseError":
        assert "localhost" in result["message"]
        for words in (stub.url, "this account", "is private", "HF_TOKEN"):
            assert words not in result["message"]
    stub.refusals.clear()
    assert_snapshot(fetch(), SINGLE)


def test_a_password_in_the_endpoint_is_not_printed(stub, fetch):
    endpoint = stub.url.replace("//", "//jane:12@3456@")
    stub.repositories[NAME].commit(SINGLE)
    stub.refusals["/api/"] = (418, {})
    assert_error(fetch(HF_ENDPOINT=endpoint), f"{stub.url} answers 418", kind="MinifuseError")
    stub.refusals["/api/"] = (404, {})
    results = [fetch(HF_ENDPOINT=endpoint)]
    assert_error(results[0], f"does not exist on {stub.url} or is private")
    stub.stop()
    results.append(fetch(HF_ENDPOINT=endpoint))
    assert_error(results[1], f"{stub.url} cannot be reached (")
    for result in results:
        assert "jane" not in result["message"]
        assert "3456@" not in result["message"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("at 'https://u:p@h.co/a/b?X=1&S=2' (x?)", "at 'https://h.co/a/b' (x?)"),
        ("https://h.co?t=1 and http://u@h.co/@me", "https://h.co and http://h.co/@me"),
        ("no address: a@b/c?d", "no address: a@b/c?d"),
    ],
)
def test_secrets_in_addresses(text, wanted):
    assert hub._told(ValueError(text)) == wanted
    assert hub._told(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            JSON,
            ["holds neither model.safetensors nor model.safetensors.index.json; minifuse reads"],
        ),
        (
            JSON | {"pytorch_model-00001-of-00002.bin": b"", "x.gguf": b""},
            ["it has pytorch_model.bin: download", "python -m tools.convert_weights"],
        ),
        (JSON | {"b.gguf": b"", "a-Q8_0.gguf": b""}, ["it has a-Q8_0.gguf: download it"]),
        ({k: v for k, v in SINGLE.items() if k != "config.json"}, ["holds no config.json"]),
        ({k: v for k, v in SINGLE.items() if k != "tokenizer.json"}, ["holds no tokenizer.json"]),
    ],
    ids=["no weights", "bin", "gguf", "no config", "no tokenizer"],
)
def test_repositories_that_lack_a_file(stub, fetch, files, parts):
    stub.repositories[NAME].commit(files)
    assert_error(fetch(), "hub org/tiny at main", *parts)
    assert not stub.files_sent()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[", "is no index of shards"),
        (b'{"weight_map": [1]}', "is no index of shards"),
        (b'{"weight_map": {"a": "../../x"}}', "is no index of shards (it names ../../x)"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which the"),
    ],
)
def test_an_index_that_is_none(stub, fetch, index, message):
    stub.repositories[NAME].commit(SHARDED | {"model.safetensors.index.json": index})
    assert_error(fetch(), message, kind="CheckpointError")
    assert_error(fetch(), message, kind="CheckpointError")


def test_offline_and_not_cached(stub, fetch, tmp_path):
    result = fetch(HF_HUB_OFFLINE="1")
    assert_error(result, f"hub org/tiny at main is not in the cache {tmp_path}/hf/hub")
    assert_error(result, "HF_HUB_OFFLINE forbids to fetch it")
    assert not stub.seen


def test_silence_is_found_out_in_time(fetch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, black_hole() as hole, Pool(2) as pool:
        urls = [f"http://127.0.0.1:{server.getsockname()[1]}" for server in (silent, hole)]
        results = pool.map(lambda url: fetch(HF_ENDPOINT=url), urls)
        for url, result in zip(urls, results, strict=True):
            assert_error(result, f"{url} cannot be reached (", "connect, or correct HF_ENDPOINT")
            assert_error(result, f"hub org/tiny at main is not whole in the cache {tmp_path}/hf")
            assert 1 < result["seconds"] < 10


@contextlib.contextmanager
def black_hole():
    """An address that does not even answer the wish to connect: the queue before it is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server


def test_a_closed_port_is_found_out_at_once(fetch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = fetch(HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert_error(result, "cannot be reached (", "Connection refused")
    assert result["seconds"] < 5


def test_a_name_that_does_not_resolve(fetch):
    result = fetch(HF_ENDPOINT="http://hub.invalid")
    assert_error(result, "http://hub.invalid cannot be reached (")
    assert result["seconds"] < 10


def test_settings_that_the_library_refuses(fetch):
    result = fetch(HF_ENDPOINT="http://[")
    assert_error(result, "look at the variables HF_*", kind="MinifuseError")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "nonsense"])
def test_an_endpoint_that_is_none(fetch, endpoint):
    assert_error(fetch(HF_ENDPOINT=endpoint), f"{endpoint} cannot be reached (", "HF_ENDPOINT")


def test_an_endpoint_that_is_no_hub(stub, fetch):
    stub.refusals["/api/"] = (200, {"Content-Type": "text/html"})
    assert_error(fetch(), f"{stub.url} cannot be reached (", "correct HF_ENDPOINT")


def test_releases_of_the_library_that_nobody_has_seen_are_not_installed():
    """Because more of it is called than what it documents."""
    raw = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    (wanted,) = [name for name in raw["project"]["dependencies"] if name.startswith("hugging")]
    limit = int(wanted.partition("<")[2])
    assert int(hub.hub_library().__version__.partition(".")[0]) == limit - 1


def test_patience_ends_whatever_the_call_waits_for():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        hub.within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - start < 2
    with pytest.raises(ZeroDivisionError):
        hub.within(1, lambda: 1 / 0)


LOAD = """
import sys, torch
from minifuse.loader import load_model
fetched, local = load_model("org/tiny"), load_model(sys.argv[1])
torch.testing.assert_close(fetched.params, local.params, rtol=0, atol=0)
assert fetched.config == local.config
print(fetched.name, fetched.source, fetched.tokenizer.encode("tokens", is_start=True), sep="|")
"""


def test_a_model_is_loaded_by_its_hub_id(stub, environ, tmp_path):
    folder = write_hub_folder(tmp_path / "m", make_model("llama"), max_shard_size="100KB")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = stub.repositories[NAME].commit(files)
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, source, ids = done.stdout.strip().split("|")
    assert name == NAME
    assert source == f"hub org/tiny at main, commit {commit}"
    assert ids.startswith("[")


REFUSED = """
import sys
from minifuse.convert import convert
from minifuse.errors import MinifuseError
from minifuse.loader import load_model
try:
    load_model("org/tiny") if len(sys.argv) == 1 else convert("org/tiny", sys.argv[1])
except MinifuseError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "'mixtral', a mixture of experts"),
        ({"vocab_size": 2 * 10**9}, r"weights take .* GB free; choose a smaller model"),
    ],
)
def test_what_cannot_run_is_refused_before_its_weights_come(stub, environ, changes, message):
    assert_refused_early(stub, environ, changes, message)


def test_what_cannot_be_converted_is_refused_before_its_weights_come(stub, environ, tmp_path):
    target = tmp_path / "out"
    assert_refused_early(stub, environ, {"model_type": "mixtral"}, "'mixtral', a mix", str(target))
    assert not target.exists()


def assert_refused_early(stub, environ, changes, message, *arguments):
    config = make_model("llama").config.to_dict() | {"dtype": "float32"} | changes
    stub.repositories[NAME].commit(SINGLE | {"config.json": json.dumps(config).encode()})
    command = [sys.executable, "-c", REFUSED, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert re.search(message, done.stdout)
    assert not [seen for seen in stub.seen if seen.path.endswith("model.safetensors")]


@pytest.mark.parametrize(
    ("sha", "lfs"), [("../../x", "0" * 64), ("0" * 40, "../../.bashrc"), (None, "0" * 64)]
)
def test_hashes_that_are_paths_are_refused(sha, lfs):
    """They become names in the cache: a hub that is none must not choose where files go."""
    file = SimpleNamespace(lfs=SimpleNamespace(sha256=lfs))
    with pytest.raises(CheckpointError, match="for a hash; wanted hex digits: correct HF_ENDPOINT"):
        hub.checked_info(SimpleNamespace(sha=sha, siblings=[file]))
