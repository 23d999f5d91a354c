"""Text to token ids and back, on the `tokenizers` package alone.

What a user writes never becomes a control token: text is encoded by a second tokenizer that has
neither added tokens nor the vocabulary entries that they own. Pieces of a prompt are encoded one
by one and joined as ids, so only the first piece of a sequence may get the space that
SentencePiece puts in front of a text.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from minifuse.errors import CheckpointError, UsageError, one_line
from minifuse.files import read_json

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Parts of a tokenizer, and where they hold others.
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_STEPS_IN_STEPS = {"normalizers", "pretokenizers", "processors", "decoders"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A hub tokenizer, split into plain encoding and decoding.

    bos_ids:     what the tokenizer itself puts before a text; `encode` leaves it out
    control_ids: ids of special and other added tokens; `encode` never returns one
    vocab_size:  largest id + 1, added tokens included
    """

    def __init__(self, raw: dict, config: dict | None = None):
        """Build from a parsed tokenizer.json and, where there is one, tokenizer_config.json.

        raises: CheckpointError where `tokenizers` cannot build it.
        """
        raw = _without_truncation(raw)
        self._full = _build(raw)
        _check_steps(raw)
        _check_added_ids(self._full, raw.get("added_tokens") or [])
        _add_configured_tokens(self._full, config or {})
        added = self._full.get_added_tokens_decoder()
        controls = {token.content: id for id, token in added.items()}
        for content in _alphabet_tokens(raw["model"], controls):
            del controls[content]
        self.control_ids = frozenset(controls.values())
        self.bos_ids = _find_bos_ids(raw.get("post_processor"))
        self.vocab_size = max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        plain = _without_controls(raw, controls)
        self._start = _build(plain)
        inner = _without_prefix_space(plain)
        self._inner = self._start if inner == plain else _build(inner)
        self._is_prefixed_after_control = _prefixes_every_piece(raw)
        self._skipped = frozenset(id for id, token in added.items() if token.special)
        self._decoder = raw.get("decoder")

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, if it is there, `tokenizer_config.json`.

        raises: CheckpointError where a file is missing, unreadable or holds no tokenizer.
        """
        folder = Path(folder)
        raw = read_json(folder / TOKENIZER_FILE)
        config_path = folder / TOKENIZER_CONFIG_FILE
        config = read_json(config_path) if config_path.exists() else None
        try:
            return cls(raw, config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / TOKENIZER_FILE}: {error}") from None

    def encode(self, text: str, *, is_start: bool) -> list[int]:
        """Token ids of plain text; no BOS, no control tokens.

        is_start: the text opens its sequence, so a SentencePiece model may put its space before it
        raises:   UsageError for text that UTF-8 cannot hold.
        """
        check_text(text)
        if not text:
            return []
        ids = _encode(self._start if is_start else self._inner, text).ids
        if not self.control_ids.isdisjoint(ids):
            token = self._full.id_to_token(next(id for id in ids if id in self.control_ids))
            raise UsageError(f"text was encoded as the control token {token!r}; rephrase it")
        return ids

    def encode_template(self, text: str, *, is_start: bool) -> list[int]:
        """Token ids of what a chat template writes: its control tokens are control tokens.

        is_start: as in `encode`; inside a sequence, the text before the first control token gets
                  no space put in front
        returns:  no BOS but one that is written
        raises:   UsageError for text that UTF-8 cannot hold.
        """
        check_text(text)
        encoding = _encode(self._full, text)
        if is_start:
            return encoding.ids
        starts = (
            start
            for id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            if id in self.control_ids
        )
        lead_len = next(starts, len(text))
        rest = _encode(self._full, text[lead_len:]).ids
        return self.encode(text[:lead_len], is_start=False) + rest

    def is_start_after(self, text: str) -> bool:
        """Whether plain text after a template's text is encoded as if it opened its sequence.

        Some SentencePiece models put their space in front of every text between control tokens.
        """
        if not text:
            return True
        encoding = _encode(self._full, text)
        return bool(
            self._is_prefixed_after_control
            and encoding.ids
            and encoding.ids[-1] in self.control_ids
            and encoding.offsets[-1][1] == len(text)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out, spaces stay as they are."""
        with _named_failures("the tokenizer fails on token ids"):
            return self._full.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "Detokenizer":
        """A decoder for ids that come one by one."""
        return Detokenizer(self)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact content, control tokens included; None where it has none."""
        return self._full.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        """Content of a token, control tokens included; None where no token has the id."""
        return self._full.id_to_token(token_id)


class Detokenizer:
    """Turns ids that come one by one into text that is never taken back.

    `tokenizers.decoders.DecodeStream` has no end, so it loses what it holds back, and it lets the
    first byte tokens of a run out before the rest of the run can make them invalid. Here ids are
    decoded in a window that opens with tokens already written, because decoders treat the start
    of a text in their own way (they drop a leading space), and closes at the newest id.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._is_incremental = _is_incremental(tokenizer._decoder)
        self._has_byte_runs = "ByteFallback" in (
            step.get("type") for step in _flatten(tokenizer._decoder)
        )
        self._window: list[int] = []
        self._context_len = 0  # ids of the window whose text is out and complete
        self._written = ""  # the part of the window's text that is out

    def push(self, token_id: int) -> str:
        """Take the next id; returns the text that is certain now, and was not before."""
        token = self._tokenizer._full.id_to_token(token_id)
        if token is None or token_id in self._tokenizer._skipped:
            return ""
        self._window.append(token_id)
        if not self._is_incremental or (self._has_byte_runs and _BYTE_TOKEN.fullmatch(token)):
            return ""
        text = self._tokenizer.decode(self._window)
        certain = text.rstrip(_REPLACEMENT)
        fresh = certain[len(self._written) :]
        self._written = certain
        if certain == text:
            self._close_window()
        return fresh

    @property
    def pending(self) -> str:
        """Text that is held back, as it would read if no other id came."""
        return self._tokenizer.decode(self._window)[len(self._written) :]

    def finish(self) -> str:
        """The text that was held back; the stream starts anew afterwards."""
        rest = self.pending
        self._window, self._context_len, self._written = [], 0, ""
        return rest

    def _close_window(self) -> None:
        """Keep only the ids since the last closing, as the next window's context.

        They serve as context only if they have text: an empty start would let the decoder strip
        the space of the token after it.
        """
        tail = self._window[self._context_len :]
        tail_text = self._tokenizer.decode(tail)
        if tail_text:
            self._window, self._written = tail, tail_text
        self._context_len = len(self._window)


