"""How likely gold answers are under many ways to fuse, side by side: to choose the defaults.

    python -m benchmarks.fusion_study --dataset pararel --data-dir DIR --half tune
        --output T.parquet
    python -m benchmarks.fusion_study --dataset pararel --data-dir DIR --half confirm
        --configs "fused,fused likelihood@1" --output C.parquet
    python -m benchmarks.fusion_study report T.parquet C.parquet

Prompts, items and shots are those of `python -m minifuse.evaluate`, and the measure is its
answer_logprob: the best gold answer's log-probability in nats, teacher-forced. The forward pass is
a plain dense one, since most of what is tried here the engine has no mechanism for; what both have
is checked against the engine in tests/test_fusion_study.py.

An item takes three passes behind the stored prefix: its segments; the single-segment views and the
plain fused view, which give the signals; then every other way to fuse, each a row of its own. All
that differs between two rows is data: a bias and a factor on the scores of each segment's keys.

Letters as in `minifuse.model`; besides, T tokens of a view (suffix, then the answers' tokens as a
tree), M nodes that predict something, Q pairs of a node and a token asked for, E ensembles.
"""

import argparse
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minifuse.command import Parser, add_model_flags, check_interrupt, run_command
from minifuse.errors import MinifuseError, UsageError
from minifuse.evaluation.datasets import Dataset, Item
from minifuse.evaluation.extras import import_extra
from minifuse.evaluation.flags import DATASET_METAVAR, add_dataset_flags, check_count, read_dataset
from minifuse.evaluation.prompts import (
    PromptBuilder,
    choose_draws,
    choose_items,
    choose_paraphrases,
    continuation_of,
    find_template,
    paraphrases_needed,
    read_template,
)
from minifuse.evaluation.statistics import resample_means
from minifuse.layout import Prompt
from minifuse.loader import LoadedModel, load_model
from minifuse.model import LayerParams, linear, mlp_block, rms_norm, unembed
from minifuse.request import Request, encode_continuations, encode_prompt, make_frame
from minifuse.rope import apply_rope, make_cos_sin, make_inv_freq

if TYPE_CHECKING:
    from pandas import DataFrame

# What is tried

Terms = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Fused:
    """One way to fuse: one stream that sees all segments.

    weights:   (signal, beta) pairs; w = softmax(sum of beta * signal), none for 1/N each
    positions: aligned or restart
    balance:   the segments weigh as N ** (1 - balance) prompts do: the bias is log(w) and that
    sharpness: factor on the scores of segment keys, before any bias
    keep:      only so many segments, the likeliest; weights are those among them
    within:    only segments whose likelihood is at most so many nats below the best one's
    layers:    all, or where the weights hold, late (from the middle on) or early; elsewhere
               segments weigh 1/N, or where there are no weights, have no bias
    split:     separate residual streams, one for each segment, in so many sixths of the layers;
               their weighted mean is the fused stream's from there on
    contrast:  exponent on a segment's attention mass, query by query and head by head, which the
               weights then scale; the total over segments stays. 0 makes masses equal to weights
    total:     factor on the log of the segments' total mass, query by query and head by head
    mixed:     the weighted mean of N attentions, each over one segment, prefix and view
    """

    weights: Terms = ()
    positions: str = "aligned"
    balance: float = 1.0
    sharpness: float = 1.0
    keep: int | None = None
    within: float | None = None
    layers: str = "all"
    split: int = 0
    contrast: float = 1.0
    total: float = 1.0
    mixed: bool = False

    @property
    def name(self) -> str:
        """`fused`, its weights, and every other field that is not the default."""
        parts = ["fused", *([name_terms(self.weights)] if self.weights else [])]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "weights" and value != entry.default:
                text = value if isinstance(value, str) else f"{value:g}"
                parts.append(f"{entry.name}={text}")
        return " ".join(parts)

    def lift(self, num_segments: int) -> float:
        """Nats on the scores of all segment keys."""
        return (1 - self.balance) * math.log(num_segments)

    @property
    def emphasis(self) -> "Fused":
        """What of it can be done to a single prompt as well: more attention to the segment."""
        return Fused(balance=min(self.balance, 1.0), sharpness=max(self.sharpness, 1.0))

    @property
    def is_regrouped(self) -> bool:
        """Whether segments are weighed by the mass that they have, query by query."""
        return self.mixed or self.contrast != 1 or self.total != 1


def name_terms(terms: Terms) -> str:
    """likelihood@1+confidence@0.5, for example."""
    return "+".join(f"{signal}@{beta:g}" for signal, beta in terms) or "uniform"


def _by(**betas: float) -> Terms:
    return tuple(betas.items())


LIKELIHOOD = _by(likelihood=1.0)
CONFIDENCE = _by(confidence=1.0)
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5)
SPLITS = (1, 2, 3, 4, 5)

