"""Every rotary type that transformers ships, with the settings that set it apart: `VARIANTS`, on a tiny Llama config."""

from __future__ import annotations

import transformers

HEAD, DIM = 3, 12
CONTEXT, ORIGINAL = 64, 32  # positions the config allows, and those before context extension
SHORT, LONG = 7, 91  # lengths of a call: inside the original context, beyond the extended one

PAIRS = DIM // 2
ROPE_TYPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * i for i in range(PAIRS)],
        "long_factor": [2.0 + 0.7 * i for i in range(PAIRS)],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
VARIANTS = {
    **{name: {"rope_type": name, **settings} for name, settings in ROPE_TYPES.items()},
    "yarn-mscale": {"rope_type": "yarn", **ROPE_TYPES["yarn"], "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-untruncated": {"rope_type": "yarn", **ROPE_TYPES["yarn"], "truncate": False, "beta_fast": 16.0},
    "yarn-attention-factor": {"rope_type": "yarn", **ROPE_TYPES["yarn"], "attention_factor": 1.7},
    "longrope-attention-factor": {"rope_type": "longrope", **ROPE_TYPES["longrope"], "attention_factor": 1.4},
}


def llama_config(rope: dict, **settings) -> transformers.LlamaConfig:
    """A Llama config of six query heads, three KV heads of 12 and the given rotary settings."""
    sizes = {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": HEAD, "head_dim": DIM}
    return transformers.LlamaConfig(
        **{**sizes, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT, **settings},
        rope_parameters={"rope_theta": 5e4, **rope},
    )
