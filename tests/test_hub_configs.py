"""The config.json of models on the hub: read without a warning, and refused where it has to be.

Facts, copied from public repositories that keep such files. "Printed" marks those found only as
a config object of transformers prints itself, with some of its defaults added.
"""

import math
import re
import warnings
from typing import NamedTuple

import pytest

from minifuse.checkpoint import count_parameters
from minifuse.config import LinearScaling, Llama3Scaling, ModelConfig, RopeScaling, YarnScaling
from minifuse.errors import ConfigError


def sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


BASE = {"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16"}
BASE |= {"use_cache": True, "tie_word_embeddings": False}
NO_DROPOUT = {"attention_dropout": 0.0}

LLAMA = {
    **BASE,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
}
SMOL = {
    **LLAMA,
    **NO_DROPOUT,
    "attention_bias": False,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
    "transformers_version": "4.42.3",
}
KV_CACHE = {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
SMOL_SMALL = {
    **SMOL,
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "transformers.js_config": KV_CACHE,
}
SMOL_135M = SMOL_SMALL | sizes(576, 1536, 30, 9, 3, 49152) | {"initializer_range": 1 / 24}
LLAMA_2_7B = {
    **LLAMA,
    **sizes(4096, 11008, 32, 32, 32, 32000),
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "max_position_embeddings": 4096,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
}
LLAMA_3 = {
    **LLAMA,
    **NO_DROPOUT,
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "transformers_version": "4.40.0.dev0",
}
LLAMA_3_1 = {
    **LLAMA_3,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "transformers_version": "4.43.0.dev0",
}
LLAMA_3_2 = {
    **LLAMA_3_1,
    "rope_scaling": LLAMA_3_1["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}
LLAMA_8B = sizes(4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = sizes(8192, 28672, 80, 64, 8, 128256)
LLAMA_1B = sizes(2048, 8192, 16, 32, 8, 128256) | {"head_dim": 64}
LLAMA_3B = sizes(3072, 8192, 28, 24, 8, 128256) | {"head_dim": 128}
LLAMA_EOS = {"eos_token_id": [128001, 128008, 128009]}
LINEAR_4 = {"factor": 4.0, "type": "linear"}

MISTRAL = {
    **BASE,
    **NO_DROPOUT,
    **sizes(4096, 14336, 32, 32, 8, 32000),
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
MISTRAL_V0_1 = {
    **MISTRAL,
    "_name_or_path": "mistralai/Mistral-7B-v0.1",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "transformers_version": "4.37.2",
}

QWEN_2 = {
    **BASE,
    **NO_DROPOUT,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "transformers_version": "4.43.1",
    "use_sliding_window": False,
}
TIED = {"tie_word_embeddings": True}
QWEN_BASE = {"eos_token_id": 151643, "use_mrope": False, "transformers_version": "4.40.1"}
LONG = {"max_position_embeddings": 131072, "sliding_window": 131072}
DISTILL = {
    **QWEN_BASE,
    "max_position_embeddings": 131072,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "transformers_version": "4.44.0",
}
QWEN_0_5B = sizes(896, 4864, 24, 14, 2, 151936) | TIED | {"max_window_layers": 24}
QWEN_1_5B = sizes(1536, 8960, 28, 12, 2, 151936)
QWEN_3B = sizes(2048, 11008, 36, 16, 2, 151936) | TIED
QWEN_7B = sizes(3584, 18944, 28, 28, 4, 152064)
QWEN_14B = sizes(5120, 13824, 48, 40, 8, 152064)
QWEN_32B = sizes(5120, 27648, 64, 40, 8, 152064)
QWEN_7B_INSTRUCT = QWEN_2 | QWEN_7B | {"sliding_window": 131072}

QWEN_3 = {
    **BASE,
    **NO_DROPOUT,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "transformers_version": "4.51.0",
    "use_sliding_window": False,
}
QWEN_3_06B = sizes(1024, 3072, 28, 16, 8, 151936) | TIED | {"max_window_layers": 28}
QWEN_3_4B = sizes(2560, 9728, 36, 32, 8, 151936) | TIED


CONFIGS = {
    "SmolLM2-135M-Instruct": SMOL_135M,
    # The same, saved again by transformers 5.
    "SmolLM2-135M-Instruct, 5.14.1": {
        k: v for k, v in SMOL_135M.items() if not k.startswith(("rope_", "torch_"))
    }
    | {"dtype": "float32", "head_dim": 64, "rope_interleaved": False, "use_cache": False}
    | {"rope_parameters": {"rope_theta": 100000, "rope_type": "default"}}
    | {"transformers_version": "5.14.1"},
    "SmolLM2-360M-Instruct": SMOL_SMALL | sizes(960, 2560, 32, 15, 5, 49152),
    "SmolLM2-1.7B-Instruct": SMOL
    | sizes(2048, 8192, 24, 32, 32, 49152)
    | {"rope_theta": 130000}
    | {
        "transformers.js_config": {
            "dtype": "q4",
            "use_external_data_format": {"model.onnx": True, "model_fp16.onnx": True},
            **KV_CACHE,
        }
    },
    "TinyLlama-1.1B-Chat-v1.0": LLAMA
    | sizes(2048, 5632, 22, 32, 4, 32000)
    | {"attention_bias": False, "max_position_embeddings": 2048, "rope_theta": 10000.0}
    | {"transformers_version": "4.35.0"},
    "Llama-2-7b-hf": LLAMA_2_7B,
    "CodeLlama-7b-hf": LLAMA
    | sizes(4096, 11008, 32, 32, 32, 32016)
    | {"_name_or_path": "codellama/CodeLlama-7b-hf", "rope_theta": 1000000}
    | {"max_position_embeddings": 16384, "transformers_version": "4.33.0.dev0"},
    "Meta-Llama-3-8B": LLAMA_3 | LLAMA_8B,
    "Meta-Llama-3-70B-Instruct": LLAMA_3
    | LLAMA_70B
    | {"_name_or_path": "meta-llama/Meta-Llama-3-70B-Instruct"}
    | {"transformers_version": "4.40.1"},
    "Llama-3.1-8B": LLAMA_3_1 | LLAMA_8B,
    "Llama-3.1-8B-Instruct": LLAMA_3_1 | LLAMA_8B | LLAMA_EOS | {"transformers_version": "4.42.3"},
    "Llama-3.1-70B-Instruct": LLAMA_3_1
    | LLAMA_70B
    | LLAMA_EOS
    | {"transformers_version": "4.42.3"},
    "Llama-3.2-1B-Instruct": LLAMA_3_2 | LLAMA_1B | LLAMA_EOS,
    "unsloth/Llama-3.2-1B-Instruct": LLAMA_3_2
    | LLAMA_1B
    | {"eos_token_id": 128009, "pad_token_id": 128004}
    | {"transformers_version": "4.52.0.dev0", "unsloth_fixed": True},
    "Llama-3.2-3B": LLAMA_3_2 | LLAMA_3B,
    "Llama-3.2-3B-Instruct": LLAMA_3_2 | LLAMA_3B | LLAMA_EOS,
    # Read in a copy that adds a project's own fields, which are left out here.
    "vicuna-7b-v1.5-16k": LLAMA_2_7B
    | {"_name_or_path": "vicuna-7b-v1.5-16k", "max_sequence_length": 16384}
    | {"pad_token_id": 0, "rope_scaling": LINEAR_4, "transformers_version": "4.34.0"},
    # This one and the next say how long they are after stretching, 16384: `context_length`, which
    # follows vLLM, stretches that once more.
    "hfl/chinese-alpaca-2-13b-16k": LLAMA
    | sizes(5120, 13824, 40, 40, 40, 55296)
    | {"_name_or_path": "meta-llama/Llama-2-13b-hf", "max_position_embeddings": 16384}
    | {"rope_scaling": LINEAR_4, "torch_dtype": "float16"}
    | {"transformers_version": "4.32.0.dev0"},
    # Printed.
    "deepseek-coder-1.3b-instruct": LLAMA
    | NO_DROPOUT
    | sizes(2048, 5504, 24, 16, 16, 32256)
    | {"_name_or_path": "deepseek-ai/deepseek-coder-1.3b-instruct", "head_dim": 128}
    | {"attention_bias": False, "mlp_bias": False, "bos_token_id": 32013}
    | {"eos_token_id": 32021, "pad_token_id": 32014, "max_position_embeddings": 16384}
    | {"rms_norm_eps": 1e-06, "rope_theta": 100000, "transformers_version": "4.48.3"}
    | {"rope_scaling": {"factor": 4.0, "rope_type": "linear", "type": "linear"}},
    "Nous-Hermes-2-SOLAR-10.7B": LLAMA
    | NO_DROPOUT
    | sizes(4096, 14336, 48, 32, 8, 32002)
    | {"_name_or_path": "upstage/SOLAR-10.7B-v1.0", "attention_bias": False}
    | {"eos_token_id": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0}
    | {"use_cache": False, "transformers_version": "4.37.0.dev0"},
    # Printed.
    "Mistral-7B-v0.1": MISTRAL_V0_1,
    # Printed.
    "Mistral-7B-v0.2": MISTRAL
    | {"_name_or_path": "mistral-hf-7B-v0.2", "transformers_version": "4.37.2"},
    "Mistral-7B-Instruct-v0.3": MISTRAL
    | {"vocab_size": 32768, "transformers_version": "4.42.0.dev0"},
    # Printed.
    "Mistral-Nemo-Base-2407": MISTRAL
    | sizes(5120, 14336, 40, 32, 8, 131072)
    | {"_name_or_path": "mistralai/Mistral-Nemo-Base-2407", "head_dim": 128}
    | {"max_position_embeddings": 128000, "transformers_version": "4.43.3"},
    "Qwen2-0.5B-Instruct": QWEN_2 | QWEN_0_5B | {"transformers_version": "4.40.1"},
    "Qwen2-1.5B-Instruct": QWEN_2 | QWEN_1_5B | TIED | {"transformers_version": "4.40.1"},
    "Qwen2-7B-Instruct": QWEN_7B_INSTRUCT | {"transformers_version": "4.41.2"},
    "Qwen2.5-0.5B": QWEN_2 | QWEN_0_5B | QWEN_BASE,
    "Qwen2.5-1.5B-Instruct": QWEN_2 | QWEN_1_5B | TIED | {"max_window_layers": 21},
    "Qwen2.5-3B": QWEN_2 | QWEN_3B | QWEN_BASE | {"max_window_layers": 36},
    "Qwen2.5-3B-Instruct": QWEN_2 | QWEN_3B | {"max_window_layers": 70},
    "Qwen2.5-7B": QWEN_2 | QWEN_7B | QWEN_BASE | LONG,
    "Qwen2.5-7B-Instruct": QWEN_7B_INSTRUCT,
    # With the lines that its card tells users to add for long texts.
    "Qwen2.5-7B-Instruct, YaRN": QWEN_7B_INSTRUCT
    | {
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        }
    },
    "Qwen2.5-Coder-7B": QWEN_7B_INSTRUCT
    | {"eos_token_id": 151643, "transformers_version": "4.44.0"},
    "Qwen2.5-14B": QWEN_2
    | QWEN_14B
    | LONG
    | {"eos_token_id": 151643, "max_window_layers": 48, "rms_norm_eps": 1e-05},
    "Qwen2.5-32B": QWEN_2
    | QWEN_32B
    | LONG
    | {"eos_token_id": 151643, "max_window_layers": 64, "rms_norm_eps": 1e-05},
    "QwQ-32B": QWEN_2
    | QWEN_32B
    | {"max_position_embeddings": 131072, "max_window_layers": 64, "rms_norm_eps": 1e-05},
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN_2 | QWEN_1_5B | DISTILL | {"max_window_layers": 21},
    "DeepSeek-R1-Distill-Qwen-7B": QWEN_2 | QWEN_7B | DISTILL,
    "Qwen3-0.6B": QWEN_3 | QWEN_3_06B,
    # A fine-tune, saved by transformers 4.54.
    "qwen3-0.6b-base-think-sft": QWEN_3
    | QWEN_3_06B
    | {"layer_types": ["full_attention"] * 28}
    | {"torch_dtype": "float32", "transformers_version": "4.54.0", "use_cache": False},
    "Qwen3-Embedding-0.6B": QWEN_3
    | QWEN_3_06B
    | {"eos_token_id": 151643, "max_position_embeddings": 32768, "vocab_size": 151669}
    | {"transformers_version": "4.51.3"},
    "Qwen3-1.7B": QWEN_3 | sizes(2048, 6144, 28, 16, 8, 151936) | TIED | {"max_window_layers": 28},
    "Qwen3-4B": QWEN_3 | QWEN_3_4B,
    "Qwen3-4B-Instruct-2507": QWEN_3
    | QWEN_3_4B
    | {"max_position_embeddings": 262144, "rope_theta": 5000000},
    "Qwen3-8B": QWEN_3 | sizes(4096, 12288, 36, 32, 8, 151936),
    "Qwen3-14B": QWEN_3 | sizes(5120, 17408, 40, 40, 8, 151936) | {"max_window_layers": 40},
    "Qwen3-32B": QWEN_3 | sizes(5120, 25600, 64, 64, 8, 151936) | {"max_window_layers": 64},
}


class Want(NamedTuple):
    """What is expected of a config.

    parameters: exact where published so (the index's total_size over two bytes, or the elements
                of the safetensors header), else the rounding that the model is named after
    context:    positions that it was made for
    bias:       of q, k and v
    """

    parameters: int | str
    head_dim: int
    kv_heads: int
    context: int
    tied: bool = False
    bias: bool = False
    window: int | None = None
    theta: float = 10000.0
    scaling: RopeScaling | None = None


LLAMA3_8 = {"theta": 5e5, "scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)}
LLAMA3_32 = {"tied": True, "theta": 5e5, "scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192)}
QWEN = {"bias": True, "theta": 1e6}
WANTED = {
    "SmolLM2-135M-Instruct": Want(134515008, 64, 3, 8192, tied=True, theta=1e5),
    "SmolLM2-135M-Instruct, 5.14.1": Want(134515008, 64, 3, 8192, tied=True, theta=1e5),
    "SmolLM2-360M-Instruct": Want(361821120, 64, 5, 8192, tied=True, theta=1e5),
    "SmolLM2-1.7B-Instruct": Want(1711376384, 64, 32, 8192, tied=True, theta=1.3e5),
    "TinyLlama-1.1B-Chat-v1.0": Want(1100048384, 64, 4, 2048),
    "Llama-2-7b-hf": Want(6738415616, 128, 32, 4096),
    "CodeLlama-7b-hf": Want("7B", 128, 32, 16384, theta=1e6),
    "Meta-Llama-3-8B": Want(8030261248, 128, 8, 8192, theta=5e5),
    "Meta-Llama-3-70B-Instruct": Want(70553706496, 128, 8, 8192, theta=5e5),
    "Llama-3.1-8B": Want(8030261248, 128, 8, 131072, **LLAMA3_8),
    "Llama-3.1-8B-Instruct": Want(8030261248, 128, 8, 131072, **LLAMA3_8),
    "Llama-3.1-70B-Instruct": Want(70553706496, 128, 8, 131072, **LLAMA3_8),
    "Llama-3.2-1B-Instruct": Want(1235814400, 64, 8, 131072, **LLAMA3_32),
    "unsloth/Llama-3.2-1B-Instruct": Want(1235814400, 64, 8, 131072, **LLAMA3_32),
    "Llama-3.2-3B": Want(3212749824, 128, 8, 131072, **LLAMA3_32),
    "Llama-3.2-3B-Instruct": Want(3212749824, 128, 8, 131072, **LLAMA3_32),
    "vicuna-7b-v1.5-16k": Want(6738415616, 128, 32, 16384, scaling=LinearScaling(4.0)),
    "hfl/chinese-alpaca-2-13b-16k": Want("13B", 128, 40, 65536, scaling=LinearScaling(4.0)),
    "deepseek-coder-1.3b-instruct": Want(
        1346471936, 128, 16, 65536, theta=1e5, scaling=LinearScaling(4.0)
    ),
    "Nous-Hermes-2-SOLAR-10.7B": Want("10.7B", 128, 8, 4096),
    "Mistral-7B-v0.1": Want(7241732096, 128, 8, 32768, window=4096),
    "Mistral-7B-v0.2": Want(7241732096, 128, 8, 32768, theta=1e6),
    "Mistral-7B-Instruct-v0.3": Want(7248023552, 128, 8, 32768, theta=1e6),
    "Mistral-Nemo-Base-2407": Want(12247782400, 128, 8, 128000, theta=1e6),
    "Qwen2-0.5B-Instruct": Want(494032768, 64, 2, 32768, tied=True, **QWEN),
    "Qwen2-1.5B-Instruct": Want(1543714304, 128, 2, 32768, tied=True, **QWEN),
    "Qwen2-7B-Instruct": Want(7615616512, 128, 4, 32768, **QWEN),
    "Qwen2.5-0.5B": Want(494032768, 64, 2, 32768, tied=True, **QWEN),
    "Qwen2.5-1.5B-Instruct": Want(1543714304, 128, 2, 32768, tied=True, **QWEN),
    "Qwen2.5-3B": Want(3085938688, 128, 2, 32768, tied=True, **QWEN),
    "Qwen2.5-3B-Instruct": Want(3085938688, 128, 2, 32768, tied=True, **QWEN),
    "Qwen2.5-7B": Want(7615616512, 128, 4, 131072, **QWEN),
    "Qwen2.5-7B-Instruct": Want(7615616512, 128, 4, 32768, **QWEN),
    "Qwen2.5-7B-Instruct, YaRN": Want(
        7615616512, 128, 4, 131072, **QWEN, scaling=YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1)
    ),
    "Qwen2.5-Coder-7B": Want(7615616512, 128, 4, 32768, **QWEN),
    "Qwen2.5-14B": Want(14770033664, 128, 8, 131072, **QWEN),
    "Qwen2.5-32B": Want(32763876352, 128, 8, 131072, **QWEN),
    "QwQ-32B": Want(32763876352, 128, 8, 131072, **QWEN),
    "DeepSeek-R1-Distill-Qwen-1.5B": Want(1777088000, 128, 2, 131072, bias=True),
    "DeepSeek-R1-Distill-Qwen-7B": Want(7615616512, 128, 4, 131072, bias=True),
    "Qwen3-0.6B": Want(596049920, 128, 8, 40960, tied=True, theta=1e6),
    "qwen3-0.6b-base-think-sft": Want(596049920, 128, 8, 40960, tied=True, theta=1e6),
    "Qwen3-Embedding-0.6B": Want("0.6B", 128, 8, 32768, tied=True, theta=1e6),
    "Qwen3-1.7B": Want(1720574976, 128, 8, 40960, tied=True, theta=1e6),
    "Qwen3-4B": Want(4022468096, 128, 8, 40960, tied=True, theta=1e6),
    "Qwen3-4B-Instruct-2507": Want(4022468096, 128, 8, 262144, tied=True, theta=5e6),
    "Qwen3-8B": Want(8190735360, 128, 8, 40960, theta=1e6),
    "Qwen3-14B": Want(14768307200, 128, 8, 40960, theta=1e6),
    "Qwen3-32B": Want(32762123264, 128, 8, 40960, theta=1e6),
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_config_has_its_row():
    assert CONFIGS.keys() == WANTED.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hub_config_is_read_without_a_warning(name):
    config, want = ModelConfig.from_hf(CONFIGS[name]), WANTED[name]
    assert (config.head_dim, config.num_key_value_heads) == (want.head_dim, want.kv_heads)
    assert config.context_length == want.context
    assert config.tie_word_embeddings is want.tied
    assert (config.attention_bias, config.attention_out_bias) == (want.bias, False)
    assert config.qk_norm is (config.model_type == "qwen3")
    assert config.sliding_window == want.window
    every_layer = tuple(range(config.num_hidden_layers))
    assert config.sliding_layers == (every_layer if want.window else ())
    assert (config.rope_theta, config.rope_scaling) == (want.theta, want.scaling)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_many_as_published(name):
    count, published = count_parameters(ModelConfig.from_hf(CONFIGS[name])), WANTED[name].parameters
    if isinstance(published, str):
        digits = len(published.rstrip("B").partition(".")[2])
        count = f"{count / 1e9:.{digits}f}B"
    assert count == published


QWEN_MOE = {
    "norm_topk_prob": False,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# Models of other families: the config; the family that their files would be run as, were
# `model_type` to say so; the field that stops that too.
FOREIGN = {
    "Mixtral-8x7B-v0.1": (
        MISTRAL
        | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        | {"num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.02, "transformers_version": "4.36.0.dev0"},
        "mistral",
        "num_local_experts",
    ),
    "Qwen1.5-MoE-A2.7B": (
        QWEN_2
        | QWEN_MOE
        | sizes(2048, 5632, 24, 16, 16, 151936)
        | {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
        | {"decoder_sparse_step": 1, "max_window_layers": 21, "moe_intermediate_size": 1408}
        | {"num_experts": 60, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 5632}
        | {"transformers_version": "4.39.0.dev0"},
        "qwen2",
        "num_experts",
    ),
    "Qwen3-30B-A3B": (
        QWEN_3
        | QWEN_MOE
        | sizes(2048, 6144, 48, 32, 4, 151936)
        | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        | {"decoder_sparse_step": 1, "max_window_layers": 48, "mlp_only_layers": []}
        | {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
        | {"num_experts_per_tok": 8, "rope_theta": 1000000.0},
        "qwen3",
        "num_experts",
    ),
    "gemma-2b": (
        NO_DROPOUT
        | sizes(2048, 16384, 18, 8, 1, 256000)
        | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": 256}
        | {"attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        | {"hidden_act": "gelu", "initializer_range": 0.02, "max_position_embeddings": 8192}
        | {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0}
        | {"torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True},
        "llama",
        "hidden_act",
    ),
    "gemma-3-1b-it": (
        NO_DROPOUT
        | sizes(1152, 6912, 26, 4, 1, 262144)
        | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256}
        | {"attention_bias": False, "bos_token_id": 2, "eos_token_id": [1, 106]}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "pad_token_id": 0}
        | {"cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"}
        | {"initializer_range": 0.02, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06}
        | {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True},
        "llama",
        "hidden_activation",
    ),
    # The two lists of 48 numbers are cut short.
    "Phi-3.5-mini-instruct": (
        BASE
        | NO_DROPOUT
        | sizes(3072, 8192, 32, 32, 32, 32064)
        | {"_name_or_path": "Phi-3.5-mini-instruct", "architectures": ["Phi3ForCausalLM"]}
        | {"model_type": "phi3", "attention_bias": False, "bos_token_id": 1}
        | {
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            }
        }
        | {"embd_pdrop": 0.0, "eos_token_id": 32000, "max_position_embeddings": 131072}
        | {"original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0}
        | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144}
        | {
            "rope_scaling": {
                "long_factor": [1.0800000429153442, 1.1100000143051147],
                "short_factor": [1.0, 1.0199999809265137],
                "type": "longrope",
            }
        }
        | {"transformers_version": "4.43.3"},
        "llama",
        "rope_scaling.rope_type",
    ),
    # In part: the fields that set it apart from Llama.
    "granite-4.1-3b-base": (
        {"model_type": "granite", "hidden_size": 2560, "rms_norm_eps": 1e-05}
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0}
        | {"logits_scaling": 10.0, "residual_multiplier": 0.22, "tie_word_embeddings": True}
        | {"bos_token_id": 100257, "pad_token_id": 100256},
        "llama",
        "logits_scaling",
    ),
    "stablelm-2-zephyr-1_6b": (
        BASE
        | sizes(2048, 5632, 24, 32, 32, 100352)
        | {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
        | {"bos_token_id": 100257, "eos_token_id": 100257, "max_position_embeddings": 4096}
        | {"layer_norm_eps": 1e-05, "partial_rotary_factor": 0.25, "rope_theta": 10000}
        | {"torch_dtype": "float16", "transformers_version": "4.38.0", "use_qkv_bias": True},
        "llama",
        "partial_rotary_factor",
    ),
    "pythia-14m": (
        {k: v for k, v in sizes(128, 512, 6, 4, 4, 50304).items() if "key_value" not in k}
        | {"model_type": "gpt_neox", "attention_bias": True, "attention_dropout": 0.0}
        | {"bos_token_id": 0, "classifier_dropout": 0.1, "eos_token_id": 0, "hidden_act": "gelu"}
        | {"hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-5}
        | {"max_position_embeddings": 2048, "rope_scaling": None, "rotary_emb_base": 10000}
        | {"rotary_pct": 0.25, "tie_word_embeddings": False, "use_cache": False}
        | {"use_parallel_residual": True},
        "llama",
        "hidden_act",
    ),
    "aya-23-8B": (
        sizes(4096, 14336, 32, 32, 8, 256000)
        | NO_DROPOUT
        | {"architectures": ["CohereForCausalLM"], "model_type": "cohere", "hidden_act": "silu"}
        | {"attention_bias": False, "bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0}
        | {"initializer_range": 0.02, "layer_norm_eps": 1e-05, "logit_scale": 0.0625}
        | {"max_position_embeddings": 8192, "rope_theta": 10000, "torch_dtype": "float16"}
        | {"transformers_version": "4.40.0.dev0", "use_cache": True, "use_qk_norm": False},
        "llama",
        "logit_scale",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_of_another_family_is_refused(name):
    raw, _, _ = FOREIGN[name]
    with pytest.raises(ConfigError, match=f"field model_type is '{raw['model_type']}'"):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("name", FOREIGN)
def test_it_is_refused_under_the_name_of_a_known_family_too(name):
    raw, family, field = FOREIGN[name]
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ConfigError, match=re.escape(f"field {field} is ")),
    ):
        ModelConfig.from_hf(raw | {"model_type": family})


# Weights in a form that is not read; the rest of these files is that of the model named first.
QUANTIZED = {
    "TheBloke/Llama-2-7B-Chat-GPTQ": (
        LLAMA_2_7B,
        {
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.01,
            "desc_act": True,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "quant_method": "gptq",
        },
    ),
    "TheBloke/zephyr-7B-alpha-AWQ": (
        MISTRAL_V0_1,
        {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4}
        | {"version": "gemm"},
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_are_refused(name):
    raw, quantization = QUANTIZED[name]
    with pytest.raises(ConfigError, match=f"field quantization_config is .*{quantization['bits']}"):
        ModelConfig.from_hf(raw | {"quantization_config": quantization})


def test_ternary_weights_under_the_name_of_llama_are_refused():
    """bitnet_b1_58-large calls itself a Llama; its own code rounds weights and inputs."""
    raw = (
        LLAMA
        | NO_DROPOUT
        | sizes(1536, 4096, 24, 16, 16, 32002)
        | {"architectures": ["BitnetForCausalLM"], "attention_bias": False, "input_bits": 8}
        | {"max_position_embeddings": 2048, "pad_token_id": 32000, "rope_theta": 10000.0}
        | {"tie_word_embeddings": True, "torch_dtype": "float32", "weight_bits": 1}
    )
    with pytest.raises(ConfigError, match="field weight_bits is 1"):
        ModelConfig.from_hf(raw)


def test_a_field_of_one_publisher_is_reported():
    raw = (  # ALLaM-7B-Instruct-preview
        LLAMA
        | NO_DROPOUT
        | sizes(4096, 11008, 32, 32, 32, 64000)
        | {"attention_bias": False, "head_dim": 128, "initializer_range": 0.006}
        | {"max_position_embeddings": 4096, "mlp_bias": False, "rope_theta": 1000000.0}
        | {"transformers_version": "4.53.0"}
    )
    with pytest.warns(UserWarning, match="does not use: internal_version$"):
        config = ModelConfig.from_hf(raw | {"internal_version": "7b-alpha-v2.33.0.30"})
    assert config == ModelConfig.from_hf(raw)