def check_text(text: str, name: str = "text") -> None:
    """Refuse what UTF-8 cannot hold.

    raises: UsageError that names the lone surrogate and its place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot encode; wanted valid Unicode text"
        ) from None


def _build(raw: dict) -> tokenizers.Tokenizer:
    with _named_failures("not a tokenizer that `tokenizers` can build"):
        built = tokenizers.Tokenizer.from_str(json.dumps(raw))
        built.encode("a", add_special_tokens=False)  # some are built, and panic at every text
    return built


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    with _named_failures("the tokenizer fails on a text"):
        return tokenizer.encode(text, add_special_tokens=False)


@contextlib.contextmanager
def _named_failures(what: str) -> Iterator[None]:
    """Whatever the package raises, which is nothing narrower than Exception; a panic of its Rust
    code is not even that.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {one_line(error)}") from None


def _without_truncation(raw: dict) -> dict:
    """Drop what a training run may have left in the file: cuts, padding and random merges."""
    model = raw.get("model")
    if not isinstance(model, dict):
        raise CheckpointError("not a tokenizer: it has no `model` object")
    return {**raw, "truncation": None, "padding": None, "model": {**model, "dropout": None}}


def _check_steps(raw: dict) -> None:
    """Refuse steps that are lists of bare values, which `tokenizers` takes for objects."""
    steps = [(name, raw.get(name)) for name in _STEPS]
    while steps:
        name, step = steps.pop()
        if step is None:
            continue
        if not isinstance(step, dict):
            raise CheckpointError(f"its {name} holds {type(step).__name__}; wanted an object")
        for inner in step.keys() & _STEPS_IN_STEPS:
            steps += [(name, each) for each in step[inner] or ()]


def _check_added_ids(full: tokenizers.Tokenizer, listed: list[dict]) -> None:
    """Refuse what `tokenizers` accepts with a shrug: an added token that ends up at another id."""
    for token in listed:
        content, id = token["content"], full.token_to_id(token["content"])
        if id != token["id"]:
            raise CheckpointError(
                f"added token {content!r} is listed with id {token['id']} but gets id {id}; wanted "
                "ids that go on from the vocabulary's"
            )


def _add_configured_tokens(full: tokenizers.Tokenizer, config: dict) -> None:
    """Mark as special what tokenizer_config.json alone calls so, as transformers does.

    A token without an id is passed over: the model has no row for it.
    """
    special, other = _configured_tokens(config)
    added = full.get_added_tokens_decoder().values()
    known = {token.content for token in added}
    full.add_special_tokens(
        [
            tokenizers.AddedToken(content, special=True, normalized=False)
            for content in sorted(special - {token.content for token in added if token.special})
            if full.token_to_id(content) is not None
        ]
    )
    full.add_tokens(
        [
            tokenizers.AddedToken(content, special=False, normalized=False)
            for content in sorted(other - special - known)
            if full.token_to_id(content) is not None
        ]
    )


def _configured_tokens(config: dict) -> tuple[set[str], set[str]]:
    """Contents of the special and of the other tokens that tokenizer_config.json names."""
    entries = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        if isinstance(value, dict):
            entries += value.values()
        elif isinstance(value, list):
            entries += value
    special: set[str] = set()
    other: set[str] = set()
    for entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and content:
            is_special = not isinstance(entry, dict) or entry.get("special", True)
            (special if is_special else other).add(content)
    return special, other


