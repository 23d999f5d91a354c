"""Plain data that describes a model and a request; no torch, so that `--help` stays quick.

`ModelConfig.from_hf` reads a hub `config.json`. A field that changes the result is either
implemented, or refused by name; a field nobody here knows is reported as a warning.
"""

import math
import warnings
from dataclasses import dataclass

from minifuse.errors import ConfigError, UsageError

DTYPE_NAMES = ("float32", "bfloat16", "float16")
POSITION_SCHEMES = ("aligned", "restart")
WEIGHT_SIGNALS = ("likelihood", "confidence")

# Fields of config.json that carry no computation of the forward pass.
_HARMLESS_FIELDS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bos_token_id
    chunk_size_feed_forward dtype eos_token_id id2label initializer_range is_llama_config label2id
    layer_types max_window_layers model_type name_or_path output_attentions output_hidden_states
    pad_token_id problem_type return_dict torch_dtype transformers.js_config transformers_version
    unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()
)

# Fields that `from_hf` reads.
_READ_FIELDS = frozenset(
    """
    attention_bias head_dim hidden_size intermediate_size max_position_embeddings mlp_bias
    num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters
    rope_scaling rope_theta sliding_window tie_word_embeddings vocab_size
    """.split()
)

# Fields that change the result and are not implemented, with the values that switch them off.
_NEUTRAL_VALUES = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "pretraining_tp": (0, 1, None),
    "quantization_config": (None,),
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
class RopeScaling:
    """Llama 3's frequency-dependent stretch of RoPE (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, under the names of the hub's config.json.

    `attention_bias` is the bias of q, k and v; `attention_out_bias` that of the output projection
    (Llama has both or none, Qwen2 the first alone). `qk_norm` is Qwen3's RMS norm of each head.
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

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @staticmethod
    def from_hf(raw: dict) -> "ModelConfig":
        """Read a hub config.json, already parsed.

        raises: ConfigError, naming the field, where a value is missing, malformed or unsupported.
        """
        if not isinstance(raw, dict):
            raise ConfigError(f"config.json holds {type(raw).__name__}; wanted a JSON object")
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            raise ConfigError(
                f"config field model_type is {model_type!r}; minifuse runs "
                f"{', '.join(_FAMILIES)}: choose a model of one of these families"
            )
        _refuse_unsupported(raw)
        family = _FAMILIES[model_type]
        heads = _positive_int(raw, "num_attention_heads")
        hidden_size = _positive_int(raw, "hidden_size")
        kv_heads = _positive_int(raw, "num_key_value_heads", family["num_key_value_heads"] or heads)
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
        rope_theta, rope_scaling = _read_rope(raw)
        attention_bias = _boolean(raw, "attention_bias") or family["attention_bias"]
        return ModelConfig(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=_positive_int(raw, "intermediate_size"),
            num_hidden_layers=_positive_int(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive_int(raw, "vocab_size"),
            max_position_embeddings=_positive_int(
                raw, "max_position_embeddings", family["max_position_embeddings"]
            ),
            rms_norm_eps=_positive_float(raw, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=_boolean(raw, "tie_word_embeddings"),
            attention_bias=attention_bias,
            attention_out_bias=attention_bias and family["attention_out_bias"],
            mlp_bias=_boolean(raw, "mlp_bias") and family["mlp_bias"],
            qk_norm=family["qk_norm"],
        )


# What a family fixes, and the defaults its config class has for fields that a file leaves out.
_FAMILIES = {
    "llama": {
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "head_dim": None,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "qwen2": {
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "head_dim": None,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": False,
        "qk_norm": True,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
}


def _refuse_unsupported(raw: dict) -> None:
    for field, neutral in _NEUTRAL_VALUES.items():
        if field in raw and raw[field] not in neutral:
            raise ConfigError(
                f"config field {field} is {raw[field]!r}, which minifuse does not implement; "
                f"wanted {' or '.join(map(repr, neutral))}"
            )
    layer_types = raw.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list)
        or any(layer_type != "full_attention" for layer_type in layer_types)
    ):
        raise ConfigError(
            f"config field layer_types is {layer_types!r}; minifuse implements full_attention alone"
        )
    unknown = sorted(set(raw) - _HARMLESS_FIELDS - _READ_FIELDS - set(_NEUTRAL_VALUES))
    if unknown:
        warnings.warn(
            f"config.json has fields that minifuse does not know and does not use: "
            f"{', '.join(unknown)}",
            stacklevel=3,
        )


def _read_rope(raw: dict) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` or the newer `rope_parameters`."""
    given = {f: raw[f] for f in ("rope_parameters", "rope_scaling") if raw.get(f)}
    field, rope = next(iter(given.items()), ("rope_parameters", {}))
    if not isinstance(rope, dict):
        raise ConfigError(f"config field {field} is {rope!r}; wanted an object or null")
    other = given.get("rope_scaling", rope)
    if any(key in rope and rope[key] != other[key] for key in other) or set(other) - set(rope):
        raise ConfigError(
            f"config fields rope_parameters, {rope!r}, and rope_scaling, {other!r}, contradict "
            "each other; wanted one of them"
        )
    theta = _positive_float(rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)
    if rope.get("partial_rotary_factor") not in _NEUTRAL_VALUES["partial_rotary_factor"]:
        raise ConfigError(
            f"config field {field}.partial_rotary_factor is {rope['partial_rotary_factor']!r}; "
            "minifuse rotates whole heads alone"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(
            f"config field {field}.rope_type is {kind!r}; minifuse implements default and llama3"
        )
    scaling = RopeScaling(
        factor=_positive_float(rope, "factor"),
        low_freq_factor=_positive_float(rope, "low_freq_factor"),
        high_freq_factor=_positive_float(rope, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(rope, "original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ConfigError(
            f"config field {field}.high_freq_factor is {scaling.high_freq_factor}; wanted more "
            f"than low_freq_factor, {scaling.low_freq_factor}"
        )
    return theta, scaling


def _positive_int(raw: dict, field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"config field {field} is {value!r}; wanted a positive integer")
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


def _boolean(raw: dict, field: str) -> bool:
    value = raw.get(field, False)
    if value not in (True, False, None):
        raise ConfigError(f"config field {field} is {value!r}; wanted true or false")
    return bool(value)


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
    stop: tuple[str, ...] = ()

    def __post_init__(self):
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
    balance: scales the bias log(w) that keeps N segments from outweighing the prefix; 1 is exact.
    """

    positions: str = "aligned"
    signal: str = "likelihood"
    beta: float = 1.0
    balance: float = 1.0

    def __post_init__(self):
        if self.positions not in POSITION_SCHEMES:
            raise UsageError(
                f"positions is {self.positions!r}; wanted one of {', '.join(POSITION_SCHEMES)}"
            )
        if self.signal not in WEIGHT_SIGNALS:
            raise UsageError(
                f"weights are {self.signal!r}; wanted numbers or one of {', '.join(WEIGHT_SIGNALS)}"
            )
        _check_number("beta", self.beta, -math.inf, math.inf)
        _check_number("balance", self.balance, -math.inf, math.inf)


def is_finite(value: int | float) -> bool:
    """Whether a number is finite as a float; an integer may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise UsageError(f"{name} is {value!r}; wanted an integer of at least {low}{upper}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or not is_finite(value) or not low <= value <= high:
        span = "a finite number"
        if math.isfinite(low):
            span += f" of at least {low:g}"
        if math.isfinite(high):
            span += f" and at most {high:g}"
        raise UsageError(f"{name} is {value!r}; wanted {span}")
