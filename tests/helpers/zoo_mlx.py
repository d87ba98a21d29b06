"""Every model type of mlx-lm, small: its arguments filled by the names of their fields. Arrays are lazy."""

import dataclasses
import importlib
import pkgutil
from typing import Any

LAYERS = 4
SIZES = {  # no two that belong to different things are equal, so that no rule is right by chance
    64: "hidden_size d_model n_embd dim model_dim hidden_dim block_dim",
    96: "intermediate_size ffn_hidden_size ff_intermediate_size n_inner block_ff_dim",
    24: "moe_intermediate_size expert_ffn_hidden_size global_head_dim",
    28: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size share_expert_dim",
    LAYERS: "num_attention_heads n_heads n_head num_heads index_n_heads swa_num_attention_heads "
    "num_swa_attention_heads num_hidden_layers n_layers n_layer num_layers "
    "num_transformer_layers linear_num_value_heads group_norm_size",
    2: "num_key_value_heads n_kv_heads num_kv_heads num_attention_groups n_shared_head num_experts_per_tok moe_topk "
    "moe_top_k num_experts_per_token top_k_experts moe_k zero_expert_num n_group o_groups mamba_expand mamba_n_groups "
    "n_groups linear_num_key_heads attn_layer_period expert_layer_period cla_share_factor sliding_window_pattern "
    "layer_group_size full_attention_interval dense_attention_every_n_layers emb_neighbor_num emb_split_num hc_mult "
    "conv_window",
    16: "head_dim hidden_size_per_head kv_channels swa_head_dim qk_nope_head_dim mamba_d_head mamba_head_dim",
    1: "swa_num_key_value_heads num_swa_key_value_heads num_global_key_value_heads n_shared_experts num_shared_experts "
    "num_shared_expert moe_num_shared_experts topk_group num_expert_group first_k_dense_replace num_dense_layers "
    "moe_layer_freq moe_layer_interval decoder_sparse_step attn_layer_offset expert_layer_offset num_kv_reuse_layers "
    "num_kv_shared_layers",
    3: "conv_kernel mamba_d_conv conv_L_cache linear_conv_kernel_dim conv1d_width short_conv_kernel_size d_conv "
    "ngram_vocab_size_ratio",
    5: "time_step_rank mamba_dt_rank v_low_rank_dim",
    6: "num_experts num_local_experts n_routed_experts moe_num_experts a_low_rank_dim laurel_rank",
    8: "qk_rope_head_dim mamba_num_heads mamba_n_heads linear_key_head_dim index_head_dim rotary_dim block_multiple_of "
    "ffn_dim_divisor index_topk",
    10: "state_size ssm_state_size mamba_d_state",
    12: "v_head_dim swa_v_head_dim linear_value_head_dim hidden_size_per_layer_input",
    20: "kv_lora_rank o_lora_rank moe_latent_size",
    32: "sliding_window attention_window_size sliding_window_size window_size dim_model_base",
    36: "q_lora_rank",
    40: "moe_hidden_size routed_expert_hidden_size",
    112: "intermediate_size_mlp",
    128: "max_position_embeddings n_ctx n_positions block_size model_max_length mamba_d_ssm",
    144: "vocab_size_per_layer_input",
    160: "vocab_size num_vocab",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()} | dict(decay_low_rank_dim=7)
SIZE |= dict(gate_low_rank_dim=9)
FIELDS: dict[str, Any] = dict(
    rope_theta=1e4, partial_rotary_factor=0.5, mlp_only_layers=[], attention_method="MLA", zero_expert_type="identity"
)
FIELDS |= dict(scoring_func="sigmoid", topk_method="noaux_tc", rms_norm_eps=1e-5)
FLAGS_OFF = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias"}
ROPE: dict[str, Any] = dict(rope_theta=1e4)
BY_LAYER = dict(full_attention=ROPE, sliding_attention=ROPE)
YARN = dict(factor=2.0, type="yarn", original_max_position_embeddings=64)
SLIDING = ["full_attention", "sliding_attention"] * 2
CONVOLVED = ["conv", "full_attention"] * 2
KIMI = dict(kda_layers=[1, 3], full_attn_layers=[2, 4], num_heads=4, head_dim=16, short_conv_kernel_size=3)
PACKED = dict(path="lm_head", embedding=False, dtype="float16", block=0)


def block(attention: dict[str, Any], feed_forward: dict[str, Any]) -> dict[str, Any]:
    return dict(attention=attention, ffn=feed_forward)