def _alphabet_tokens(model: dict, controls: Iterable[str]) -> list[str]:
    """Added tokens that ordinary text cannot do without: the unknown one, bytes, bare letters.

    A letter that has bytes to fall back on is not needed.
    """
    vocab = model.get("vocab")
    unknown = model.get("unk_token")
    if isinstance(vocab, list) and isinstance(model.get("unk_id"), int):
        unknown = vocab[model["unk_id"]][0]
    known = vocab if isinstance(vocab, dict) else {token for token, _ in vocab or ()}
    needed = re.compile(_BYTE_TOKEN.pattern if model.get("byte_fallback") else ".", re.DOTALL)
    return [
        content
        for content in controls
        if content == unknown or (needed.fullmatch(content) and content in known)
    ]


def _without_controls(raw: dict, controls: Iterable[str]) -> dict:
    """The same tokenizer with no added tokens, and with no way to reach their ids.

    Many base vocabularies list the control tokens too; a unigram model would even prefer them.
    """
    controls = frozenset(controls)
    model = dict(raw["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {t: id for t, id in model["vocab"].items() if t not in controls}
    elif isinstance(model.get("vocab"), list):
        # Ids are places in the list, so an entry is renamed to what nobody types.
        model["vocab"] = [
            [f"\0{token}\0" if token in controls else token, *rest]
            for token, *rest in model["vocab"]
        ]
    if model.get("merges"):
        prefix_len = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            merge for merge in model["merges"] if not _touches(merge, prefix_len, controls)
        ]
    return {**raw, "added_tokens": [], "post_processor": None, "model": model}


def _touches(merge: str | list[str], prefix_len: int, controls: frozenset[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return not controls.isdisjoint((left, right, left + right[prefix_len:]))


def _without_prefix_space(raw: dict) -> dict:
    """The same tokenizer for text inside a sequence: nothing is put before it."""
    return {
        **raw,
        "normalizer": _drop_prefix_space(raw.get("normalizer")),
        "pre_tokenizer": _drop_prefix_space(raw.get("pre_tokenizer")),
    }


def _drop_prefix_space(part: dict | None) -> dict | None:
    if part is None or part.get("type") == "Prepend":
        return None
    if part.get("type") == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [inner for inner in map(_drop_prefix_space, part[key]) if inner is not None]
        return {**part, key: kept}
    if part.get("type") == "Metaspace":
        rest = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return {**rest, "prepend_scheme": "never"}
    if part.get("type") == "ByteLevel" and "add_prefix_space" in part:
        return {**part, "add_prefix_space": False}
    return part


def _prefixes_every_piece(raw: dict) -> bool:
    """Whether a space is put in front of each piece between control tokens, not of the first only.

    Of what `_drop_prefix_space` drops, Metaspace's scheme `first` alone looks at the place.
    """
    parts = [raw.get("normalizer"), raw.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        kind = part.get("type")
        if kind == "Sequence":
            parts += part.get("normalizers") or part.get("pretokenizers") or []
        elif kind == "Metaspace":
            scheme = part.get("prepend_scheme", "always")
            if scheme == "always" and part.get("add_prefix_space", True):
                return True
        elif kind == "Prepend" or (kind == "ByteLevel" and part.get("add_prefix_space")):
            return True
    return False


def _find_bos_ids(processor: dict | None) -> tuple[int, ...]:
    """Ids that a post-processor puts before a text, read from its template.

    `add_bos_token` of tokenizer_config.json has no say: transformers, too, drops it where
    tokenizer.json is there. Read, not tried out: `tokenizers` panics over a faulty template.
    """
    if processor is None:
        return ()
    kind = processor.get("type")
    if kind == "Sequence":
        # `tokenizers` knows one template a sequence; the rest only move offsets.
        return next(filter(None, map(_find_bos_ids, processor["processors"])), ())
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],)
    if kind != "TemplateProcessing":
        return ()
    ids: list[int] = []
    for piece in processor["single"]:
        if "SpecialToken" not in piece:
            break
        name = piece["SpecialToken"]["id"]
        if name not in processor["special_tokens"]:
            raise CheckpointError(f"post_processor uses {name!r}, which its special_tokens lack")
        ids += processor["special_tokens"][name]["ids"]
    return tuple(ids)


def _flatten(part: dict | None) -> list[dict]:
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part["decoders"] for step in _flatten(inner)]
    return [part]


def _is_incremental(decoder: dict | None) -> bool:
    """Whether later ids leave the text of earlier ones as it is (but for unfinished characters)."""
    is_fused = False
    for step in _flatten(decoder):
        kind = step.get("type")
        if kind == "Replace":
            safe = not is_fused
        elif kind == "Strip":
            safe = not step.get("stop")
        else:
            safe = kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
        if not safe:
            return False
        is_fused = is_fused or kind in ("Fuse", "ByteLevel")
    return True
