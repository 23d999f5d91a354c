"""Plain data that describes a model and a request; no torch, so that `--help` stays quick.

`ModelConfig.from_hf` reads a hub `config.json`. A field that changes the result is either
implemented, or refused by name; a field nobody here knows is reported as a warning.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from minifuse.errors import ConfigError, UsageError

DTYPE_NAMES = ("float32", "bfloat16", "float16")
POSITION_SCHEMES = ("aligned", "restart")
WEIGHT_SIGNALS = ("likelihood", "confidence")
QUANTIZE_NAMES = ("none", "int8", "int4")
# Weights of 4 bits share a scale among so many neighbours.
QUANTIZE_GROUP = 32
QUANTIZE_VERSION = 1
# No model stretches its context by so much; what does is a damaged config.
MAX_ROPE_FACTOR = 100_000
# Nor does any have so many layers, or numbers along one dimension.
MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1

# Fields of config.json that carry no computation of the forward pass.
_HARMLESS_FIELDS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id
    chunk_size_feed_forward dtype eos_token_id id2label initializer_range is_llama_config label2id
    max_length max_sequence_length name_or_path output_attentions output_hidden_states pad_token_id
    problem_type return_dict tokenizer_class torch_dtype transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()
)

# Fields that `from_hf` reads.
_READ_FIELDS = frozenset(
    """
    attention_bias head_dim hidden_size intermediate_size layer_types max_position_embeddings
    max_window_layers mlp_bias model_type num_attention_heads num_hidden_layers num_key_value_heads
    quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings use_sliding_window vocab_size
    """.split()
)

# Fields that change the result and are not implemented, with the values that switch them off.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "pretraining_tp": (0, 1, None),
    "weight_bits": (None,),
    "input_bits": (None,),
    "clip_qkv": (None,),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "pruned_heads": (None, {}),
}


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by the factor: position interpolation (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with the request beyond the original context ("dynamic NTK")."""

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """Slow frequencies divided by the factor, fast ones kept, scores scaled (arXiv:2309.00071).

    beta_fast, beta_slow: turns over the original context that tell fast from slow
    truncate:             the ramp between them starts and ends at whole pairs of dimensions
    attention_factor:     what rotated queries and keys are multiplied by
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies divided by the factor, fast ones kept, a blend between them (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, under the names of the hub's config.json.

    `attention_bias` is the bias of q, k and v; `attention_out_bias` that of the output projection
    (Llama has both or none, Qwen2 the first alone). `qk_norm` is Qwen3's RMS norm of each head.
    In `sliding_layers` a token sees the last `sliding_window` positions alone, its own included.
    `quantize` says how the weights of linear layers, embedding and head are held: "int8", "int4"
    (these two as int8 then, too), None for floats.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    quantize: str | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by; YaRN scales queries and keys, so scores by the square."""
        scaling = self.rope_scaling
        factor = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
        return factor**2 / math.sqrt(self.head_dim)

    @property
    def context_length(self) -> int:
        """Positions that the model was made for.

        `max_position_embeddings` stays that of the unscaled model for linear and dynamic scaling,
        and often for YaRN (the convention of vLLM's `_get_and_verify_max_len`).
        """
        longest, scaling = self.max_position_embeddings, self.rope_scaling
        if isinstance(scaling, LinearScaling | DynamicScaling):
            return int(longest * scaling.factor)
        if isinstance(scaling, YarnScaling):
            return max(longest, int(scaling.original_max_position_embeddings * scaling.factor))
        return longest

    def quantized(self, scheme: str | None) -> "ModelConfig":
        """The same model with its weights held as "int8" or "int4", as they are for None.

        raises: UsageError where they are held otherwise already, or their rows do not divide into
                groups
        """
        if scheme in (None, self.quantize):
            return self
        if self.quantize is not None:
            raise UsageError(
                f"quantize is {scheme!r}, but the model's weights are stored as {self.quantize}; "
                f"leave it out, or take the model that they were made from"
            )
        widths = {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads * head_dim": self.num_attention_heads * self.head_dim,
        }
        for name, width in widths.items():
            if width % QUANTIZE_GROUP:
                raise UsageError(
                    f"quantize is {scheme!r}, but {name} is {width}; quantized weights want "
                    f"multiples of {QUANTIZE_GROUP}: leave it out for this model"
                )
        return replace(self, quantize=scheme)

    def rope_length(self, num_positions: int) -> int | None:
        """What the RoPE frequencies of a request depend on: its length, where scaling is dynamic.

        None where they are those of a short one.
        """
        scaling = self.rope_scaling
        is_stretched = (
            isinstance(scaling, DynamicScaling)
            and num_positions > scaling.original_max_position_embeddings
        )
        return num_positions if is_stretched else None

    @staticmethod
    def from_hf(raw: dict) -> "ModelConfig":
        """Read a hub config.json, already parsed.

        raises: ConfigError, naming the field, where a value is missing, malformed or unsupported.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"config.json holds {type(raw).__name__}; wanted a JSON object")
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            is_moe = isinstance(model_type, str) and (
                "moe" in model_type or model_type == "mixtral"
            )
            kind = ", a mixture of experts" if is_moe else ""
            raise ConfigError(
                f"config field model_type is {model_type!r}{kind}; minifuse runs "
                f"{', '.join(_FAMILIES)}: choose a model of one of these families"
            )
        _refuse_unsupported(raw)
        family = _FAMILIES[model_type]
        heads = _positive_int(raw, "num_attention_heads")
        hidden_size = _positive_int(raw, "hidden_size")
        kv_default = family["num_key_value_heads"] or heads
        if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
            kv_default = heads
        kv_heads = _positive_int(raw, "num_key_value_heads", kv_default)
        if heads % kv_heads:
            raise ConfigError(
                f"config field num_key_value_heads is {kv_heads}; wanted a divisor of "
                f"num_attention_heads, {heads}"
            )
        head_dim = family["head_dim"] or hidden_size // heads
        if raw.get("head_dim") is not None:
            head_dim = _positive_int(raw, "head_dim")
        elif not family["head_dim"] and hidden_size % heads:
            raise ConfigError(
                f"config field hidden_size is {hidden_size}; wanted a multiple of "
                f"num_attention_heads, {heads}, or an explicit head_dim"
            )
        if head_dim % 2:
            raise ConfigError(f"config field head_dim is {head_dim}; RoPE wants an even number")
        max_position_embeddings = _positive_int(
            raw, "max_position_embeddings", family["max_position_embeddings"]
        )
        rope_theta, rope_scaling = _read_rope(raw, max_position_embeddings)
        if isinstance(rope_scaling, DynamicScaling) and head_dim < 4:
            raise ConfigError(
                f"config field head_dim is {head_dim}; dynamic RoPE scaling wants at least 4"
            )
        if isinstance(rope_scaling, YarnScaling) and rope_theta <= 1:
            raise ConfigError(
                f"config field rope_theta is {rope_theta:g}; YaRN wants a number above 1"
            )
        num_layers = _positive_int(raw, "num_hidden_layers")
        sliding_window, sliding_layers = _read_window(raw, family, num_layers)
        attention_bias = _boolean(raw, "attention_bias") or family["attention_bias"]
        config = ModelConfig(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=_positive_int(raw, "intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive_int(raw, "vocab_size"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=_positive_float(raw, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=_boolean(raw, "tie_word_embeddings"),
            attention_bias=attention_bias,
            attention_out_bias=attention_bias and family["attention_out_bias"],
            mlp_bias=_boolean(raw, "mlp_bias") and family["mlp_bias"],
            qk_norm=family["qk_norm"],
            sliding_window=sliding_window,
            sliding_layers=sliding_layers,
        )
        return config.quantized(_read_quantization(raw))


# What a family fixes, and the defaults its config class has for fields that a file leaves out.
class _Family(TypedDict):
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    head_dim: int | None
    num_key_value_heads: int | None
    max_position_embeddings: int
    sliding: str | None


_FAMILIES: dict[str, _Family] = {
    "llama": {
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "head_dim": None,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "sliding": None,
    },
    "mistral": {
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "head_dim": None,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding": "all",
    },
    "qwen2": {
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "head_dim": None,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding": "late",
    },
    "qwen3": {
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": False,
        "qk_norm": True,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding": "late",
    },
}


def parse_quantize(name: str | None) -> str | None:
    """A scheme by name; "none" is None.

    raises: UsageError
    """
    if name is not None and name not in QUANTIZE_NAMES:
        raise UsageError(f"quantize is {name!r}; wanted {', '.join(QUANTIZE_NAMES)}")
    return None if name == "none" else name


def dtype_beside(quantize: str | None, dtype: str) -> str:
    """The name of the dtype of what is not quantized: as it is asked for, bfloat16 for "auto".

    raises: UsageError for one that the kernels of quantized weights do not take
    """
    if quantize is None:
        return dtype
    if dtype == "auto":
        return "bfloat16"
    allowed = ("bfloat16", "float32") if quantize == "int8" else ("bfloat16",)
    if dtype not in allowed:
        raise UsageError(
            f"dtype is {dtype!r}, but {quantize} weights run in {' or '.join(allowed)}; use that, "
            "or auto"
        )
    return dtype


def quantization_field(quantize: str) -> dict:
    """What config.json holds as `quantization_config` where minifuse quantized the weights."""
    return {
        "quant_method": "minifuse",
        "version": QUANTIZE_VERSION,
        "scheme": quantize,
        "group_size": QUANTIZE_GROUP,
    }


def _read_quantization(raw: dict) -> str | None:
    """The scheme by which minifuse itself quantized the weights; no other is implemented."""
    found = raw.get("quantization_config")
    for scheme in (parse_quantize(name) for name in QUANTIZE_NAMES):
        if found == (scheme and quantization_field(scheme)):
            return scheme
    raise ConfigError(
        f"config field quantization_config is {found!r}, which minifuse does not implement; "
        "wanted None, or what minifuse itself writes (tools.convert_weights --quantize)"
    )


def _refuse_unsupported(raw: dict) -> None:
    for name, neutral in _NEUTRAL_VALUES.items():
        if name in raw and raw[name] not in neutral:
            raise ConfigError(
                f"config field {name} is {raw[name]!r}, which minifuse does not implement; "
                f"wanted {' or '.join(map(repr, neutral))}"
            )
    unknown = sorted(set(raw) - _HARMLESS_FIELDS - _READ_FIELDS - set(_NEUTRAL_VALUES))
    if unknown:
        warnings.warn(
            f"config.json has fields that minifuse does not know and does not use: "
            f"{', '.join(unknown)}",
            stacklevel=3,
        )


def _read_window(raw: dict, family: _Family, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window and the layers that have it, by the rules of the hub's config classes.

    Mistral slides in every layer unless `sliding_window` is null; Qwen, where `use_sliding_window`
    says so, from layer `max_window_layers` on, or where `layer_types` says so; Llama never.
    """
    rule = family["sliding"]
    is_used = rule == "all" or _boolean(raw, "use_sliding_window")
    if rule is None and is_used:
        raise ConfigError(
            f"config field use_sliding_window is true, which {raw['model_type']} models do not have"
        )
    is_off = not is_used or ("sliding_window" in raw and raw["sliding_window"] is None)
    window = None if is_off else _positive_int(raw, "sliding_window", 4096)
    first = 0
    if rule == "late":
        first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ConfigError(
                f"config field max_window_layers is {first!r}; wanted an integer of at least 0"
            )
    layers = () if window is None else tuple(range(first, num_layers))
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        kinds = ("full_attention", "sliding_attention")
        if (
            not isinstance(layer_types, list)
            or any(kind not in kinds for kind in layer_types)
            or len(layer_types) != num_layers
        ):
            raise ConfigError(
                f"config field layer_types is {layer_types!r}; wanted {' or '.join(kinds)} for "
                f"each of {num_layers} layers"
            )
        named = tuple(i for i, kind in enumerate(layer_types) if kind == "sliding_attention")
        if named != layers and (rule != "late" or window is None):
            raise ConfigError(
                f"config field layer_types is {layer_types!r}, but by its other fields the model "
                f"slides in {len(layers)} of {num_layers} layers; wanted fields that agree"
            )
        layers = named
    return (window, layers) if layers else (None, ())


