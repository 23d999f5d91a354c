"""Chat templates: what a model's own template writes before and after a user's message.

The template is rendered once per model, in another process (`sandbox`), around probes; what the
user says never goes through it. What it writes before the message opens every prompt, what it
writes after it opens every answer. Its text is encoded with control tokens, the user's without.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from minifuse.errors import CheckpointError, UsageError, one_line
from minifuse.files import read_json
from minifuse.tokenizer import TOKENIZER_CONFIG_FILE, Tokenizer, check_text

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
LEGACY_TEMPLATE_FILE = "chat_template.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

# The largest of the templates that llama.cpp collects has 17 kB.
MAX_TEMPLATE_BYTES = 2**20
MAX_RENDERED_CHARS = 2**18
# A rendering takes a tenth of a second and fits into 32 MiB. The clock is for platforms that limit
# no CPU time, and for machines with much else to do.
CPU_SECONDS = 5
WALL_SECONDS = 30
MEMORY_BYTES = 2**28

# Python needs these to start where it was built or moved in an unusual way; the rest is withheld.
_KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_SCRIPT = Path(__file__).with_name("sandbox.py")
# Other keys that end alike may be settings, such as add_bos_token.
_TOKEN_NAMES = frozenset(
    f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_GIVEN_VARIABLES = ("messages", "add_generation_prompt", "tools", "documents")

_USER = "minifuse:user-message"
_SYSTEM = "minifuse:system-message"
# A template must hand on whatever a user may write.
_VERBATIM = 'Q:  {{ x }} {% y %}\n\n\t"it\'s" <b>&amp;</b> \\n \u00c9\u00df\u6771 \U0001f600 ...'
# Newline, space and tab each stand at an end once: a template that strips one of them alone shows.
_PADS = ("\n \u00a0\t", " \n\u3000\r\n", "\t\n  ")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the texts of special tokens that it may use as variables.

    source: the file it was read from, for messages
    tokens: variable name -> text, as in bos_token -> <s>
    """

    text: str
    source: str = "the chat template"
    tokens: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChatFrame:
    """What a template writes around a user's message.

    strips_start, strips_end: whether it strips the message there
    system:      the system message as it was given; empty where there is none
    system_span: the characters of head that are the system message, None where the template
                 rewrote it or there is none
    """

    head: str
    tail: str
    strips_start: bool
    strips_end: bool
    system: str = ""
    system_span: tuple[int, int] | None = None

    def trim(self, text: str, *, is_start: bool = True, is_end: bool = True) -> str:
        """A message, or the part that opens or closes one, as the template would put it down."""
        if is_start and self.strips_start:
            text = text.lstrip()
        if is_end and self.strips_end:
            text = text.rstrip()
        return text


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of a model in hub layout; None where it has none.

    A file of its own wins over tokenizer_config.json, and that over the legacy
    chat_template.json, which transformers reads for processors alone.

    raises: CheckpointError where a file is unreadable, too large or holds something else.
    """
    folder = Path(folder)
    config_path = folder / TOKENIZER_CONFIG_FILE
    config = read_json(config_path) if config_path.exists() else {}
    legacy_path = folder / LEGACY_TEMPLATE_FILE
    path, text = config_path, None
    files = _template_files(folder)
    if files:
        path = files.get("default", folder / TEMPLATE_FOLDER)
        text = _read_template(_pick_default(files, path))
    elif config.get("chat_template") is not None:
        text = _template_of(config["chat_template"], path)
    elif legacy_path.exists():
        path = legacy_path
        _check_size(legacy_path)
        value = read_json(legacy_path).get("chat_template")
        text = None if value is None else _template_of(value, legacy_path)
    if text is None:
        return None
    _check_template_text(text, path)
    return ChatTemplate(text, str(path), _read_tokens(folder, config, config_path))


def render_frame(
    template: ChatTemplate | None,
    *,
    system: str | None = None,
    variables: Mapping[str, object] | None = None,
) -> ChatFrame:
    """Find what a template writes before and after a user's message.

    system:    a system message, opening the conversation
    variables: whatever else the template asks for, such as {"enable_thinking": False}
    raises:    UsageError where there is no template, or where it refuses or ignores what is asked
               for, CheckpointError where it is faulty.
    """
    if template is None:
        raise UsageError(
            "the model has no chat template; leave the chat option out, or take a model that was "
            "tuned for chat (its folder has chat_template.jinja, or a chat_template in "
            "tokenizer_config.json)"
        )
    variables = _check_variables(variables or {})
    if system is not None:
        check_text(system, "the system message")
    padded = [pad + _USER + pad[::-1] for pad in _PADS]
    probes = [(system, _USER), (system, _VERBATIM), *((system, text) for text in padded)]
    if system is not None:
        probes.append((_SYSTEM, _USER))
    tokens = dict(template.tokens)
    contexts = [tokens | variables | _conversation(*probe) for probe in probes]
    plain, verbatim, *rendered = _render(template, contexts)
    head, tail = _split(template, plain)
    if verbatim != head + _VERBATIM + tail:
        raise CheckpointError(
            f"{template.source}: the chat template rewrites the user's message, or writes other "
            "text around other messages; wanted one that hands every message on as it is"
        )
    strips_start, strips_end = _find_strips(template, rendered[: len(_PADS)], head, tail)
    span = None
    if system is not None:
        span = _find_system(rendered[-1], system, head, tail)
    for part in (head, tail):
        _check_template_text(part, template.source)
    return ChatFrame(head, tail, strips_start, strips_end, system or "", span)


def encode_head(tokenizer: Tokenizer, frame: ChatFrame) -> list[int]:
    """Token ids of what stands before the user's message; control tokens are the template's own.

    raises: UsageError where a control token stands in the system message and the template
            rewrote that message, so that the two cannot be told apart.
    """
    written = tokenizer.encode_template(frame.system, is_start=False)
    if tokenizer.control_ids.isdisjoint(written):
        return tokenizer.encode_template(frame.head, is_start=True)
    if frame.system_span is None:
        token = tokenizer.token_of(next(id for id in written if id in tokenizer.control_ids))
        raise UsageError(
            f"the system message has the control token {token!r}, and the chat template rewrites "
            "the message; wanted one without control tokens"
        )
    start, end = frame.system_span
    before, system, after = frame.head[:start], frame.head[start:end], frame.head[end:]
    return [
        *tokenizer.encode_template(before, is_start=True),
        *tokenizer.encode(system, is_start=tokenizer.is_start_after(before)),
        *tokenizer.encode_template(after, is_start=False),
    ]


def encode_tail(tokenizer: Tokenizer, frame: ChatFrame) -> list[int]:
    """Token ids of what stands after the user's message."""
    return tokenizer.encode_template(frame.tail, is_start=False)


