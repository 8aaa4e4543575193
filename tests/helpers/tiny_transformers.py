"""Tiny random pipelines of transformers, of the real classes."""

from __future__ import annotations

from typing import Any

import diffusers
from conftest import TEXT_WIDTH, tiny_scheduler, tiny_text_config, tiny_tokenizer, tiny_vae
from diffusers import DiffusionPipeline
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's fast tokenizer in small: single characters and some words, an end token and no start token."""
    words = ["▁", "▁a", "▁cat", "▁dog", "s", ",", "▁dogs", *(chr(code) for code in range(97, 123)), "."]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -float(len(words))) for word in words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def tiny_t5(vocabulary: int, width: int = TEXT_WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def pixart() -> DiffusionPipeline:
    tokenizer = t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=4,
        patch_size=2,
        use_additional_conditions=False,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(tiny_scheduler().config)
    return diffusers.PixArtSigmaPipeline(tokenizer, tiny_t5(len(tokenizer)), tiny_vae(), transformer, scheduler)


def sd3(**options: Any) -> DiffusionPipeline:
    first, second, third = tiny_tokenizer(), tiny_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **options,
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(tiny_text_config(first)),
        tokenizer=first,
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(second)),
        tokenizer_2=second,
        text_encoder_3=tiny_t5(len(third), 2 * TEXT_WIDTH),
        tokenizer_3=third,
    )


def flux() -> DiffusionPipeline:
    tokenizer, other = tiny_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(len(other)),
        tokenizer_2=other,
        transformer=transformer,
    )


def flux2() -> DiffusionPipeline:
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=64
        ),
        text_encoder=Qwen3ForCausalLM(qwen3_config(28)),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's tokenizer in small: single bytes, and each word of the template, which has 34 tokens before the prompt."""
    first = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*first, "<|endoftext|>"])}, merges=[], model_max_length=512
    )
    words = (
        "Describe the image by detailing color shape size texture quantity text spatial relationships of objects and"
    )
    tokens = ["<|im_start|>", "<|im_end|>", "system", "user", "assistant", "Describe", " background"]
    tokenizer.add_tokens([*tokens, *(f" {word}" for word in words.split()[1:])])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def qwen_image() -> DiffusionPipeline:
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 2.0, 1.5, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def qwen3_config(layers: int = 2) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )


def z_image() -> DiffusionPipeline:
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.1)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=Qwen3Model(qwen3_config()),
        tokenizer=qwen_tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[2, 2, 4],
            axes_lens=[256, 32, 32],
        ),
    )
