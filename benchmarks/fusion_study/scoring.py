"""An item's score under every configuration.

It takes three passes behind the stored prefix: its segments; the single-segment views and the
plain fused view, which give the signals; then every other way to fuse, each a row of its own. All
that differs between two rows is data: a bias and a factor on the scores of each segment's keys.

Letters as in `decoder`; besides, E ensembles.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fusion_study.configs import Fused, Terms, name_terms
from benchmarks.fusion_study.decoder import LOGIT_ROWS, NEVER, Decoder, Group, Keys, Tree, make_tree
from minifuse.layout import Prompt
from minifuse.loader import LoadedModel
from minifuse.request import Request, encode_continuations, encode_prompt, make_frame
from minifuse.rope import apply_rope, make_cos_sin


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
