"""Small models with the layers of the real ones, from their own configs: nothing is downloaded."""

import importlib

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = SIZES | TOKENS | dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
VISION = SIZES | dict(image_size=8, patch_size=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16) | TOKENS
HALVES = ("encoder", "decoder")
WHISPER = {
    f"{half}_{name}": n for half in HALVES for name, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}
WHISPER |= dict(d_model=32, vocab_size=64, num_mel_bins=8, max_source_positions=16, max_target_positions=16)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=64)
TORCH = {  # class in transformers, config
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | dict(tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", LLAMA | EXPERTS),
    "gemma": ("GemmaForCausalLM", LLAMA),
    "mixtral": ("MixtralForCausalLM", LLAMA | dict(num_local_experts=4)),
    "vit": ("ViTForImageClassification", VISION),
    "convnext": ("ConvNextForImageClassification", dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
    "whisper": ("WhisperForConditionalGeneration", WHISPER | TOKENS | dict(decoder_start_token_id=1)),
    "t5": ("T5ForConditionalGeneration", T5 | TOKENS),
    "phi3": ("Phi3ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "gpt_oss": ("GptOssForCausalLM", LLAMA | dict(num_local_experts=4)),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES | TOKENS),
    "falcon": ("FalconForCausalLM", SIZES | TOKENS | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT2),
}
MLX_LLAMA = {k: v for k, v in LLAMA.items() if k not in TOKENS} | dict(rms_norm_eps=1e-6, rope_theta=1e4)
MLX_MOE = EXPERTS | dict(decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True)
MLX_GPT2 = {k: v for k, v in GPT2.items() if k not in TOKENS} | dict(n_ctx=16, layer_norm_epsilon=1e-5)
MLX = {  # module of mlx_lm.models, its arguments
    "llama": ("llama", MLX_LLAMA | dict(tie_word_embeddings=False)),
    "qwen3": ("qwen3", MLX_LLAMA | dict(tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", MLX_LLAMA | MLX_MOE | dict(tie_word_embeddings=False)),
    "phi3": ("phi3", {k: v for k, v in MLX_LLAMA.items() if k != "head_dim"}),
    "gpt2": ("gpt2", MLX_GPT2),
}


def torch_model(name):
    import transformers

    head, config = TORCH[name]
    model = getattr(transformers, head)
    return model(model.config_class(**config))


def mlx_model(name):
    module, args = MLX[name]
    models = importlib.import_module(f"mlx_lm.models.{module}")
    return models.Model(models.ModelArgs(model_type=module, **args))
