"""One request on its way: its options, its texts as token ids, what it asks of the layout.

A `Job` says which segments, views and streams the methods of a request need, and in which order
they become known; it computes nothing. The engine runs it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from minifuse.chat import ChatFrame, encode_head, encode_tail
from minifuse.config import ChatConfig, FusionConfig, GenerationConfig
from minifuse.errors import MinifuseError, UsageError
from minifuse.executor import Copy, Token
from minifuse.layout import Encoding, PackedPrompt, Part, Prompt, Span, Stream, View
from minifuse.methods import (
    SPECS,
    Answer,
    FusionMethod,
    Sees,
    SegmentWeights,
    ViewRequest,
    Weighting,
    alone_answer,
    leave_out,
    make_answers,
    needs_weights,
    normalise_weights,
    parse_methods,
    single_view,
)
from minifuse.pool import Lease
from minifuse.results import Attribution, LayoutEntry, TextBuilder
from minifuse.tokenizer import Tokenizer


class FusionOptions(TypedDict, total=False):
    """What every call may say; defaults are those of `FusionConfig` and `ChatConfig`.

    chat: the user's message is prefix + segment, put into the model's chat template; `system` and
          `chat_variables` are for the template
    """

    methods: str | Iterable[str]
    positions: str
    beta: float
    balance: float | None
    chat: bool
    system: str | None
    chat_variables: Mapping[str, object] | None


class GenerationOptions(TypedDict, total=False):
    """How answers are drawn; defaults are those of `GenerationConfig`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: str | Sequence[str]
    seed: int


class Options(FusionOptions, GenerationOptions, total=False):
    """What a call that generates may say.

    attribution: find out what each segment did for every answer, see `results.Attribution`; one
                 more pass for each (default: False)
    """

    attribution: bool


@dataclass(frozen=True)
class Request:
    """One question in several phrasings; texts are taken verbatim.

    weights: one number per segment, or the signal to find them by; None for the default
    id:      what errors name it by
    """

    segments: Sequence[str]
    prefix: str = ""
    suffix: str = ""
    weights: Sequence[float] | str | None = None
    id: str | int | None = None


@dataclass(frozen=True)
class Plan:
    """What a call asks for, beside its requests; `chat` is None where no template is used."""

    methods: tuple[FusionMethod, ...]
    fusion: FusionConfig
    generation: GenerationConfig
    chat: ChatConfig | None
    attribution: bool = False

    @property
    def positions(self) -> Encoding:
        """How fused views find their segments: the setting `restart` reads them in place."""
        return Encoding.ALIGNED if self.fusion.positions == "aligned" else Encoding.ALONE


def make_plan(
    *,
    methods: str | Iterable[str] = (FusionMethod.FUSED,),
    positions: str = FusionConfig.positions,
    beta: float = FusionConfig.beta,
    balance: float | None = FusionConfig.balance,
    chat: bool = False,
    system: str | None = None,
    chat_variables: Mapping[str, object] | None = None,
    attribution: bool = False,
    **generation: Unpack[GenerationOptions],
) -> Plan:
    """Check and sort the options of a call.

    raises: UsageError for a bad value, TypeError for an option that does not exist.
    """
    for name, flag in (("chat", chat), ("attribution", attribution)):
        if not isinstance(flag, bool):
            raise UsageError(f"{name} is {flag!r}; wanted True or False")
    if not chat and (system is not None or chat_variables):
        name = "chat_variables" if system is None else "system"
        raise UsageError(f"{name} is for a chat template; wanted chat beside it")
    return Plan(
        parse_methods(methods),
        FusionConfig(positions=positions, beta=beta, balance=balance),
        GenerationConfig(**generation),
        ChatConfig(system, chat_variables or {}) if chat else None,
        attribution,
    )


