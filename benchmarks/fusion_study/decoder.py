"""A dense forward of many views of one item at once, each with a bias of its own on every segment.

Letters as in `minifuse.model`; besides, T tokens of a view (suffix, then the answers' tokens as a
tree), M nodes that predict something, Q pairs of a node and a token asked for, N segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.fusion_study.configs import Fused
from minifuse.errors import UsageError
from minifuse.loader import LoadedModel
from minifuse.model import LayerParams, linear, mlp_block, rms_norm, unembed
from minifuse.rope import apply_rope, make_cos_sin, make_inv_freq

# A bias that leaves nothing, and that is finite, since 0 times it has to be 0.
NEVER = -1e30
# Rows whose scores are held at once: few enough that they stay in the processor's cache.
ROWS_AT_ONCE = 8
# Rows of logits held at once.
LOGIT_ROWS = 64


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
