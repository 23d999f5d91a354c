"""Hub configs: what is read, what is refused by name; and the checks of a request's settings."""

import math
import re
import warnings
from dataclasses import FrozenInstanceError

import pytest
from tiny_files import FAMILIES, make_model

from minifuse import config as config_module
from minifuse.config import (
    DynamicScaling,
    FusionConfig,
    GenerationConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    YarnScaling,
)
from minifuse.errors import ConfigError, UsageError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


# JSON has integers without bounds; this one is finite and yet no float.
HUGE = pytest.param(10**400, id="10**400")


def read(**changes) -> ModelConfig:
    """The Llama above with changes; a value of `...` leaves its field out."""
    raw = {**LLAMA, **changes}
    return ModelConfig.from_hf({k: v for k, v in raw.items() if v is not ...})


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_llama_field_by_field():
    assert read() == ModelConfig(
        model_type="llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
    )
    assert read().group_size == 2


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", {"num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 2048}),
        ("mistral", {"num_key_value_heads": 8, "head_dim": 2, "max_position_embeddings": 131072}),
        # Qwen's config classes default to 32 key/value heads, Qwen 3 to heads of 128.
        ("qwen2", {"num_key_value_heads": 32, "head_dim": 2, "max_position_embeddings": 32768}),
        ("qwen3", {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}),
    ],
)
def test_defaults_are_those_of_the_hubs_own_classes(family, wanted):
    left_out = "num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta"
    config = read(
        model_type=family,
        num_attention_heads=4 if family == "llama" else 32,
        **dict.fromkeys(left_out.split(), ...),
    )
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("family", "given", "biases"),
    [
        # attention_bias, attention_out_bias, mlp_bias, qk_norm
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {"attention_bias": True, "mlp_bias": True}, (True, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen2", {"attention_bias": False, "mlp_bias": True}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_of_each_family(family, given, biases):
    config = read(model_type=family, **given)
    found = config.attention_bias, config.attention_out_bias, config.mlp_bias, config.qk_norm
    assert found == biases


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_transformers_is_read_without_a_warning(family):
    model = make_model(family, tie_word_embeddings=True)
    read_back = ModelConfig.from_hf(model.config.to_dict())
    assert read_back.tie_word_embeddings
    assert read_back.head_dim == (32 if family == "qwen3" else 16)
    assert read_back.rms_norm_eps == 1e-5
    assert read_back.max_position_embeddings == 256


@pytest.mark.parametrize("family", ["gemma2", "ministral", "gpt2", None, 3, ["llama"]])
def test_other_families_are_refused(family):
    wanted = re.escape(f"model_type is {family!r}; ") + ".*llama, mistral, qwen2, qwen3"
    with pytest.raises(ConfigError, match=wanted):
        read(model_type=family)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_mixtures_of_experts_are_refused_as_such(family):
    with pytest.raises(ConfigError, match=f"model_type is '{family}', a mixture of experts;"):
        read(model_type=family)


@pytest.mark.parametrize("raw", [[], "llama", None, 3])
def test_a_config_that_is_no_object(raw):
    with pytest.raises(ConfigError, match=r"config\.json holds .*JSON object"):
        ModelConfig.from_hf(raw)


# A value that changes the result, for every field that has such values and is not implemented.
REFUSED = {
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "is_decoder": "yes",
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "use_mrope": True,
    "rope_interleaved": True,
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "pretraining_tp": 2,
    "weight_bits": 1,
    "input_bits": 8,
    "clip_qkv": 8.0,
    "no_rope_layers": [1, 0],
    "num_experts": 8,
    "num_local_experts": 8,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "query_pre_attn_scalar": 256,
    "pruned_heads": {"0": [1]},
}


def test_every_unsupported_field_has_a_case():
    assert REFUSED.keys() == config_module._NEUTRAL_VALUES.keys()


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_unsupported_fields_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"field {field} is .*does not implement"):
        read(**{field: value})


@pytest.mark.parametrize("field", REFUSED)
def test_values_that_switch_a_field_off_change_nothing(field):
    for neutral in config_module._NEUTRAL_VALUES[field]:
        assert read(**{field: neutral}) == read()


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("family", "given", "window", "layers"),
    [
        ("llama", {}, None, ()),
        ("llama", {"layer_types": [FULL] * 4}, None, ()),
        # Llama has no window; the hub's class does not look at the field either.
        ("llama", {"sliding_window": 64}, None, ()),
        # Mistral 7B v0.1 leaves no doubt, v0.3 says null, and the class defaults to 4096.
        ("mistral", {"sliding_window": 64}, 64, (0, 1, 2, 3)),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {}, 4096, (0, 1, 2, 3)),
        ("mistral", {"sliding_window": 64, "layer_types": [SLIDING] * 4}, 64, (0, 1, 2, 3)),
        # Qwen's configs name a window that they do not use.
        ("qwen2", {"sliding_window": 64, "max_window_layers": 2}, None, ()),
        (
            "qwen2",
            {"sliding_window": 64, "max_window_layers": 2, "use_sliding_window": True},
            64,
            (2, 3),
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}, 4096, (3,)),
        ("qwen3", {"use_sliding_window": True}, None, ()),
        ("qwen3", {"use_sliding_window": True, "sliding_window": None}, None, ()),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": [FULL, SLIDING, FULL, SLIDING],
            },
            64,
            (1, 3),
        ),
    ],
)
def test_sliding_window_and_its_layers(family, given, window, layers):
    config = read(model_type=family, num_hidden_layers=4, **given)
    assert (config.sliding_window, config.sliding_layers) == (window, layers)


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("llama", {"layer_types": [FULL, SLIDING]}, "layer_types is .*slides in 0 of 2 layers"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window is true, which llama"),
        ("qwen2", {"layer_types": [FULL, SLIDING]}, "layer_types is .*slides in 0 of 2 layers"),
        ("mistral", {"layer_types": [FULL, SLIDING]}, "layer_types is .*slides in 2 of 2 layers"),
        ("llama", {"layer_types": ["chunked_attention"] * 2}, "layer_types is .*sliding_attention"),
        ("llama", {"layer_types": [FULL]}, "layer_types is .*each of 2 layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; wanted a positive integer"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8'"),
        ("qwen2", {"use_sliding_window": 1.5}, "use_sliding_window is 1.5; wanted true or false"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1; wanted an integer of at least 0",
        ),
    ],
)
def test_windows_that_contradict_themselves_are_refused(family, given, message):
    with pytest.raises(ConfigError, match=message):
        read(model_type=family, **given)