ARGUMENTS: dict[str, dict[str, Any]] = {  # what the names of fields do not tell
    "afmoe": dict(layer_types=SLIDING),
    "baichuan_m1": dict(sliding_window_layers=[0, 2]),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=6, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
    ),
    "deepseek_v2": dict(rope_scaling=YARN),
    "deepseek_v41": dict(
        compress_ratios=[2, 4] * 2, kv_source_layer_ids=[0, 2], index_source_layer_ids=[0, 2], rope_scaling=YARN
    ),
    "exaone4": dict(rope_scaling=None, sliding_window_pattern="LG"),
    "exaone_moe": dict(
        layer_types=SLIDING, is_moe_layer=[False, True, True, True], sliding_window_pattern="LG", rope_scaling=None
    ),
    "gear": dict(layer_types=["full_attention", "conv_mixer", "sliding_attention", "full_attention"]),
    "gemma3n": dict(
        layer_types=SLIDING,
        activation_sparsity_pattern=[0.95, 0.95, 0, 0],
        altup_num_inputs=3,
        altup_active_idx=0,
        intermediate_size=[96] * LAYERS,
    ),
    "gemma4_text": dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=40),
    "glm_moe_dsa": dict(rope_parameters=ROPE),
    "gpt_neox": dict(rotary_emb_base=10000),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "hunyuan": dict(rope_scaling=dict(type="dynamic", factor=1.0, alpha=1000.0)),
    "kimi_linear": dict(linear_attn_config=KIMI),
    "kimi_k3": dict(
        linear_attn_config=KIMI,
        attn_res_block_size=2,
        activation_situ_beta=1.0,
        activation_situ_linear_beta=1.0,
        hidden_act="situ",
        mla_use_output_gate=True,
        latent_moe_use_norm=True,
    ),
    "laguna": dict(rope_parameters=ROPE),
    "lfm2": dict(layer_types=CONVOLVED),
    "lfm2_moe": dict(layer_types=CONVOLVED),
    "llama4": dict(interleave_moe_layer_step=2, num_experts_per_tok=1, rope_scaling=None, attention_chunk_size=32),
    "llama4_text": dict(no_rope_layers=[1, 1, 0, 1]),
    "mellum": dict(layer_types=SLIDING, rope_parameters=BY_LAYER),
    "mimo_v2_flash": dict(hybrid_layer_pattern=[0, 1, 0, 1], moe_layer_freq=[0, 1, 1, 1]),
    "minicpm3": dict(rope_scaling=dict(original_max_position_embeddings=64)),
    "minimax_m3_vl": dict(
        sparse_attention_freq=[0, 1, 0, 1],
        moe_layer_freq=[0, 1, 1, 1],
        index_n_heads=4,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "ministral3": dict(rope_parameters=ROPE | dict(llama_4_scaling_beta=0.1, original_max_position_embeddings=64)),
    "muse_spark": dict(
        rope_parameters=ROPE, layer_rope_theta=[1e4] * LAYERS, layer_types=SLIDING, num_shared_experts=0
    ),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron_h": dict(hybrid_override_pattern=["M", "*", "E", "-"]),
    "nemotron-nas": dict(
        block_configs=[
            block(dict(n_heads_in_group=2), dict(ffn_mult=1.5)),
            block(dict(no_op=True), dict(no_op=True)),
            block(dict(replace_with_linear=True), dict(replace_with_linear=True)),
            block(dict(n_heads_in_group=4), dict(ffn_mult=2.5)),
        ]
    ),
    "openelm": dict(num_query_heads=[4] * LAYERS, num_kv_heads=[2] * LAYERS, ffn_multipliers=[1.5, 2.0, 2.0, 2.0]),
    "prism_hadamard_qwen35": dict(
        hidden_size=128,  # of packed layers, which must divide by it
        tensor_namespace="mlx-vlm-qwen3_5",
        quantization=dict(bits=2, group_size=128, mode="affine"),
        modules=[PACKED],
    ),
    "qwen3": ROPE,
    "recurrent_gemma": dict(block_types=["recurrent", "attention"] * 2, _block_types=None),
    "spark2_5": dict(rope_parameters=BY_LAYER),
}
TEXT = {  # of models around a language model: the module and class of its arguments
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("deepseek_v3", "ModelArgs"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("llama", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
VISION = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
AROUND = {"muse_spark": dict(vision_config=VISION | dict(pos_emb_height=8, pos_emb_width=8))}
PARTS = "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm switch_layers"  # of models


def types() -> list[str]:
    import mlx_lm.models

    return [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name not in PARTS.split()]


def build(name: str) -> Any:
    module: Any = importlib.import_module(f"mlx_lm.models.{name}")
    arguments = ARGUMENTS.get(name, {})
    if name in TEXT:
        inner, cls = TEXT[name]
        text = getattr(importlib.import_module(f"mlx_lm.models.{inner}"), cls)
        arguments = dict(
            arguments, text_config=filled(text, ARGUMENTS.get(inner, {}) | arguments), **AROUND.get(name, {})
        )
    return module.Model(module.ModelArgs(**filled(module.ModelArgs, arguments | dict(model_type=name))))


def filled(cls: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's dataclass: those given, known sizes, and a value for every field that needs one."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        is_list = "List" in str(field.type) or isinstance(field.default, list | tuple)
        if field.name in arguments:
            values[field.name] = arguments[field.name]
        elif field.name in SIZE and not is_list:
            values[field.name] = SIZE[field.name]
        elif needed:
            values[field.name] = FIELDS.get(field.name, usual(field.name, str(field.type)))
    return values


def usual(name: str, kind: str) -> Any:
    if "bool" in kind and "List" not in kind:
        return name not in FLAGS_OFF
    return None if kind.startswith("typing.Optional") else 1.0 if "float" in kind and "Dict" not in kind else {}