WEIGHTINGS: tuple[Terms, ...] = (
    *(_by(likelihood=beta) for beta in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    *(_by(confidence=beta) for beta in (0.25, 0.5, 1.0, 2.0, 4.0)),
    *(
        _by(likelihood=one, confidence=other)
        for one, other in ((0.5, 0.5), (1.0, 0.5), (1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (4.0, 1.0))
    ),
    *(_by(agreement=beta) for beta in (0.5, 1.0, 2.0, 4.0)),
    *(_by(agreement_both=beta) for beta in (1.0, 2.0)),
    *(_by(likelihood=1.0, agreement=beta) for beta in (1.0, 2.0)),
    *(_by(mass=beta) for beta in (0.5, 1.0, 2.0)),
    *(_by(mass_late=beta) for beta in (0.5, 1.0, 2.0)),
    *(_by(likelihood_z=beta) for beta in (0.5, 1.0)),
    *(_by(confidence_z=beta) for beta in (0.5, 1.0)),
    *(_by(likelihood_range=beta) for beta in (1.0, 2.0)),
    _by(likelihood_z=0.5, confidence_z=0.5),
    *(_by(likelihood_sum=beta) for beta in (0.1, 0.3)),
    *(_by(top=beta) for beta in (0.5, 1.0)),
    *(_by(first=beta) for beta in (0.5, 1.0)),
    _by(likelihood=1.0, first=0.5),
)

CONFIGS: tuple[Fused, ...] = (
    Fused(),
    Fused(positions="restart"),
    *(Fused(balance=balance) for balance in BALANCES),
    *(Fused(positions="restart", balance=balance) for balance in BALANCES),
    *map(Fused, WEIGHTINGS),
    *(
        Fused(terms, positions="restart")
        for terms in (
            LIKELIHOOD,
            _by(likelihood=2.0),
            CONFIDENCE,
            _by(likelihood=1.0, confidence=1.0),
            _by(likelihood=2.0, confidence=1.0),
        )
    ),
    *(
        Fused(terms, sharpness=factor)
        for factor in (0.7, 0.8, 0.9, 1.1, 1.25, 1.5)
        for terms in ((), LIKELIHOOD)
    ),
    *(
        Fused(terms, balance=balance)
        for balance in BALANCES
        for terms in (*(_by(likelihood=beta) for beta in (0.25, 0.5, 1.0, 2.0)), CONFIDENCE)
    ),
    *(Fused(terms, "restart", 0.5) for terms in (_by(likelihood=0.25), LIKELIHOOD)),
    *(Fused(balance=0.5, sharpness=factor) for factor in (1.1, 1.25)),
    *(Fused(balance=0.5, split=sixths) for sixths in (2, 3)),
    *(Fused(balance=0.5, keep=count) for count in (4, 3)),
    *(Fused(balance=0.5, layers=where) for where in ("late", "early")),
    *(
        Fused(terms, balance=0.5)
        for terms in (
            _by(agreement=0.5),
            _by(agreement=1.0),
            _by(mass=1.0),
            _by(likelihood=0.5, agreement=0.5),
            _by(likelihood=0.5, confidence=0.25),
            _by(first=0.5),
        )
    ),
    *(Fused(keep=count) for count in (4, 3, 2)),
    *(Fused(within=nats) for nats in (0.5, 1.0)),
    *(Fused(terms, split=sixths) for sixths in SPLITS for terms in ((), LIKELIHOOD)),
    *(Fused(terms, layers=where) for where in ("late", "early") for terms in ((), LIKELIHOOD)),
    # Weights that every query and head finds for itself.
    *(
        Fused(terms, contrast=exponent)
        for exponent in (0.0, 0.5, 1.5, 2.0)
        for terms in ((), LIKELIHOOD)
    ),
    *(Fused(terms, mixed=True) for terms in ((), LIKELIHOOD)),
    # Temperature and scale over contexts encoded in parallel, as in APE (arXiv:2502.05431).
    *(
        Fused(balance=0.0, sharpness=sharpness, total=total)
        for sharpness, total in ((1.0, 0.8), (1.0, 0.9), (1.1, 0.8), (1.25, 0.8))
    ),
)

SINGLES = ("origin", "mean single", "best single")
ENSEMBLES = ("logit_avg", "prob_avg", "prob_max")
# Of these the report takes the best with the same weights.
UNIFORM_ENSEMBLES = ("logit_avg", "prob_avg")
WEIGHTED_ENSEMBLES = ("weighted_avg", "weighted_prob_avg", "weighted_max")

# A bias that leaves nothing, and that is finite, since 0 times it has to be 0.
NEVER = -1e30
# Rows whose scores are held at once: few enough that they stay in the processor's cache.
ROWS_AT_ONCE = 8
# Rows of logits held at once.
LOGIT_ROWS = 64


def choose_configs(patterns: str) -> tuple[Fused, ...]:
    """Configurations whose names match one of some patterns, as in `fused,fused likelihood*`.

    raises: UsageError for a pattern that matches none
    """
    chosen: list[Fused] = []
    for pattern in patterns.split(","):
        wanted = "*" if pattern.strip() == "all" else pattern.strip()
        found = [config for config in CONFIGS if fnmatchcase(config.name, wanted)]
        if not found:
            known = ", ".join(config.name for config in CONFIGS)
            raise UsageError(f"--configs has {pattern!r}, which no name matches; there are {known}")
        chosen.extend(found)
    return tuple(dict.fromkeys(chosen))


# The answers of an item


@dataclass(frozen=True)
class Tree:
    """A suffix and all continuations behind it, tokens that two of them share held once.

    token_ids: T tokens; the suffix, then nodes in an order in which parents come first
    offsets:   of each token, its position behind the first
    own_mask:  bool[T, T], which tokens of the view a token sees
    readers:   M indices of tokens that predict something, the suffix's last one first
    asked:     Q pairs of an index into `readers` and a token id
    answers:   for each continuation the indices of its pairs
    """

    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    own_mask: Tensor
    readers: tuple[int, ...]
    asked: tuple[tuple[int, int], ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def suffix_end(self) -> int:
        """The last token of the suffix."""
        return self.readers[0]

    def best(self, logprobs: Tensor) -> Tensor:
        """The best answer's log-probability, of those of the pairs: [..., Q] -> [...]."""
        sums = [logprobs[..., list(answer)].sum(-1) for answer in self.answers]
        return torch.stack(sums).amax(0)


def make_tree(suffix_ids: Sequence[int], targets: Sequence[Sequence[int]]) -> Tree:
    """The tree of some continuations; the last token of one is asked for, not run.

    raises: UsageError for an empty suffix
    """
    if not suffix_ids:
        raise UsageError("the template's suffix is empty; this study wants one")
    token_ids = list(suffix_ids)
    parents = [index - 1 for index in range(len(token_ids))]
    offsets = list(range(len(token_ids)))
    nodes: dict[tuple[int, ...], int] = {(): len(token_ids) - 1}
    asked: dict[tuple[int, int], int] = {}
    answers = []
    for target in map(tuple, targets):
        pairs = []
        for end, token_id in enumerate(target):
            path = target[:end]
            if path not in nodes:
                parent = nodes[path[:-1]]
                nodes[path] = len(token_ids)
                token_ids.append(path[-1])
                parents.append(parent)
                offsets.append(offsets[parent] + 1)
            pairs.append(asked.setdefault((nodes[path], token_id), len(asked)))
        answers.append(tuple(pairs))
    own_mask = torch.zeros(len(token_ids), len(token_ids), dtype=torch.bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            own_mask[index] = own_mask[parent]
        own_mask[index, index] = True
    readers = tuple(nodes.values())
    place = {token: index for index, token in enumerate(readers)}
    return Tree(
        tuple(token_ids),
        tuple(offsets),
        own_mask,
        readers,
        tuple((place[token], token_id) for token, token_id in asked),
        tuple(answers),
    )


# The dense forward


@dataclass(frozen=True)
class Keys:
    """What views find in each layer: S keys of prefix and segments, with their values.

    keys:    per layer f32[K, S, D + N]; the last N numbers of a key tell its segment
    values:  per layer f32[K, S, D]
    lengths: of the segments, in their order behind the prefix
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    lengths: tuple[int, ...] = ()

    @property
    def num_prefix(self) -> int:
        return self.keys[0].shape[1] - sum(self.lengths)


@dataclass
class Group:
    """Rows that find the same keys, on their way through the layers.

    x:         float[R, T, C]; grows where rows enter
    positions: i64[R, T], for all rows that ever enter
    own_mask:  bool[T, T]
    bias:      f32[2, R, N], on segment keys in the early and in the late half of the layers
    sharpness: f32[R]
    regroup:   per row the configuration that `regroup_scores` obeys, for a group of such rows
    entering:  by layer, rows that begin there
    new_keys:  where keys and values of the rows' own tokens are kept, float[R, K, T, D] a layer
    mass:      where the first row's attention mass on segments is kept, f32[N] a layer
    mass_at:   of which token
    """

    x: Tensor
    positions: Tensor
    own_mask: Tensor
    keys: Keys
    bias: Tensor
    sharpness: Tensor
    regroup: Sequence[Fused] = ()
    entering: Mapping[int, Tensor] = field(default_factory=dict)
    new_keys: list[tuple[Tensor, Tensor]] | None = None
    mass: list[Tensor] | None = None
    mass_at: int = 0


class Decoder:
    """A model's dense forward pass over groups of rows, scores and softmax in float32."""

    def __init__(self, model: LoadedModel):
        if model.config.sliding_layers:
            raise UsageError("the model has a sliding window; this study wants one without")
        self.config, self.params = model.config, model.params
        self.inv_freq = make_inv_freq(model.config).to(model.params.embed.device)

    @property
    def device(self) -> torch.device:
        return self.params.embed.device

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """float[T, C]"""
        index = torch.tensor(token_ids, dtype=torch.long, device=self.device)
        return F.embedding(index, self.params.embed)

    def run(self, groups: Sequence[Group], tapped: Sequence[int] = ()) -> dict[int, Tensor]:
        """Take all groups through all layers; their `x` are then the states before the final norm.

        tapped:  layers before which the first group's states are wanted
        returns: these, float[R, T, C]
        raises:  UsageError where positions go beyond what the frequencies hold for
        """
        reach = max(int(group.positions.max()) for group in groups) + 1
        if reach > self.config.context_length or self.config.rope_length(reach):
            raise UsageError(
                f"a prompt needs {reach} positions, the model has {self.config.context_length}: "
                "ask for fewer shots"
            )
        rotations = [make_cos_sin(self.inv_freq, group.positions) for group in groups]
        eps = self.config.rms_norm_eps
        states = {}
        for index, layer in enumerate(self.params.layers):
            for group in groups:
                if index in group.entering:
                    group.x = torch.cat((group.x, group.entering[index]))
            if index in tapped:
                states[index] = groups[0].x
            rows = [len(group.x) for group in groups]
            x = torch.cat([group.x for group in groups])
            projected = self._project(rms_norm(x, layer.attn_norm, eps), layer)
            parts = zip(*(part.split(rows) for part in projected), strict=True)
            heads = [
                self._attend(group, index, rotation, *part)
                for group, rotation, part in zip(groups, rotations, parts, strict=True)
            ]
            x = x + linear(torch.cat(heads), layer.wo, layer.bo)
            x = x + mlp_block(rms_norm(x, layer.mlp_norm, eps), layer)
            for group, part in zip(groups, x.split(rows), strict=True):
                group.x = part
        return states

    def _project(self, x: Tensor, layer: LayerParams) -> tuple[Tensor, Tensor, Tensor]:
        """Queries float[R, T, H, D], keys and values float[R, T, K, D]."""
        H, K, D = self._heads()
        qkv = linear(x, layer.wqkv, layer.bqkv).view(*x.shape[:2], H + 2 * K, D)
        q, k, v = qkv.split((H, K, K), dim=2)
        if layer.q_norm is not None:
            q = rms_norm(q, layer.q_norm, self.config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, self.config.rms_norm_eps)
        return q, k, v

    def _heads(self) -> tuple[int, int, int]:
        config = self.config
        return config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def _attend(
        self,
        group: Group,
        index: int,
        rotation: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        """Attention of a group's rows over the shared keys and each row's own: float[R, T, H * D].

        q, k, v: float[R, T, H or K, D], not rotated
        """
        H, K, D = self._heads()
        R, T = q.shape[:2]
        if R == 0:  # all of the group's rows enter further up
            return q.new_zeros(0, T, H * D)
        G = H // K
        cos, sin = (part[:R] for part in rotation)
        q = apply_rope(q.transpose(1, 2), cos, sin).float() * self.config.attention_scale
        q_KRGTD = q.view(R, K, G, T, D).transpose(0, 1)
        k, v = apply_rope(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if group.new_keys is not None:
            group.new_keys.append((k, v))
        k_KRTD, v_KRTD = k.float().transpose(0, 1), v.float().transpose(0, 1)
        own_bias = torch.where(group.own_mask, 0.0, NEVER).repeat(G, 1)  # f32[G * T, T]
        is_late = 2 * index >= self.config.num_hidden_layers
        bias = group.bias[int(is_late), :R] / group.sharpness[:R, None]
        keys, values = group.keys.keys[index], group.keys.values[index]
        S, P = keys.shape[1], group.keys.num_prefix
        outputs = []
        for start in range(0, R, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, R))
            own_q, count = q_KRGTD[:, rows], rows.stop - start
            # The bias is part of the product: a key's last numbers pick that of its segment.
            chosen = bias[rows][None, :, None, None].expand(K, count, G, T, -1)
            long_q = torch.cat((own_q, chosen), dim=-1).flatten(1, 3)
            shared = (long_q @ keys.mT).view(K, count, G * T, S)
            sharpness = group.sharpness[rows]
            if (sharpness != 1).any():
                shared[..., P:] *= sharpness[:, None, None]
            own_q = own_q.reshape(K, count, G * T, D)
            own = own_q @ k_KRTD[:, rows].mT + own_bias
            if group.regroup:
                configs = group.regroup[rows]
                regroup_scores(shared, own, group.keys.lengths, group.bias[0, rows], configs)
            probs = torch.cat((shared, own), dim=-1).softmax(-1)
            if group.mass is not None and start == 0:
                seen = probs[:, 0].view(K * G, T, -1)[:, group.mass_at, P:S].mean(0)
                group.mass.append(torch.stack([s.sum() for s in seen.split(group.keys.lengths)]))
            out = (probs[..., :S].flatten(1, 2) @ values).view(K, count, G * T, D)
            outputs.append(out + probs[..., S:] @ v_KRTD[:, rows])
        out = torch.cat(outputs, dim=1).view(K, R, G, T, D)
        return out.permute(1, 3, 0, 2, 4).reshape(R, T, H * D).to(self.params.embed.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """f32[..., V] of states before the final norm, float[..., C]."""
        normed = rms_norm(x, self.params.final_norm, self.config.rms_norm_eps)
        return unembed(self.params, normed)

    def target_logprobs(self, x: Tensor, asked: Sequence[tuple[int, int]]) -> Tensor:
        """Log-probability of each pair of a state and a token, f32[R, Q].

        x:     float[R, M, C], states before the final norm
        asked: Q pairs of an index into the M states and a token id
        """
        nodes, token_ids = (list(part) for part in zip(*asked, strict=True))
        parts = []
        for rows in x.split(max(1, LOGIT_ROWS // x.shape[1])):
            logits = self.logits(rows)
            parts.append(logits[:, nodes, token_ids] - logits.logsumexp(-1)[:, nodes])
        return torch.cat(parts)


def regroup_scores(
    shared: Tensor,
    own: Tensor,
    lengths: Sequence[int],
    bias: Tensor,
    configs: Sequence[Fused],
) -> None:
    """Move scores of whole segments by the mass that each has; `shared` is changed in place.

    shared:  f32[K, R, Q, S], scores of prefix and segments, the bias on segments included
    own:     f32[K, R, Q, T]
    bias:    f32[R, N]
    configs: R of them
    """
    prefix, *segments = shared.split((shared.shape[-1] - sum(lengths), *lengths), dim=-1)
    masses = torch.stack([part.logsumexp(-1) for part in segments], dim=-1)  # f32[K, R, Q, N]
    rows = bias[:, None]
    plain = masses - rows
    # Raised to a power, and the sum of all of them set.
    contrast, total = (
        bias.new_tensor([getattr(config, name) for config in configs])[:, None, None]
        for name in ("contrast", "total")
    )
    raised = rows + contrast * plain
    goal = total * masses.logsumexp(-1, keepdim=True)
    moves = raised - masses + goal - raised.logsumexp(-1, keepdim=True)
    # N attentions have the same scores, and each a sum of its own that they are divided by.
    rest = torch.cat((prefix, own), dim=-1).logsumexp(-1, keepdim=True)
    sums = torch.logaddexp(rest, plain)
    apart = -sums - (rows - sums).logsumexp(-1, keepdim=True)
    is_mixed = torch.tensor([config.mixed for config in configs], device=bias.device)
    moves = torch.where(is_mixed[:, None, None], apart, moves)
    for part, move in zip(segments, moves.unbind(-1), strict=True):
        part += move[..., None]


# An item


class Passage(NamedTuple):
    """Keys and values of tokens that were run, per layer float[K, n, D]."""

    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class Segments:
    """The segments of an item, encoded right behind the prefix.

    alone, aligned:  the same keys, where they are and rotated on to end together
    likelihood:      f64[N], mean over tokens after the first; zeros where a segment has no such
    likelihood_sum:  f64[N]
    """

    prompt: Prompt
    alone: Keys
    aligned: Keys
    likelihood: Tensor
    likelihood_sum: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.alone.lengths

    @property
    def fused_start(self) -> int:
        return len(self.prompt.prefix_ids) + max(self.lengths)


class Study:
    """Scores items under a list of configurations; the prefix is encoded once as long as it stays.

    configs: ways to fuse; the ensembles of all their weightings are scored besides, and where some
             turn more attention to the segments, single prompts and ensembles that do
    """

    def __init__(self, model: LoadedModel, configs: Sequence[Fused]):
        self.decoder = Decoder(model)
        self.tokenizer = model.tokenizer
        self.frame = make_frame(model.tokenizer, None)
        self.configs = tuple(configs)
        self.weightings = tuple(dict.fromkeys(c.weights for c in configs if c.weights))
        # What turns fusion to the segments may turn a single prompt to its own: more references.
        emphases = dict.fromkeys(config.emphasis for config in configs)
        self.emphases = [emphasis for emphasis in emphases if emphasis != Fused()]
        self._prefix: tuple[tuple[int, ...], Passage] | None = None

    @torch.inference_mode()
    def score(self, request: Request, continuations: Sequence[str]) -> dict[str, float]:
        """The best continuation's log-probability in nats by configuration, references first."""
        prompt = encode_prompt(self.tokenizer, request, self.frame)
        tree = make_tree(prompt.suffix_ids, encode_continuations(self.tokenizer, continuations))
        tree = replace(tree, own_mask=tree.own_mask.to(self.decoder.device))
        segments = self._run_segments(prompt)
        readers = list(tree.readers)

        singles, plain = self._single_views(segments, tree), self._plain_view(segments, tree)
        lifted = {e: self._single_views(segments, tree, e) for e in self.emphases}
        tapped = {self._split_layer(c) for c in self.configs if c.split}
        states = self.decoder.run([singles, plain, *lifted.values()], sorted(tapped))
        logits = self.decoder.logits(singles.x[:, readers])  # f32[N, M, V]
        signals = find_signals(segments, logits[:, 0].log_softmax(-1), plain.mass)
        weights = {terms: weigh(terms, signals) for terms in ((), *self.weightings)}

        scores = self._score_references(segments, tree, logits, weights)
        for emphasis, group in lifted.items():
            used = {c.weights for c in self.configs if c.emphasis == emphasis}
            own = {terms: values for terms, values in weights.items() if not terms or terms in used}
            logits = self.decoder.logits(group.x[:, readers])
            tag = emphasis.name.removeprefix("fused")
            scores |= self._score_references(segments, tree, logits, own, tag)
        groups = self._fused_views(segments, tree, weights, states)
        if groups:
            self.decoder.run([group for _, group in groups])
        found = {}
        for configs, group in groups:
            logprobs = self.decoder.target_logprobs(group.x[:, readers], tree.asked)
            names = [config.name for config in configs]
            found |= dict(zip(names, tree.best(logprobs).tolist(), strict=True))
        return scores | {config.name: found[config.name] for config in self.configs}

    # Prefix and segments

    def _run_prefix(self, token_ids: tuple[int, ...]) -> Passage:
        if self._prefix is None or self._prefix[0] != token_ids:
            T = len(token_ids)
            mask = torch.ones(T, T, dtype=torch.bool, device=self.decoder.device).tril()
            passage, _ = self._run_passage(token_ids, range(T), mask, self._join(None, None, ()))
            self._prefix = token_ids, passage
        return self._prefix[1]

    def _run_passage(
        self, token_ids: Sequence[int], positions: Sequence[int], own_mask: Tensor, keys: Keys
    ) -> tuple[Passage, Tensor]:
        """Run tokens as one row; their keys and values, and states float[n, C]."""
        device = self.decoder.device
        new_keys: list[tuple[Tensor, Tensor]] = []
        group = Group(
            x=self.decoder.embed(token_ids)[None],
            positions=torch.tensor([list(positions)], device=device),
            own_mask=own_mask,
            keys=keys,
            bias=torch.zeros(2, 1, 0, device=device),
            sharpness=torch.ones(1, device=device),
            new_keys=new_keys,
        )
        if token_ids:
            self.decoder.run([group])
            return Passage(*zip(*((k[0], v[0]) for k, v in new_keys), strict=True)), group.x[0]
        config = self.decoder.config
        shape = (config.num_key_value_heads, 0, config.head_dim)
        nothing = [torch.zeros(shape, device=device)] * config.num_hidden_layers
        return Passage(nothing, nothing), group.x[0]

    def _join(self, prefix: Passage | None, segments: Passage | None, lengths: tuple) -> Keys:
        """Prefix and segments as the keys that views find."""
        config, device = self.decoder.config, self.decoder.device
        K, D, N = config.num_key_value_heads, config.head_dim, len(lengths)
        keys, values = [], []
        numbers = torch.arange(N, device=device).repeat_interleave(
            torch.tensor(lengths, dtype=torch.long, device=device)
        )
        for layer in range(config.num_hidden_layers):
            parts = [part for part in (prefix, segments) if part is not None]
            empty = torch.zeros(K, 0, D, device=device)
            key = torch.cat([empty, *(part.keys[layer].float() for part in parts)], dim=1)
            value = torch.cat([empty, *(part.values[layer].float() for part in parts)], dim=1)
            marks = torch.zeros(K, key.shape[1], N, device=device)
            marks[:, key.shape[1] - sum(lengths) :] = F.one_hot(numbers, max(N, 1))[:, :N].float()
            keys.append(torch.cat((key, marks), dim=-1))
            values.append(value)
        return Keys(keys, values, lengths)

    def _run_segments(self, prompt: Prompt) -> Segments:
        device = self.decoder.device
        prefix = self._run_prefix(prompt.prefix_ids)
        lengths = tuple(map(len, prompt.segment_ids))
        start = len(prompt.prefix_ids)
        token_ids = [i for ids in prompt.segment_ids for i in ids]
        positions = [start + i for length in lengths for i in range(length)]
        blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
        own_mask = torch.block_diag(*blocks).bool().to(device)
        passage, x = self._run_passage(token_ids, positions, own_mask, self._join(prefix, None, ()))
        turns = torch.tensor([max(lengths) - length for length in lengths for _ in range(length)])
        cos, sin = make_cos_sin(self.decoder.inv_freq, turns[None].to(device))
        moved = [apply_rope(key[None], cos, sin)[0] for key in passage.keys]
        asked = []
        for first, ids in zip(np.cumsum((0, *lengths)), prompt.segment_ids, strict=False):
            asked.append([(int(first) + i, token_id) for i, token_id in enumerate(ids[1:])])
        sums = means = torch.zeros(len(lengths), dtype=torch.double)
        if all(asked):
            found = self._logprobs_of([pair for pairs in asked for pair in pairs], x)
            parts = found.double().cpu().split([len(pairs) for pairs in asked])
            sums = torch.stack([part.sum() for part in parts])
            means = torch.stack([part.mean() for part in parts])
        return Segments(
            prompt=prompt,
            alone=self._join(prefix, passage, lengths),
            aligned=self._join(prefix, Passage(moved, passage.values), lengths),
            likelihood=means,
            likelihood_sum=sums,
        )

    def _logprobs_of(self, asked: Sequence[tuple[int, int]], x: Tensor) -> Tensor:
        """Log-probability of a token after each of some states float[n, C], f32[Q]."""
        rows, token_ids = (list(part) for part in zip(*asked, strict=True))
        index = torch.tensor(token_ids, device=x.device)[:, None]
        parts = []
        for states, ids in zip(x[rows].split(LOGIT_ROWS), index.split(LOGIT_ROWS), strict=True):
            logits = self.decoder.logits(states[None])[0]
            parts.append(logits.gather(1, ids)[:, 0] - logits.logsumexp(-1))
        return torch.cat(parts)

    # Views

    def _views(
        self,
        tree: Tree,
        keys: Keys,
        starts: Sequence[int],
        bias: Tensor,
        sharpness: Sequence[float],
        num_first: int,
        **more: object,
    ) -> Group:
        """Views of the same suffix; `num_first` of them begin at the bottom."""
        device = self.decoder.device
        offsets = torch.tensor(tree.offsets)
        return Group(
            x=self.decoder.embed(tree.token_ids)[None].repeat(num_first, 1, 1),
            positions=(torch.tensor(starts)[:, None] + offsets).to(device),
            own_mask=tree.own_mask,
            keys=keys,
            bias=bias.to(device),
            sharpness=torch.tensor(sharpness, dtype=torch.float32, device=device),
            **more,
        )

    def _single_views(self, segments: Segments, tree: Tree, emphasis: Fused | None = None) -> Group:
        emphasis = emphasis or Fused()
        N = len(segments.lengths)
        bias = torch.full((N, N), NEVER).fill_diagonal_(emphasis.lift(N)).expand(2, N, N)
        starts = [len(segments.prompt.prefix_ids) + length for length in segments.lengths]
        return self._views(tree, segments.alone, starts, bias, [emphasis.sharpness] * N, N)

    def _plain_view(self, segments: Segments, tree: Tree) -> Group:
        N = len(segments.lengths)
        bias = torch.full((2, 1, N), -math.log(N))
        starts = [segments.fused_start]
        more = {"mass": [], "mass_at": tree.suffix_end}
        return self._views(tree, segments.aligned, starts, bias, [1.0], 1, **more)

    def _split_layer(self, config: Fused) -> int:
        return self.decoder.config.num_hidden_layers * config.split // 6

    def _fused_views(
        self,
        segments: Segments,
        tree: Tree,
        weights: Mapping[Terms, Tensor],
        states: Mapping[int, Tensor],
    ) -> list[tuple[list[Fused], Group]]:
        """All configurations, in groups of those that find the same keys the same way."""
        sorts: dict[tuple[str, bool], list[Fused]] = {}
        for config in self.configs:
            sorts.setdefault((config.positions, config.is_regrouped), []).append(config)
        groups = []
        for (positions, is_regrouped), configs in sorts.items():
            # Rows enter in this order; those of another sharpness lie together in few slices.
            configs.sort(key=lambda c: (self._split_layer(c) if c.split else 0, c.sharpness))
            kept = {config: keep_segments(config, segments.likelihood) for config in configs}
            biases = [make_bias(c, weights[c.weights], kept[c]) for c in configs]
            entering: dict[int, list[Tensor]] = {}
            for config in configs:
                if config.split:
                    layer = self._split_layer(config)
                    entering.setdefault(layer, []).append(
                        merge(states[layer], weights[config.weights])
                    )
            group = self._views(
                tree,
                segments.aligned if positions == "aligned" else segments.alone,
                [segments.fused_start] * len(configs),
                torch.stack(biases, dim=1),
                [config.sharpness for config in configs],
                sum(not config.split for config in configs),
                regroup=configs if is_regrouped else (),
                entering={layer: torch.stack(rows) for layer, rows in entering.items()},
            )
            groups.append((configs, group))
        return groups

    # References

    def _score_references(
        self,
        segments: Segments,
        tree: Tree,
        logits: Tensor,
        weights: Mapping[Terms, Tensor],
        tag: str = "",
    ) -> dict[str, float]:
        """Single prompts, and the ensembles of every weighting.

        logits: f32[N, M, V] of the single-segment views
        tag:    ends every name
        """
        nodes, token_ids = (list(part) for part in zip(*tree.asked, strict=True))
        logprobs = logits.log_softmax(-1)
        own = logprobs[:, nodes, token_ids]  # f32[N, Q]
        best = tree.best(own).double()
        scores = {
            "origin": float(best[0]),
            "mean single": float(best.mean()),
            "best single": float(best.max()),
        }
        highest = logprobs.amax(0)
        scores["prob_max"] = float(
            tree.best(highest[nodes, token_ids] - highest.logsumexp(-1)[nodes])
        )
        table = torch.stack(list(weights.values())).to(logits)  # f32[E, N]
        mixed = (own + table.log()[..., None]).logsumexp(1)
        # One node at a time: E distributions over the vocabulary are held at once.
        norms = torch.stack([(table @ part).logsumexp(-1) for part in logits.unbind(1)], dim=1)
        means = table @ logits[:, nodes, token_ids] - norms[:, nodes]
        prob_avg, logit_avg = tree.best(mixed).tolist(), tree.best(means).tolist()
        for row, (terms, values) in enumerate(weights.items()):
            if not terms:
                scores |= {"prob_avg": prob_avg[row], "logit_avg": logit_avg[row]}
                continue
            name = name_terms(terms)
            heaviest = max(
                range(len(values)), key=lambda i: (float(values[i]), segments.prompt.segment_ids[i])
            )
            scores[f"weighted_prob_avg {name}"] = prob_avg[row]
            scores[f"weighted_avg {name}"] = logit_avg[row]
            scores[f"weighted_max {name}"] = float(best[heaviest])
        return {f"{name}{tag}": value for name, value in scores.items()}


def find_signals(segments: Segments, logprobs: Tensor, mass: Sequence[Tensor]) -> dict[str, Tensor]:
    """What may tell a good phrasing, each f64[N].

    logprobs: f32[N, V], next token after each plain prompt
    mass:     per layer f32[N], the plain fused view's attention to each segment
    """
    N = len(segments.lengths)
    logprobs = logprobs.double()
    probs = logprobs.exp()
    mean = logprobs.logsumexp(0) - math.log(N)
    to_mean = (probs * (logprobs - mean)).sum(-1)
    from_mean = (mean.exp() * (mean - logprobs)).sum(-1)
    masses = torch.stack(list(mass)).double().cpu()
    signals = {
        "likelihood": segments.likelihood,
        "likelihood_sum": segments.likelihood_sum,
        "confidence": (probs * logprobs).sum(-1),
        "agreement": -to_mean,
        "agreement_both": -(to_mean + from_mean) / 2,
        "mass": _log_share(masses),
        "mass_late": _log_share(masses[2 * len(masses) // 3 :]),
        "top": logprobs.amax(-1),
        "first": F.one_hot(torch.tensor(0), N).double(),
    }
    for name in ("likelihood", "confidence"):
        values = signals[name] - signals[name].mean()
        spread = float(values.max() - values.min()) or 1.0
        signals[f"{name}_range"] = values / spread
        signals[f"{name}_z"] = values / (float(values.std(correction=0)) or 1.0)
    return {name: values.cpu() for name, values in signals.items()}


def _log_share(masses: Tensor) -> Tensor:
    """f64[L, N] -> f64[N]"""
    mean = masses.mean(0).clamp_min(1e-30)
    return (mean / mean.sum()).log()


def weigh(terms: Terms, signals: Mapping[str, Tensor]) -> Tensor:
    """Weights f64[N]; without terms they are equal."""
    total = torch.zeros_like(signals["likelihood"])
    for signal, beta in terms:
        total = total + beta * signals[signal]
    return total.softmax(0)


def keep_segments(config: Fused, likelihood: Tensor) -> Tensor:
    """Which segments a configuration does not drop, bool[N]."""
    kept = torch.ones(len(likelihood), dtype=torch.bool)
    if config.keep is not None and config.keep < len(likelihood):
        kept[likelihood.argsort(descending=True, stable=True)[config.keep :]] = False
    if config.within is not None:
        kept &= likelihood >= likelihood.max() - config.within
    return kept


def make_bias(config: Fused, weights: Tensor, kept: Tensor) -> Tensor:
    """The bias on each segment's keys in the early and the late layers, f32[2, N].

    weights: f64[N]
    kept:    bool[N]
    """
    own = torch.where(kept, weights, 0.0)
    own = (own / own.sum()).clamp_min(1e-300).log() + config.lift(len(own))
    elsewhere = torch.full_like(own, -math.log(len(own)) if config.weights else 0.0)
    early = elsewhere if config.layers == "late" else own
    late = elsewhere if config.layers == "early" else own
    bias = torch.stack((early, late))
    return torch.where(kept, bias, NEVER).float()


def merge(states: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the single views' states: float[N, T, C] -> float[T, C]."""
    mean = torch.einsum("n,ntc->tc", weights.to(states.device).float(), states.float())
    return mean.to(states.dtype)


# A run


def half_of(item_id: str) -> str:
    """Which half of a data set an item belongs to, whatever else is in it."""
    return "confirm" if hashlib.sha256(item_id.encode()).digest()[-1] % 2 else "tune"


def choose_work(
    dataset: Dataset, *, shots: int, draws: int, seed: int, limit: int | None, half: str | None
) -> tuple[list[Item], list[list[Item]]]:
    """The items to score, and the shots of each draw, which are no items of any draw.

    limit: items before the choice of a half, so that both halves of a limit make the limit
    """
    drawn, left_out = choose_draws(dataset, shots, seed, draws)
    items = [item for item in dataset.items if item.id not in left_out]
    if limit is not None and limit < len(items):
        items = choose_items(items, limit, seed)
    if half is not None:
        items = [item for item in items if half_of(item.id) == half]
    if not items:
        raise UsageError(f"{dataset.name} leaves no item to score")
    return items, drawn


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.fusion_study",
        description="Log-probability of the best gold answer under many ways to fuse.",
        epilog="python -m benchmarks.fusion_study report FILE...: print what was found",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar=DATASET_METAVAR)
    add_dataset_flags(parser)
    add("--paraphrase-file", type=Path, metavar="FILE.jsonl")
    add("--draws", type=int, default=3, help="of shots (default: %(default)s)")
    add("--shots", type=int, default=5, help="default: %(default)s")
    add("--paraphrases", type=int, default=5, help="default: %(default)s")
    add("--limit", type=int, metavar="N", help="a seeded choice of items, halved by --half")
    add("--half", choices=("tune", "confirm"), help="default: all items")
    add("--configs", default="all", metavar="NAME,...", help="names or patterns (default: all)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--output", type=Path, required=True, metavar="FILE.parquet")
    add_model_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    work: Callable[[], None]
    if arguments and arguments[0] == "report":
        work = functools.partial(_report_command, arguments[1:])
    else:
        work = functools.partial(_run, arguments)
    return run_command(work, interrupted="interrupted: the draws before this one are written")


def _run(arguments: Sequence[str]) -> None:
    args = build_parser().parse_args(arguments)
    for name in ("draws", "paraphrases", "limit"):
        check_count(f"--{name}", getattr(args, name))
    check_count("--shots", args.shots, 0)
    configs = choose_configs(args.configs)
    pandas = import_extra("pandas")
    import_extra("pyarrow")
    dataset = read_dataset(
        args,
        paraphrase_file=args.paraphrase_file,
        min_paraphrases=paraphrases_needed("first", args.paraphrases),
    )
    items, drawn = choose_work(
        dataset,
        shots=args.shots,
        draws=args.draws,
        seed=args.seed,
        limit=args.limit,
        half=args.half,
    )
    model = load_model(args.model, args.dtype, args.device)
    study = Study(model, configs)
    template = read_template(find_template(dataset.name))
    about = {
        "dataset": dataset.name,
        "half": args.half or "all",
        "seed": args.seed,
        "model": model.name,
        "source": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    tables = []
    for draw, shots in enumerate(drawn):
        builder = PromptBuilder(template, tuple(shots))
        rows = list(_score_items(study, builder, items, args, f"draw {draw}"))
        tables.append(pandas.DataFrame(rows).assign(draw=draw, **about))
        _write(pandas.concat(tables, ignore_index=True), args.output)
    print(f"wrote {args.output}: {len(items)} items, {len(drawn)} draws", file=sys.stderr)


def _score_items(
    study: Study,
    builder: PromptBuilder,
    items: Sequence[Item],
    args: argparse.Namespace,
    title: str,
) -> Iterator[dict]:
    import tqdm

    for item in tqdm.tqdm(items, desc=title, unit="item", file=sys.stderr):
        chosen = choose_paraphrases(item, args.paraphrases, "first", args.seed)
        prompt = builder.build(item, [item.paraphrases[i] for i in chosen])
        request = Request(prompt.segments, prompt.prefix, prompt.suffix)
        scores = study.score(request, [continuation_of(answer) for answer in item.answers])
        for name, logprob in scores.items():
            yield {"item": item.id, "relation": item.relation, "config": name, "logprob": logprob}
        check_interrupt()


def _write(table: "DataFrame", path: Path) -> None:
    """Write a table whole, so that a reader never finds half of it."""
    part = path.with_name(f"{path.name}.part")
    try:
        table.to_parquet(part, index=False)
        part.replace(path)
    except OSError as error:
        raise MinifuseError(f"{path} cannot be written: {error.strerror}") from None


# The report

RESAMPLES = 2000


class Cube(NamedTuple):
    """What was found on one data set, or a half of it.

    logprobs: f64[draws, items, configs]
    """

    title: str
    names: tuple[str, ...]
    logprobs: np.ndarray


def read_cubes(paths: Sequence[Path]) -> list[Cube]:
    """A cube for each data set and half; files that share these are put together.

    Items that one of the draws lacks are left out, and so are configurations.
    raises: UsageError for a file that is not of this study
    """
    pandas = import_extra("pandas")
    tables = []
    for path in paths:
        try:
            tables.append(pandas.read_parquet(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read as parquet: {error}") from None
        if not {"dataset", "half", "seed", "draw", "item", "config"} <= set(tables[-1].columns):
            raise UsageError(f"{path} is not of this study: it lacks columns")
    everything = pandas.concat(tables, ignore_index=True)
    cubes = []
    for (dataset, half), table in everything.groupby(["dataset", "half"], sort=False):
        if table.duplicated(["seed", "draw", "item", "config"]).any():
            raise UsageError(f"{dataset} {half}: two files hold the same draw; wanted each once")
        wide = table.pivot(index=["seed", "draw", "item"], columns="config", values="logprob")
        wide = wide[list(dict.fromkeys(table["config"]))].dropna(axis=1)
        draws = [group.droplevel(["seed", "draw"]) for _, group in wide.groupby(["seed", "draw"])]
        items = functools.reduce(
            lambda one, other: one.intersection(other.index), draws[1:], draws[0].index
        )
        logprobs = np.stack([draw.loc[items].to_numpy(float) for draw in draws])
        cubes.append(Cube(f"{dataset} {half}", tuple(wide.columns), logprobs))
    return cubes


def same_weights_of(name: str, names: Sequence[str]) -> list[str]:
    """The ensembles that weigh paraphrases as a fused configuration does.

    Where it turns more attention to the segments, those of prompts that do so, too.
    """
    head, *rest = name.split(" ")
    if head != "fused":
        return []
    terms = next((part for part in rest if "@" in part), None)
    wanted = [f"{ensemble} {terms}" for ensemble in WEIGHTED_ENSEMBLES]
    if terms is None:
        wanted = list(UNIFORM_ENSEMBLES)
    tag = "".join(f" {part}" for part in rest if part.startswith(("balance=", "sharpness=")))
    tags = dict.fromkeys(["", tag])
    return [f"{other}{tag}" for other in wanted for tag in tags if f"{other}{tag}" in names]


def summarise_cube(cube: Cube) -> dict[str, list[str]]:
    """The cells of each configuration's line, see COLUMNS."""
    column = {name: index for index, name in enumerate(cube.names)}
    means = cube.logprobs.mean((0, 1))
    resampled = resample_means(cube.logprobs.swapaxes(0, 1), num_resamples=RESAMPLES)

    def best_of(names: Sequence[str]) -> str:
        return max(names, key=lambda name: means[column[name]])

    def difference(name: str, other: str) -> str:
        one, two = column[name], column[other]
        low, high = np.quantile(resampled[:, one] - resampled[:, two], (0.025, 0.975))
        return f"{means[one] - means[two]:+.3f} [{low:+.3f}, {high:+.3f}]"

    best = best_of([name for name in ENSEMBLES if name in column])
    distance = means[column["best single"]] - means[column[best]]
    cells = {}
    for name in cube.names:
        same = same_weights_of(name, cube.names)
        share = (means[column[name]] - means[column[best]]) / distance if distance else math.nan
        cells[name] = [
            f"{means[column[name]]:.3f}",
            difference(name, "prob_avg"),
            difference(name, "logit_avg"),
            difference(name, best),
            difference(name, best_of(same)) if same else "",
            f"{100 * share:.0f} %",
        ]
    return cells


COLUMNS = ("mean", "- prob_avg", "- logit_avg", "- best ensemble", "- same weights", "share")


def make_report(cubes: Sequence[Cube]) -> str:
    """Markdown: a line for each configuration, side by side what each cube says of it."""
    cells = [summarise_cube(cube) for cube in cubes]
    gains: dict[str, list[float]] = {}
    for cube in cubes:
        means = dict(zip(cube.names, cube.logprobs.mean((0, 1)), strict=True))
        for name in cube.names:
            gains.setdefault(name, []).append(means[name] - means["prob_avg"])
    order = sorted(gains, key=lambda name: np.mean(gains[name]), reverse=True)
    lines = [
        "Log-probability of the best gold answer in nats; differences with 95% intervals of "
        f"{RESAMPLES:,} two-way bootstrap resamples over draws and items. Best ensemble: of "
        f"{', '.join(ENSEMBLES)}. Same weights: the best of the ensembles with the weights of the "
        "line, and where it sharpens, of those that do as well. Share: of the distance from the "
        "best ensemble to the best single paraphrase of each item. Sorted by the mean difference "
        "to prob_avg.",
        "",
    ]
    for cube in cubes:
        num_draws, num_items, _ = cube.logprobs.shape
        lines.append(f"- {cube.title}: {num_draws} draws of {num_items} items")
    heads = [f"{cube.title}: {name}" for cube in cubes for name in COLUMNS]
    lines += ["", _line(["configuration", *heads]), _line(["---", *["---:"] * len(heads)])]
    for name in order:
        own = [cell for part in cells for cell in part.get(name, [""] * len(COLUMNS))]
        lines.append(_line([name, *own]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _report_command(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m benchmarks.fusion_study report",
        description="Print what was found as a markdown table.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.parquet")
    print(make_report(read_cubes(parser.parse_args(arguments).files)))


if __name__ == "__main__":
    sys.exit(main())