@dataclass(frozen=True)
class Frame:
    """What stands around a user's message as token ids, and how its ends are to be treated.

    head_ids, tail_ids: before and after the message
    lead:               a space that the template writes right before the message; encoded with it,
                        since most vocabularies join the two
    starts_message:     the message is encoded as the start of a text
    starts_answer:      so is what opens the answer
    chat:               the template's frame; None where there is no template
    """

    head_ids: tuple[int, ...]
    tail_ids: tuple[int, ...] = ()
    lead: str = ""
    starts_message: bool = True
    starts_answer: bool = False
    chat: ChatFrame | None = None

    def trim(self, text: str, *, is_start: bool, is_end: bool) -> str:
        """A part of the message as the template would put it down."""
        return text if self.chat is None else self.chat.trim(text, is_start=is_start, is_end=is_end)


def make_frame(tokenizer: Tokenizer, chat: ChatFrame | None) -> Frame:
    """Encode what a chat template writes; without one, the BOS that the tokenizer itself adds."""
    if chat is None:
        return Frame(tokenizer.bos_ids)
    lead = " " if chat.head.endswith(" ") else ""
    bare = replace(chat, head=chat.head.removesuffix(lead))
    return Frame(
        head_ids=tuple(encode_head(tokenizer, bare)),
        tail_ids=tuple(encode_tail(tokenizer, chat)),
        lead=lead,
        starts_message=tokenizer.is_start_after(bare.head),
        starts_answer=bool(chat.tail) and tokenizer.is_start_after(chat.tail),
        chat=chat,
    )


class NotFiniteError(MinifuseError):
    """The model's scores for a prompt are not finite; the engine finds out why.

    prompts: token ids of each segment's plain prompt
    """

    def __init__(self, method: str, prompt: Prompt):
        super().__init__(f"{method}: the model's scores are not finite")
        self.prompts = [prompt.prefix_ids + ids + prompt.suffix_ids for ids in prompt.segment_ids]


@dataclass(eq=False)
class Line:
    """A stream's keys: the slots of the generated tokens that were run through the model.

    Answers share a line as long as they have the same view and the same tokens.
    """

    stream: Stream
    slots: list[int] = field(default_factory=list)


@dataclass
class AnswerState:
    """An answer while it is generated.

    lines:   one for each view
    weights: the answer's own, f32[R] on the device
    rows:    of `lines`, where their logits are among those of the step that is running
    attribution, attention: found when the whole job is done, where it is asked for; the latter is
             f32[L, n, P] of each stream (see `attribution`)
    """

    answer: Answer
    views: tuple[View, ...]
    lines: list[Line]
    builder: TextBuilder
    generator: torch.Generator | None
    weights: Tensor | None
    rows: list[int] = field(default_factory=list)
    attribution: Attribution | None = None
    attention: list[Tensor] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return self.builder.finish_reason is None

    def layout(self) -> tuple[LayoutEntry, ...]:
        """Prefix, segments and suffixes that it sees, then its own tokens, stream by stream."""
        seen = [span for view in self.views for span in (view.prefix, *view.segments) if span]
        entries = [_entry_of(span, span.index) for span in dict.fromkeys(seen)]
        several = len(self.views) > 1
        for number, view in enumerate(self.views):
            entries.append(_entry_of(view.suffix, number if several else None))
        token_ids = tuple(self.builder.token_ids)
        for number, line in enumerate(self.lines):
            start = line.stream.first_position
            positions = (start, start + len(token_ids))
            index = number if several else None
            # The last token was not run; what others who share the line went on with is theirs.
            slots = tuple(line.slots[: max(0, len(token_ids) - 1)])
            entries.append(LayoutEntry(Part.ANSWER, index, slots, positions, token_ids))
        return tuple(entries)


@dataclass(frozen=True)
class Extent:
    """How far a request can get: slots, labels, positions; views that answers start from."""

    slots: int
    labels: int
    positions: int
    views: int