@pytest.mark.parametrize("value", [5, "full_attention", [["full_attention"]], [None, "x"]])
def test_layer_types_that_are_no_list_of_names(value):
    with pytest.raises(ConfigError, match="layer_types"):
        read(layer_types=value)


INTEGERS = """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    vocab_size max_position_embeddings head_dim
""".split()


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, [2]])
def test_sizes_are_positive_integers(field, value):
    with pytest.raises(ConfigError, match=rf"field {field} is .*positive integer"):
        read(**{field: value})


@pytest.mark.parametrize(
    "field", "hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
)
def test_sizes_without_a_default_have_to_be_there(field):
    with pytest.raises(ConfigError, match=f"field {field} is None"):
        read(**{field: ...})


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1e-5", True, HUGE])
def test_numbers_are_positive_and_finite(field, value):
    with pytest.raises(ConfigError, match=rf"field {field} is .*positive number"):
        read(**{field: value})


@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["true", 2, "no"])
def test_switches_are_true_or_false(field, value):
    with pytest.raises(ConfigError, match=rf"field {field} is .*true or false"):
        read(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; wanted a divisor .* 4"),
        ({"hidden_size": 66}, "hidden_size is 66; wanted a multiple of .* 4"),
        ({"head_dim": 15}, "head_dim is 15; RoPE wants an even number"),
        ({"hidden_size": 60}, "head_dim is 15; RoPE wants an even number"),
    ],
)
def test_sizes_have_to_fit_each_other(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**changes)
    assert read(hidden_size=66, head_dim=16).head_dim == 16