def _read_rope(raw: dict, max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    given = {f: raw[f] for f in ("rope_parameters", "rope_scaling") if raw.get(f)}
    field, rope = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(rope, dict):
        raise ConfigError(f"config field {field} is {rope!r}; wanted an object or null")
    other = given.get("rope_scaling", rope)
    if not isinstance(other, dict):
        raise ConfigError(f"config field rope_scaling is {other!r}; wanted an object or null")
    if any(key in rope and rope[key] != other[key] for key in other) or set(other) - set(rope):
        raise ConfigError(
            f"config fields rope_parameters, {rope!r}, and rope_scaling, {other!r}, contradict "
            "each other; wanted one of them"
        )
    theta = _positive_float(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_READERS:
        raise ConfigError(
            f"config field {field}.rope_type is {kind!r}; minifuse implements "
            f"{', '.join(_ROPE_READERS)}"
        )
    if rope.get("partial_rotary_factor") not in _NEUTRAL_VALUES["partial_rotary_factor"]:
        raise ConfigError(
            f"config field {field}.partial_rotary_factor is {rope['partial_rotary_factor']!r}; "
            "minifuse rotates whole heads alone"
        )
    return theta, _ROPE_READERS[kind](rope, field, max_position_embeddings)


def _read_factor(rope: dict, field: str, default: float | None = None) -> float:
    factor = _positive_float(rope, "factor", default)
    if factor > MAX_ROPE_FACTOR:
        raise ConfigError(
            f"config field {field}.factor is {factor:g}; wanted at most {MAX_ROPE_FACTOR}"
        )
    return factor


def _read_default(rope: dict, field: str, longest: int) -> None:
    return None


def _read_linear(rope: dict, field: str, longest: int) -> LinearScaling:
    return LinearScaling(_read_factor(rope, field))


def _read_dynamic(rope: dict, field: str, longest: int) -> DynamicScaling:
    # Transformers stretches from `max_position_embeddings` on, whatever else is said.
    return DynamicScaling(_read_factor(rope, field), longest)


def _read_yarn(rope: dict, field: str, longest: int) -> YarnScaling:
    original = _positive_int(rope, "original_max_position_embeddings", longest)
    factor = _read_factor(rope, field, longest / original)
    if rope.get("attention_factor") is not None:
        attention_factor = _positive_float(rope, "attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, all_dim = (_positive_float(rope, f) for f in ("mscale", "mscale_all_dim"))
        attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, all_dim)
    else:
        attention_factor = _yarn_mscale(factor, 1.0)
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=_positive_float(rope, "beta_fast", YarnScaling.beta_fast),
        beta_slow=_positive_float(rope, "beta_slow", YarnScaling.beta_slow),
        truncate=_boolean(rope, "truncate", YarnScaling.truncate),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise ConfigError(
            f"config field {field}.beta_fast is {scaling.beta_fast}; wanted at least beta_slow, "
            f"{scaling.beta_slow}"
        )
    return scaling


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Section 3.4 of arXiv:2309.00071."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_llama3(rope: dict, field: str, longest: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=_read_factor(rope, field),
        low_freq_factor=_positive_float(rope, "low_freq_factor"),
        high_freq_factor=_positive_float(rope, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(rope, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"config field {field}.high_freq_factor is {scaling.high_freq_factor}; wanted more "
            f"than low_freq_factor, {scaling.low_freq_factor}"
        )
    return scaling


_ROPE_READERS: dict[str, Callable[[dict, str, int], RopeScaling | None]] = {
    "default": _read_default,
    "linear": _read_linear,
    "dynamic": _read_dynamic,
    "yarn": _read_yarn,
    "llama3": _read_llama3,
}


def _positive_int(raw: dict, field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config field {field} is {value!r}; wanted a positive integer")
    if value > (most := MAX_LAYERS if field == "num_hidden_layers" else MAX_SIZE):
        raise ConfigError(f"config field {field} is {value!r}; wanted at most {most:,}")
    return value


def _positive_float(raw: dict, field: str, default: float | None = None) -> float:
    value = raw.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config field {field} is {value!r}; wanted a positive number")
    if not is_finite(value) or value <= 0:
        raise ConfigError(f"config field {field} is {value!r}; wanted a positive number")
    return float(value)


def _boolean(raw: dict, field: str, default: bool = False) -> bool:
    value = raw.get(field)
    if value not in (True, False, None):
        raise ConfigError(f"config field {field} is {value!r}; wanted true or false")
    return default if value is None else bool(value)


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is drawn and when it ends.

    temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off. `stop` strings end an
    answer and are left out of its text.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("top_k", self.top_k, 0)
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise UsageError("top_p is 0; wanted a number above 0 and at most 1")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UsageError(f"stop holds {text!r}; wanted strings that are not empty")


@dataclass(frozen=True)
class FusionConfig:
    """How several segments are weighed and placed for the fused methods and weighted ensembles.

    positions: where a fused view finds its segments (`aligned` or `restart`).
    signal, beta: weights found per item are softmax(beta * signal).
    balance: together, N segments weigh as N ** (1 - balance) prompts do in the fused methods; 1
             lets copies weigh as one. None for each method's own: 0.5 of `fused_auto`, 1 of others.
    """

    positions: str = "aligned"
    signal: str = "likelihood"
    beta: float = 0.5
    balance: float | None = None

    def __post_init__(self) -> None:
        if self.positions not in POSITION_SCHEMES:
            raise UsageError(
                f"positions is {self.positions!r}; wanted one of {', '.join(POSITION_SCHEMES)}"
            )
        if self.signal not in WEIGHT_SIGNALS:
            raise UsageError(
                f"weights are {self.signal!r}; wanted numbers or one of {', '.join(WEIGHT_SIGNALS)}"
            )
        _check_number("beta", self.beta, -math.inf, math.inf)
        if self.balance is not None:
            _check_number("balance", self.balance, -math.inf, math.inf)


@dataclass(frozen=True)
class ChatConfig:
    """How a chat template is asked to render.

    system:    a system message that opens the conversation
    variables: what else the template asks for, such as {"enable_thinking": False}; JSON values.
               They are the template's own: a control token in them is one
    """

    system: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.system is not None and not isinstance(self.system, str):
            raise UsageError(f"system is {type(self.system).__name__}; wanted a string")
        is_named = isinstance(self.variables, Mapping) and all(
            isinstance(name, str) for name in self.variables
        )
        if not is_named:
            raise UsageError(
                f"chat_variables is {self.variables!r}; wanted a dict from names to JSON values"
            )


def is_finite(value: int | float) -> bool:
    """Whether a number is finite as a float; an integer may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise UsageError(f"{name} is {value!r}; wanted an integer of at least {low}{upper}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not is_finite(value) or not low <= value <= high:
        span = "a finite number"
        if math.isfinite(low):
            span += f" of at least {low:g}"
        if math.isfinite(high):
            span += f" and at most {high:g}"
        raise UsageError(f"{name} is {value!r}; wanted {span}")