@dataclass(eq=False)
class Job:
    """One request while it is answered.

    counts:        numbers of segments, from the first one on, that are asked with
    given_weights: for each count, normalised; None leaves them to `signal`
    weights:       for each count, once they are settled
    targets:       token ids of continuations to score, each answer's in `scores`
    extent:        set by `measure`
    lease:         where it lies in the pool, once it has been admitted
    prefill_ms, decode_ms: its share of the calls that ran it, and of every step
    consumers:     for every count and method the answers that it reads
    """

    prompt: Prompt
    plan: Plan
    counts: tuple[int, ...]
    given_weights: dict[int, tuple[float, ...]] | None
    signal: str
    packed: PackedPrompt
    weights: dict[int, SegmentWeights] = field(default_factory=dict)
    targets: tuple[tuple[int, ...], ...] = ()
    extent: Extent = Extent(1, 1, 0, 0)
    view_logits: dict[Span, Tensor] = field(default_factory=dict)
    consumers: dict[tuple[int, FusionMethod], tuple[Answer, ...]] = field(default_factory=dict)
    states: dict[Answer, AnswerState] = field(default_factory=dict)
    scores: dict[Answer, list[float]] = field(default_factory=dict)
    lines: dict[View, Line] = field(default_factory=dict)
    lease: Lease | None = None
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)

    @property
    def held(self) -> Lease:
        """Its lease, once it has been admitted."""
        assert self.lease is not None, "not admitted"
        return self.lease

    @property
    def num_segments(self) -> int:
        return len(self.prompt.segment_ids)

    @property
    def needs_signal(self) -> bool:
        """Whether weights have to be found: given ones serve all methods but `fused_auto`."""
        methods = self.plan.methods
        return needs_weights(methods, Weighting.FOUND) or (
            self.given_weights is None and needs_weights(methods, Weighting.CHOSEN)
        )

    @property
    def live(self) -> list[AnswerState]:
        return [state for state in self.states.values() if state.is_live]

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Every answer once, whatever the number of methods that read it."""
        return tuple(dict.fromkeys(a for group in self.consumers.values() for a in group))

    def place_segments(self) -> None:
        """Ask for every segment copy that the methods, or the search for weights, will read."""
        for method in self.plan.methods:
            spec = SPECS[method]
            for count in self.counts:
                for index in [0] if spec.sees is Sees.FIRST else range(count):
                    self.packed.segment(spec.encoding or self.plan.positions, index, count)
        if self.needs_signal:
            for index in range(self.num_segments):
                self.packed.segment(Encoding.ALONE, index)

    def place_signal_views(self) -> None:
        """Ask for the plain prompts whose next-token distributions are the signal, if any are."""
        if self.needs_signal and self.signal == "confidence":
            for index in range(self.num_segments):
                self.view(single_view(index))

    def set_weights(self, values: Tensor | None) -> None:
        """Settle all weights; `values` is the signal f32[N], None where it says nothing."""
        for count in self.counts:
            uniform = found = (1 / count,) * count
            if values is not None:
                scaled = self.plan.fusion.beta * values[:count].double()
                found = tuple(torch.softmax(scaled, 0).tolist())
            given = None if self.given_weights is None else self.given_weights[count]
            self.weights[count] = SegmentWeights(
                uniform=uniform,
                chosen=found if given is None else given,
                found=found,
                chosen_source=self.signal if given is None else "given",
                found_source=self.signal,
            )

    def place_views(self) -> None:
        """Ask for the views of all answers; the weights must be settled."""
        fusion = self.plan.fusion
        self.consumers = {
            (count, method): make_answers(
                method,
                self.weights[count],
                self.prompt.segment_ids[:count],
                self.plan.positions,
                fusion.balance,
            )
            for count in self.counts
            for method in self.plan.methods
        }
        for answer in self.answers:
            for request in answer.views:
                self.view(request)

    def make_trial(self, answer: Answer, token_ids: tuple[int, ...]) -> "Job":
        """The same request with an answer's tokens as its target, to be scored under that answer,
        without each segment, and behind each alone.

        Its layout goes on behind the request's own, which stays as it is.
        """
        packed = self.packed.copy()
        indices = range(self.num_segments)
        variants = [answer, *(leave_out(answer, i) for i in indices), *map(alone_answer, indices)]
        found = tuple(variant for variant in dict.fromkeys(variants) if variant is not None)
        trial = replace(
            self,
            packed=packed,
            targets=(token_ids,),
            consumers={(0, answer.method): found},
            view_logits=dict(self.view_logits),
        )
        for variant in trial.answers:
            for request in variant.views:
                trial.view(request)
        return trial

    def view(self, request: ViewRequest) -> View:
        return self.packed.view(request.encoding, request.indices, request.biases)

    def start_lines(self, views: Iterable[View]) -> list[Line]:
        """A line for each view, shared with all answers that start from it."""
        for view in views:
            if view not in self.lines:
                self.lines[view] = Line(self.packed.stream(view))
        return [self.lines[view] for view in views]

    def next_step(self) -> tuple[list[Token], list[Copy]]:
        """The last token of every live answer, once for each distinct line; takes their slots.

        Of answers that share a line and now part, the first keeps it. The others go on with
        copies of its keys, which have to be made before the tokens are run.
        """
        tokens: list[Token] = []
        copies: list[Copy] = []
        placed: dict[tuple[Line, int], tuple[Line, int]] = {}
        taken: set[Line] = set()
        for state in self.live:
            token_id, count = state.builder.token_ids[-1], len(state.builder.token_ids)
            state.rows = []
            for number, shared in enumerate(state.lines):
                if (shared, token_id) not in placed:
                    line = shared
                    if shared in taken:
                        line = self._fork(shared, count - 1, copies)
                    taken.add(line)
                    placed[shared, token_id] = line, len(tokens)
                    (slot,) = self.packed.take_slots(1)
                    line.slots.append(slot)
                    position = line.stream.first_position + count - 1
                    tokens.append(Token(token_id, position, slot, line.stream.label))
                state.lines[number], row = placed[shared, token_id]
                state.rows.append(row)
        return tokens, copies

    def _fork(self, line: Line, length: int, copies: list[Copy]) -> Line:
        """A line of its own that begins with copies of the first `length` keys of another."""
        fork = Line(self.packed.stream(line.stream.view), list(self.packed.take_slots(length)))
        for source, target in zip(line.slots[:length], fork.slots, strict=True):
            copies.append(Copy(source, target, 0, fork.stream.label))
        return fork

    def measure(self, max_positions: int) -> None:
        """Find the extent by laying out copies to the end; nothing is computed.

        raises: UsageError where an answer needs more than `max_positions`.
        """
        lengths = [len(token_ids) for token_ids in self.prompt.segment_ids]
        orders = [torch.tensor(lengths).argsort(stable=True).argsort()]
        if self.needs_signal:
            orders.append(torch.arange(len(lengths)))
        each = [self._extent_with(1.0 + order, max_positions) for order in orders]
        self.extent = Extent(*map(max, zip(*map(astuple, each), strict=True)))

    def _extent_with(self, ranks: Tensor, max_positions: int) -> Extent:
        """The extent if found weights, which are not known yet, are in this proportion.

        Uneven ones share the fewest views. The longest segment as the heaviest reaches furthest,
        wherever it stands; the last one of every count is in no other answer's place.

        ranks:  f32[N], all different
        raises: as `measure`
        """
        packed = PackedPrompt(self.prompt)
        dry = replace(self, packed=packed, weights={}, consumers={}, states={})
        dry.place_segments()
        dry.place_signal_views()
        dry.set_weights(math.copysign(1.0, self.plan.fusion.beta) * ranks.log())
        dry.place_views()
        new_tokens = max(self.plan.generation.max_new_tokens, *map(len, self.targets), 1)
        views = {dry.view(request).suffix for a in dry.answers for request in a.views}
        positions = 0
        for answer in dry.answers:
            for view in map(dry.view, answer.views):
                dry.packed.stream(view)
                dry.packed.take_slots(new_tokens)
                prompt_end = view.suffix.positions.stop
                positions = max(positions, prompt_end + new_tokens)
                if positions > max_positions:
                    raise UsageError(
                        f"{answer.method} needs {positions} positions: a prompt of "
                        f"{prompt_end} and {new_tokens} new tokens; the model has "
                        f"{max_positions}: shorten one or the other"
                    )
        slots, labels = dry.packed.num_slots, dry.packed.num_labels
        if self.plan.attribution:
            for answer in dry.answers:
                trial = dry.make_trial(answer, (0,) * new_tokens)
                views_of_trial = {trial.view(r).suffix for a in trial.answers for r in a.views}
                slots = max(slots, trial.packed.num_slots + len(views_of_trial) * new_tokens)
                labels = max(labels, trial.packed.num_labels + len(views_of_trial))
        return Extent(slots, labels, positions, len(views))


def make_job(
    tokenizer: Tokenizer,
    request: Request,
    plan: Plan,
    frame: Frame,
    counts: Sequence[int] | None = None,
) -> Job:
    """Check and encode a request.

    counts: numbers of segments to ask with; None for all alone
    raises: UsageError for texts, weights or counts that cannot be run.
    """
    prompt = encode_prompt(tokenizer, request, frame)
    num_segments = len(prompt.segment_ids)
    counts = (num_segments,) if counts is None else tuple(dict.fromkeys(counts))
    for count in counts:
        if not 1 <= count <= num_segments:
            raise UsageError(f"a count is {count}; wanted 1 to {num_segments}, the segments there")
    signal = plan.fusion.signal
    given = None
    if isinstance(request.weights, str):
        signal = FusionConfig(signal=request.weights).signal
    elif request.weights is not None:
        values = tuple(request.weights)
        normalise_weights(values, num_segments)
        given = {count: normalise_weights(values[:count], count) for count in counts}
    return Job(prompt, plan, counts, given, signal, PackedPrompt(prompt))


def encode_prompt(tokenizer: Tokenizer, request: Request, frame: Frame) -> Prompt:
    """Encode each text by itself; they are joined as token ids, never as text."""
    segments = request.segments
    if isinstance(segments, str) or not isinstance(segments, Sequence):
        raise UsageError(f"segments is {type(segments).__name__}; wanted a list of strings")
    if not segments:
        raise UsageError("segments is empty; wanted at least one paraphrase")
    named = {"prefix": request.prefix, "suffix": request.suffix}
    named |= {f"segment {number}": text for number, text in enumerate(segments, 1)}
    for name, text in named.items():
        if not isinstance(text, str):
            raise UsageError(f"{name} is {type(text).__name__}; wanted a string")
    prefix = frame.trim(request.prefix, is_start=True, is_end=False)
    is_start = frame.starts_message and not prefix
    segment_ids = []
    for number, text in enumerate(segments, 1):
        trimmed = frame.trim(text, is_start=not prefix, is_end=True)
        if not trimmed:
            raise UsageError(f"segment {number} is {text!r}, which is empty; wanted text")
        lead = "" if prefix else frame.lead
        token_ids = tuple(tokenizer.encode(lead + trimmed, is_start=is_start))
        if not token_ids:
            raise UsageError(f"segment {number} is {text!r}, which the tokenizer drops whole")
        segment_ids.append(token_ids)
    prefix_ids: Sequence[int] = ()
    if prefix:
        prefix_ids = tokenizer.encode(frame.lead + prefix, is_start=frame.starts_message)
    suffix_ids = tokenizer.encode(request.suffix, is_start=frame.starts_answer)
    return Prompt(
        (*frame.head_ids, *prefix_ids), tuple(segment_ids), (*frame.tail_ids, *suffix_ids)
    )


def encode_continuations(
    tokenizer: Tokenizer, continuations: Sequence[str]
) -> list[tuple[int, ...]]:
    """Token ids of texts to score.

    raises: UsageError where there is none, or an empty one.
    """
    if isinstance(continuations, str) or not continuations:
        raise UsageError(
            f"continuations is {continuations!r}; wanted a list of at least one string"
        )
    targets = []
    for number, text in enumerate(continuations, 1):
        if not isinstance(text, str) or not text:
            raise UsageError(f"continuation {number} is {text!r}; wanted text")
        targets.append(tuple(tokenizer.encode(text, is_start=False)))
    return targets


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Token ids given by a user.

    raises: UsageError where there is none, or one that the model does not have
    """
    for token_id in token_ids:
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise UsageError(
                f"a token id is {token_id!r}; wanted integers from 0 to {vocab_size - 1}"
            )
    if not token_ids:
        raise UsageError("continuation is empty; wanted text, or at least one token id")
    return tuple(token_ids)


def _entry_of(span: Span, index: int | None) -> LayoutEntry:
    positions = (span.positions.start, span.positions.stop)
    return LayoutEntry(span.part, index, tuple(span.slots), positions, span.token_ids)