# Reading


def _template_files(folder: Path) -> dict[str, Path]:
    """Templates that have files of their own, by name."""
    own = folder / TEMPLATE_FILE
    files = {"default": own} if own.exists() else {}
    others = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return files | {path.name.removesuffix(".jinja"): path for path in others}


def _pick_default(templates: Mapping, path: Path) -> Any:
    if "default" not in templates:
        names = ", ".join(sorted(repr(name) for name in templates)) or "none"
        raise CheckpointError(
            f"{path}: of several chat templates none is called 'default'; there are: {names}"
        )
    return templates["default"]


def _check_size(path: Path) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if num_bytes > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{path} has {num_bytes:,} bytes; wanted a chat template of at most "
            f"{MAX_TEMPLATE_BYTES:,}"
        )


def _read_template(path: Path) -> str:
    _check_size(path)
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 (byte {error.start})") from None


def _template_of(value: object, path: Path) -> str:
    """The template in a JSON value: a text, or several of them with names."""
    if isinstance(value, list):
        named = {}
        for entry in value:
            name = entry.get("name") if isinstance(entry, dict) else None
            if not isinstance(name, str) or "template" not in entry:
                raise CheckpointError(
                    f"{path}: an entry of chat_template lacks its name or its template; wanted "
                    '{"name": ..., "template": ...}'
                )
            named[name] = entry["template"]
        value = _pick_default(named, path)
    elif isinstance(value, dict):
        value = _pick_default(value, path)
    if not isinstance(value, str):
        raise CheckpointError(
            f"{path}: chat_template holds {type(value).__name__}; wanted a text, or a list with "
            "names"
        )
    if len(value) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{path}: chat_template has {len(value):,} characters; wanted at most "
            f"{MAX_TEMPLATE_BYTES:,}"
        )
    return value


def _read_tokens(folder: Path, config: dict, config_path: Path) -> dict[str, str]:
    """Texts of the special tokens that have names.

    As in transformers, special_tokens_map.json is of older making: it has the last word unless
    tokenizer_config.json lists the added tokens.
    """
    sources = [(config_path, config)]
    map_path = folder / SPECIAL_TOKENS_FILE
    if "added_tokens_decoder" not in config and map_path.exists():
        sources.append((map_path, read_json(map_path)))
    tokens = {}
    for path, source in sources:
        entries = {key: value for key, value in source.items() if key.endswith("_token")}
        extra = source.get("extra_special_tokens")
        entries |= extra if isinstance(extra, dict) else {}
        for name, value in entries.items():
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[name] = text
            elif value is None:
                tokens.pop(name, None)
            elif name in _TOKEN_NAMES:
                raise CheckpointError(
                    f"{path}: {name} is {type(value).__name__}; wanted a text, or an object with "
                    "its content"
                )
    return tokens


def _check_template_text(text: str, path: Path | str) -> None:
    try:
        check_text(text)
    except UsageError as error:
        raise CheckpointError(f"{path}: in its chat template, {error}") from None


# Rendering


