"""What comes out of a request: answers as they grow, events, and finished generations."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from minifuse.layout import Part
from minifuse.normalize import normalize_answer
from minifuse.tokenizer import Detokenizer


@dataclass(frozen=True)
class LayoutEntry:
    """Which token ids of an answer's prompt lie where.

    part:      prefix, segment, suffix or answer
    index:     the segment's number; for suffix and answer the number of the stream, where an
               answer has several
    slots:     cache slot of each token; an answer's last token is never run and has none
    positions: (start, end) of the rotary positions
    """

    part: Part
    index: int | None
    slots: tuple[int, ...]
    positions: tuple[int, int]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Attribution:
    """What each segment did for one answer; numbers for segments stand in their order.

    prefix, segments, suffix, answer: shares of attention, which sum to one: means over layers,
             heads and generated tokens; of several streams by their weights
    without: nats by which the answer's log-probability changes when the segment is left out, the
             others' weights scaled up; None where nothing would be left
    alone:   the answer's log-probability behind each segment alone, in nats
    """

    prefix: float
    segments: tuple[float, ...]
    suffix: float
    answer: float
    without: tuple[float | None, ...]
    alone: tuple[float, ...]

    def to_json(self) -> dict:
        """The fields of a JSON result."""
        attention = {"prefix": self.prefix, "segments": list(self.segments)}
        attention |= {"suffix": self.suffix, "answer": self.answer}
        return {
            "attention": attention,
            "without": list(self.without),
            "alone": list(self.alone),
        }


@dataclass(frozen=True)
class Generation:
    """One answer of one method.

    text:           without the stop string
    token_ids:      through the token that completed a stop string; EOS is left out
    logprobs:       natural logarithms, one per token id, under the method's own distribution
    finish_reason:  "stop" (a stop string or EOS) or "length"
    prompt_tokens:  tokens that the answer's streams see, each stored one counted once
    weights:        of the segments, for weighted methods; `weights_source` is "given" or a signal
    timings:        load_s; compile_s of the call so far; prefill_ms and decode_ms of every step, of
                    which requests in flight at the same time each have an equal share
    recompiles:     graphs compiled outside of warm-up; 0 unless something is wrong
    attribution:    None where it was not asked for, or the answer has no token
    """

    method: str
    paraphrase_index: int | None
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int
    weights: tuple[float, ...] | None
    weights_source: str | None
    model: str
    source: str
    dtype: str
    quantize: str | None
    positions: str
    seed: int
    layout: tuple[LayoutEntry, ...]
    timings: dict
    recompiles: int
    attribution: Attribution | None = None

    def to_json(self, id: str | int | None = None) -> dict:
        """The fields of a JSON result, in their order; attribution where there is one."""
        weights = None
        if self.weights is not None:
            weights = {"source": self.weights_source, "values": list(self.weights)}
        fields = {
            "id": id,
            "method": self.method,
            "paraphrase_index": self.paraphrase_index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": list(self.logprobs),
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "weights": weights,
            "model": self.model,
            "source": self.source,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "positions": self.positions,
            "seed": self.seed,
            "timings": self.timings,
            "recompiles": self.recompiles,
        }
        return fields | ({"attribution": self.attribution.to_json()} if self.attribution else {})


@dataclass(frozen=True)
class StreamEvent:
    """One token of one method's answer; `vote` sends one event, its text, when all is done.

    text: what is certain by now: neither half a character nor what may become a stop string.
          The texts of an answer's events join to its final text.
    """

    method: str
    paraphrase_index: int | None
    token_id: int | None
    text: str
    logprob: float | None
    finish_reason: str | None


@dataclass
class TextBuilder:
    """An answer's tokens, its text so far, and why it ended.

    An EOS token ends the answer and is kept out of it; a stop string may span tokens.
    """

    detokenizer: Detokenizer
    stop: Sequence[str]
    eos_token_ids: Collection[int]
    max_new_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    _sent: int = 0

    def push(self, token_id: int, logprob: float) -> str:
        """Add a token; the text that became certain with it."""
        if token_id in self.eos_token_ids:
            return self._finish("stop")
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        searched = self._search_start()
        self.text += self.detokenizer.push(token_id)
        # Held-back text counts too: SentencePiece keeps a newline back until its run of byte
        # tokens ends.
        if self._cut_at_stop(self.text + self.detokenizer.pending, searched):
            return self._send(len(self.text))
        if len(self.token_ids) == self.max_new_tokens:
            return self._finish("length")
        return self._send(len(self.text) - self._held_back())

    def _finish(self, reason: str) -> str:
        searched = self._search_start()
        self.text += self.detokenizer.finish()
        if not self._cut_at_stop(self.text, searched):
            self.finish_reason = reason
        return self._send(len(self.text))

    def _search_start(self) -> int:
        """How far back a stop string that ends in new text can begin."""
        return max(0, len(self.text) - max(map(len, self.stop), default=0) + 1)

    def _cut_at_stop(self, text: str, searched: int) -> bool:
        found = [at for at in (text.find(s, searched) for s in self.stop) if at >= 0]
        if not found:
            return False
        self.text = text[: min(found)]
        self.finish_reason = "stop"
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self.text), max(map(len, self.stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0

    def _send(self, end: int) -> str:
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def pick_winner(answers: Sequence[TextBuilder]) -> int:
    """The index of the answer that the majority gives, compared after normalisation.

    Empty answers have no vote unless all are empty. Ties go to the group with the highest mean
    log-probability per token, and in a group that same measure picks the wording; what is still
    equal goes by the text, so that the order of the paraphrases never matters.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, answer in enumerate(answers):
        groups[normalize_answer(answer.text)].append(index)
    if len(groups) > 1:
        groups.pop("", None)

    def confidence(index: int) -> float:
        logprobs = answers[index].logprobs
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")

    def rank(name: str) -> tuple:
        members = groups[name]
        return len(members), sum(map(confidence, members)) / len(members), name

    return max(groups[max(groups, key=rank)], key=lambda i: (confidence(i), answers[i].text))