def test_unknown_fields_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"does not know and does not use: mood, weather$"):
        config = read(weather="fine", mood=3)
    assert config == read()


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_scaling_under_both_names(field, kind):
    rope = {kind: "llama3", **{k: v for k, v in SCALING.items() if k != "rope_type"}}
    config = read(**{field: rope})
    assert config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 128)
    assert config.rope_theta == 500.0


def test_rope_parameters_hold_theta():
    rope = {"rope_type": "default", "rope_theta": 1e6}
    assert read(rope_theta=..., rope_parameters=rope).rope_theta == 1e6
    assert read(rope_theta=5.0, rope_parameters=rope).rope_theta == 1e6
    assert read(rope_parameters=rope).rope_scaling is None
    assert read(rope_parameters=None, rope_scaling=None) == read()


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "proportional", None, ["yarn"]])
def test_other_scalings_are_refused(field, kind):
    wanted = re.escape(f"field {field}.rope_type is {kind!r}") + ".*linear, dynamic, yarn, llama3"
    with pytest.raises(ConfigError, match=wanted):
        read(**{field: {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize("missing", [name for name in SCALING if name != "rope_type"])
def test_scaling_that_lacks_a_value(missing):
    scaling = {k: v for k, v in SCALING.items() if k != missing}
    with pytest.raises(ConfigError, match=f"{missing} is None"):
        read(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high_freq_factor": 1.0}, "high_freq_factor is 1.0; wanted more than low_freq_factor"),
        ({"factor": 0}, "factor is 0"),
        ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings is 0.5"),
        ({"partial_rotary_factor": 0.5}, r"rope_scaling\.partial_rotary_factor is 0.5"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_scaling_with_a_bad_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(rope_scaling={**SCALING, **changes})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rope", "scaling", "context"),
    [
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4.0), 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, DynamicScaling(2.0, 512), 1024),
        (YARN, YarnScaling(4.0, 128, 0.1 * math.log(4) + 1), 512),
        # What Qwen 2.5's model card tells its users to add: the context grows to 4 x 512.
        ({"type": "yarn", "factor": 4.0}, YarnScaling(4.0, 512, 0.1 * math.log(4) + 1), 2048),
        ({**YARN, "factor": None}, YarnScaling(4.0, 128, 0.1 * math.log(4) + 1), 512),
        ({**YARN, "attention_factor": 1.5}, YarnScaling(4.0, 128, 1.5), 512),
        ({**YARN, "factor": 1.0}, YarnScaling(1.0, 128, 1.0), 512),
        # DeepSeek's: equal numbers cancel out.
        ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}, YarnScaling(4.0, 128, 1.0), 512),
        (
            {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
            YarnScaling(4.0, 128, 0.1 * math.log(4) + 1, 16.0, 2.0, False),
            512,
        ),
        (SCALING, Llama3Scaling(8.0, 1.0, 4.0, 128), 512),
    ],
    ids=str,
)
def test_scalings_and_the_context_that_they_give(rope, scaling, context):
    config = read(rope_scaling=rope)
    assert config.rope_scaling == scaling
    assert config.context_length == context


def test_yarn_scales_the_scores():
    config = read(rope_scaling={**YARN, "attention_factor": 1.5})
    assert config.attention_scale == 1.5**2 / 4
    assert read().attention_scale == 1 / 4


def test_dynamic_frequencies_depend_on_requests_beyond_the_original_context():
    config = read(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert [config.rope_length(n) for n in (1, 512, 513, 1024)] == [None, None, 513, 1024]
    assert read(rope_scaling=YARN).rope_length(10**6) is None


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "dynamic", "factor": -1}, "factor is -1"),
        ({**YARN, "beta_fast": 0.5}, r"rope_scaling\.beta_fast is 0.5; wanted at least beta_slow"),
        ({**YARN, "attention_factor": "1"}, "attention_factor is '1'"),
        ({**YARN, "truncate": "no"}, "truncate is 'no'"),
        ({**YARN, "original_max_position_embeddings": 1.5}, "original_max_position_emb.* is 1.5"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**YARN, "rope_theta": 1.0}, "rope_theta is 1; YaRN wants a number above 1"),
        ({**YARN, "factor": 1e300}, r"factor is 1e\+300; wanted at most 100000"),
    ],
)
def test_scalings_with_a_bad_value(rope, message):
    with pytest.raises(ConfigError, match=message):
        read(rope_scaling=rope)