def _check_variables(variables: Mapping[str, object]) -> dict[str, object]:
    for name in _GIVEN_VARIABLES:
        if name in variables:
            raise UsageError(f"the template variable {name!r} is set by minifuse; leave it out")
    try:
        return json.loads(json.dumps(dict(variables)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"template variables must be JSON values: {error}") from None


def _conversation(system: str | None, user: str) -> dict[str, object]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    return {
        "messages": messages,
        "add_generation_prompt": True,
        "tools": None,
        "documents": None,
    }


def _render(template: ChatTemplate, contexts: list[dict]) -> list[str]:
    """Render in another process, whose time, memory and output are limited where the platform can.

    That Python could open any file that this one can: what keeps a template from it is Jinja's
    sandbox, which gives templates no way to files, modules or Python's own attributes.
    """
    request = {
        "paths": _find_packages("jinja2", "markupsafe"),
        "template": template.text,
        "contexts": contexts,
        "max_chars": MAX_RENDERED_CHARS,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES,
    }
    if not sys.executable:
        raise UsageError("this Python does not know its own executable, which chat templates need")
    kept = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
    try:
        done = subprocess.run(
            # Isolated, with no site-packages of its own: no .pth file and no sitecustomize runs.
            [sys.executable, "-I", "-S", "-B", str(_SCRIPT)],
            input=json.dumps(request).encode("ascii"),
            capture_output=True,
            env=kept,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _overrun(template, f"more than {WALL_SECONDS} seconds") from None
    except OSError as error:
        raise UsageError(f"{sys.executable} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise _death(template, done)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise _failure(template, answer["error"], one_line(answer["message"]))
    return answer["texts"]


def _find_packages(*names: str) -> list[str]:
    """Folders that packages are imported from, wherever this process found them."""
    folders = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UsageError(f"chat templates need the package {name}: pip install {name}")
        folders.append(str(Path(spec.origin).absolute().parents[1]))
    return list(dict.fromkeys(folders))


def _death(template: ChatTemplate, done: subprocess.CompletedProcess) -> CheckpointError:
    """Why a process ended without an answer."""
    if done.returncode == -getattr(signal, "SIGXCPU", 0):
        return _overrun(template, f"more than {CPU_SECONDS} seconds of CPU time")
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    last = one_line(lines[-1]) if lines else "it said nothing"
    return CheckpointError(
        f"{template.source}: the process that rendered the chat template ended with status "
        f"{done.returncode}: {last}"
    )


def _overrun(template: ChatTemplate, what: str) -> CheckpointError:
    return CheckpointError(
        f"{template.source}: the chat template took {what}; wanted one that ends"
    )


def _failure(template: ChatTemplate, kind: str, message: str) -> CheckpointError | UsageError:
    if kind == "refused":
        return UsageError(
            f"the model's chat template refuses the conversation: {message or 'no reason given'}"
        )
    what = {
        "syntax": f"has a syntax error: {message}",
        "security": f"does what a template may not: {message}",
        "memory": f"took more than {MEMORY_BYTES // 2**20} MiB of memory",
        "recursion": "calls itself without end, or is nested too deeply",
        "size": f"writes more than {MAX_RENDERED_CHARS:,} characters",
    }.get(kind, f"failed: {message}")
    return CheckpointError(f"{template.source}: the chat template {what}")


# Taking renderings apart


def _split(template: ChatTemplate, rendered: str) -> tuple[str, str]:
    head, *tails = rendered.split(_USER)
    if len(tails) == 1:
        return head, tails[0]
    problem = "repeats" if tails else "drops"
    raise CheckpointError(
        f"{template.source}: the chat template {problem} the user's message; wanted one that "
        "writes it once"
    )


def _find_strips(
    template: ChatTemplate, rendered: list[str], head: str, tail: str
) -> tuple[bool, bool]:
    """Whether white space is gone at the start and at the end, the same for every kind of it."""
    for strips_start, strips_end in product((False, True), repeat=2):
        expected = [
            head + ("" if strips_start else pad) + _USER + ("" if strips_end else pad[::-1]) + tail
            for pad in _PADS
        ]
        if rendered == expected:
            return strips_start, strips_end
    raise CheckpointError(
        f"{template.source}: the chat template strips some white space around the user's message "
        "and leaves other; wanted one that strips all or none"
    )


def _find_system(probed: str, system: str, head: str, tail: str) -> tuple[int, int] | None:
    """Where the system message stands in the head; `probed` has another one in its place."""
    if _SYSTEM not in probed:
        raise UsageError(
            "the model's chat template ignores system messages; put the text into the prefix"
        )
    before, *rest = probed.split(_SYSTEM)
    if len(rest) != 1 or not rest[0].endswith(_USER + tail):
        return None
    after = rest[0].removesuffix(_USER + tail)
    for text in (system, system.strip(), system.lstrip(), system.rstrip()):
        if head == before + text + after:
            return len(before), len(before) + len(text)
    return None
