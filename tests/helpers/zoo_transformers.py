"""Every model type of Transformers, as its own config makes it, with few layers and experts: shapes without memory."""

import re
import warnings
from typing import Any

TASKS = """
CAUSAL_LM SEQ_TO_SEQ_CAUSAL_LM IMAGE_TEXT_TO_TEXT SPEECH_SEQ_2_SEQ CTC RNNT TDT MASKED_LM IMAGE_CLASSIFICATION
OBJECT_DETECTION UNIVERSAL_SEGMENTATION SEMANTIC_SEGMENTATION DEPTH_ESTIMATION VIDEO_CLASSIFICATION
TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM AUDIO_CLASSIFICATION PRETRAINING MASK_GENERATION KEYPOINT_MATCHING
KEYPOINT_DETECTION INSTANCE_SEGMENTATION ZERO_SHOT_OBJECT_DETECTION ZERO_SHOT_IMAGE_CLASSIFICATION
VISUAL_QUESTION_ANSWERING RETRIEVAL POSE_ESTIMATION TIME_SERIES_PREDICTION TABLE_RECOGNITION TEXT_RECOGNITION
MASKED_IMAGE_MODELING IMAGE_TO_IMAGE IMAGE_MATTING IMAGE_SEGMENTATION SEQUENCE_CLASSIFICATION
TOKEN_CLASSIFICATION
"""
LAYERS = re.compile(
    r"^(num_(hidden_|encoder_|decoder_|transformer_|attention_)?layers|num_blocks|depth"
    r"|(n|e|d|encoder|decoder|vision|text)_layers?|(encoder|decoder)_num_layers)$"
)
EXPERTS = re.compile(r"^(num_(local_|routed_)?experts|n_routed_experts|moe_num_experts)$")
KINDS_OF_MODELS = """
albert bart bert big_bird blip blip-2 bloom clap clip codegen convnext cvt d_fine dac deberta deepseek_v4 deit
dinov2 distilbert donut-swin dpt efficientnet electra encodec eomt falcon flava florence2 fnet focalnet funnel glpn
groupvit hiera hubert janus jetmoe lasr_ctc layoutlmv3 led levit longt5 lxmert mask2former mgp-str mistral mobilenet_v2
mobilevit mobilevitv2 moshi mpt musicgen opt owlvit perceiver pix2struct pvt_v2 reformer regnet resnet roberta rwkv sam
sam2 segformer sew siglip squeezebert swin swin2sr t5 vilt vit vits wav2vec2 wavlm whisper xcodec xlm-roberta xlnet
yolos zamba zoedepth
"""
# Not built in both (their tables say why), and pixtral: here a vision tower, in mlx-lm a language model.
NOT_IN_BOTH = {"dbrx", "dots1", "gemma3n", "lfm2_moe", "olmo", "pixtral"}
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")
ARGUMENTS: dict[str, dict[str, Any]] = {  # what a config needs and has no default for
    "autoformer": dict(prediction_length=8),
    "esm": dict(vocab_size=33, pad_token_id=1),
    "hunyuan_v1_dense": dict(head_dim=64),
    "hunyuan_v1_moe": dict(head_dim=64, moe_topk=[2, 2], num_experts=8),
    "hunyuan_vl_text": dict(head_dim=64),
    "informer": dict(prediction_length=8),
    "ministral": dict(head_dim=64),
    "nemotron": dict(num_key_value_heads=8),
    "reformer": dict(is_decoder=True),
    "time_series_transformer": dict(prediction_length=8),
    "wav2vec2-bert": dict(vocab_size=32),
    "wav2vec2-conformer": dict(vocab_size=32),
}


def types() -> list[str]:
    """Those that have a model of their own; the others are parts of these."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return [name for name in sorted(CONFIG_MAPPING_NAMES) if classes(name)]


def classes(name: str) -> list[str]:
    """The classes of a type: with a head by tasks, then without."""
    from transformers.models.auto import modeling_auto

    mappings = [*(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS.split()), "MODEL_MAPPING_NAMES"]
    entries = [getattr(modeling_auto, mapping).get(name, ()) for mapping in mappings]
    return [*dict.fromkeys(c for entry in entries for c in ([entry] if isinstance(entry, str) else entry))]


def build(name: str) -> Any:
    """The first class that can be made; raises what the first one does if none can."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    make = getattr(transformers, CONFIG_MAPPING_NAMES[name])
    errors: list[Exception] = []
    for cls in classes(name):
        for few_layers in (True, False):
            try:
                config = make(**ARGUMENTS.get(name, {}))
                return on_meta(getattr(transformers, cls), shrunk(config) if few_layers else config)
            except ImportError:
                raise
            except Exception as error:  # a config raises whatever it meets
                errors.append(error)
    raise errors[0]


def on_meta(cls: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(config)


def shrunk(config: Any) -> Any:
    """A layer of each kind that the config names, two if it names none; at most eight experts."""
    kept = layers_kept(config)
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrunk(value)
        elif LAYERS.match(name) and type(value) is int and value > len(kept):
            setattr(config, name, len(kept))
        elif EXPERTS.match(name) and type(value) is int and value > 8:
            setattr(config, name, 8)
        elif name in KINDS and isinstance(value, list) and len(value) > len(kept):
            setattr(config, name, [value[i] for i in kept if i < len(value)])
    return config


def layers_kept(config: Any) -> list[int]:
    lists = [value for name in KINDS if isinstance(value := vars(config).get(name), list)]
    firsts = {value.index(kind) for value in lists for kind in value if isinstance(kind, str)}
    return sorted(firsts | {0, 1})


def in_both() -> list[str]:
    """The types that mlx-lm has, too."""
    import zoo_mlx

    return sorted({*zoo_mlx.types()} & {*types()} - NOT_IN_BOTH)


def some_types() -> list[str]:
    """The types of the gate: those that mlx-lm has, too, and one of every other kind."""
    return sorted({*KINDS_OF_MODELS.split(), *in_both()})