def test_dynamic_scaling_wants_a_head_that_has_room_for_it():
    with pytest.raises(ConfigError, match="head_dim is 2; dynamic RoPE scaling wants at least 4"):
        read(head_dim=2, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def test_key_value_heads_that_are_null_are_as_many_as_heads():
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert read(model_type=family, num_key_value_heads=None).num_key_value_heads == 4


@pytest.mark.parametrize("value", [[1], "llama3", 8.0])
def test_scaling_that_is_no_object(value):
    with pytest.raises(ConfigError, match=r"rope_scaling is .*object or null"):
        read(rope_scaling=value, rope_parameters=SCALING)
    with pytest.raises(ConfigError, match=r"rope_scaling is .*object or null"):
        read(rope_scaling=value)


def test_rope_fields_that_contradict_each_other_are_refused():
    """Transformers takes `rope_scaling` there; whichever is dropped, the result changes."""
    assert read(rope_parameters=SCALING, rope_scaling=SCALING).rope_scaling.factor == 8.0
    with pytest.raises(ConfigError, match=r"rope_scaling|rope_parameters"):
        read(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_scaling=SCALING)


def test_generation_defaults_are_greedy():
    config = GenerationConfig()
    assert (config.temperature, config.top_k, config.top_p, config.seed) == (0.0, 0, 1.0, 0)
    assert (config.max_new_tokens, config.stop) == (32, ())


@pytest.mark.parametrize(("given", "kept"), [("\n", ("\n",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_is_a_tuple_of_strings(given, kept):
    assert GenerationConfig(stop=given).stop == kept


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", (0, -1, 1.5, "3", True, None)),
        ("temperature", (-0.1, math.nan, math.inf, "1", True, None, HUGE.values[0])),
        ("top_k", (-1, 1.0, "1", False)),
        ("top_p", (0, -0.5, 1.01, math.nan, "1", True)),
        ("seed", (-1, 2**63, 0.0, "0", True)),
        ("stop", ([""], "", ("a", 3), [None])),
    ],
)
def test_generation_settings_out_of_range(field, values):
    for value in values:
        with pytest.raises(UsageError, match=rf"^{field} .*; wanted "):
            GenerationConfig(**{field: value})


def test_generation_settings_at_their_limits():
    GenerationConfig(max_new_tokens=1, temperature=1e-9, top_k=1, top_p=1e-9, seed=2**63 - 1)
    GenerationConfig(temperature=100, top_p=1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("positions", ("sequential", "", None, 1)),
        ("signal", ("entropy", "", None, 0.5)),
        ("beta", (math.nan, math.inf, "1", True, None)),
        ("balance", (math.nan, -math.inf, "1", False)),
    ],
)
def test_fusion_settings_out_of_range(field, values):
    name = "weights" if field == "signal" else field
    for value in values:
        with pytest.raises(UsageError, match=rf"^{name} .*; wanted "):
            FusionConfig(**{field: value})


def test_fusion_settings():
    default = FusionConfig()
    assert (default.positions, default.signal) == ("aligned", "likelihood")
    assert (default.beta, default.balance) == (0.5, None)
    FusionConfig(positions="restart", signal="confidence", beta=-2, balance=0)


@pytest.mark.parametrize("config", [GenerationConfig(), FusionConfig(), read()])
def test_settings_stay_what_they_are(config):
    with pytest.raises(FrozenInstanceError):
        config.seed = 3


@pytest.mark.parametrize(
    ("field", "value", "most"),
    [
        ("num_hidden_layers", 2**40, "10,000"),
        ("hidden_size", 2**31, "2,147,483,647"),
        ("vocab_size", 10**400, "2,147,483,647"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_counted(field, value, most):
    with pytest.raises(ConfigError, match=f"{field} is {value}; wanted at most {most}$"):
        ModelConfig.from_hf(LLAMA | {field: value})
