"""Flags of diffusers' training scripts (and of their kin) that are not settings here, and what takes their place."""

from __future__ import annotations

from collections.abc import Mapping

_IMAGES = "validation uses held-out examples of the data, their captions and conditions; see data.validation_share."
_RATE = "the learning rate is taken as it is given; multiply --learning_rate by processes and batch yourself."
_LORA = "what is trained is a T2I-Adapter, not a LoRA; its size is adapter.channels and adapter.num_res_blocks."
_FULL = "the base stays frozen, nothing but the adapter is trained; leave it out."
_DREAM = "subjects and their classes (DreamBooth) are not trained here; captions come with the data."
_BIAS = "which timesteps are trained is --timestep_sampling, uniform or cubic."
_ATTENTION = "attention is torch's own, which keeps no scores; leave it out."
_WORDS = "no words are learned here (textual inversion); load learned ones into the base that you give."
_TEXT = "texts are encoded as the base's pipeline does it; leave it out."
_SAVED = "the adapter is saved as float32 safetensors, the base is not saved; leave it out."
_ADAM = "the optimizer is AdamW, in 8 bits with --use_8bit_adam; leave it out."
_LOADER = "the loader has --dataloader_num_workers alone; leave it out."
_PRECISION = "say --mixed_precision fp16 or --mixed_precision bf16."
_BUCKETS = "there are no buckets, all images are scaled and cropped to --resolution; leave it out."
_CAPTIONS = "captions are read as they are, from the data set that data/make_dataset.py makes; leave it out."
_ADAPTER = "the adapter's size is adapter.channels and adapter.num_res_blocks."
_LOSS = "the denoising loss is the mean of squares as published; the local term is set by loss.*."
_MEMORY = "memory is saved by --gradient_checkpointing, --mixed_precision and data.keep_latents."

ELSEWHERE: Mapping[str, str] = {
    # of several scripts
    **dict.fromkeys(("rank", "lora_alpha", "lora_dropout", "lora_layers", "use_dora"), _LORA),
    **dict.fromkeys(
        ("train_text_encoder", "train_text_encoder_ti", "text_encoder_lr", "adam_weight_decay_text_encoder"), _FULL
    ),
    **dict.fromkeys(
        (
            "instance_prompt",
            "class_data_dir",
            "class_prompt",
            "with_prior_preservation",
            "prior_loss_weight",
            "num_class_images",
            "prior_generation_precision",
            "class_labels_conditioning",
        ),
        _DREAM,
    ),
    **dict.fromkeys(
        ("placeholder_token", "initializer_token", "token_abstraction", "learnable_property", "num_vectors"), _WORDS
    ),
    **dict.fromkeys(
        (
            "timestep_bias_strategy",
            "timestep_bias_multiplier",
            "timestep_bias_begin",
            "timestep_bias_end",
            "timestep_bias_portion",
            "weighting_scheme",
            "logit_mean",
            "logit_std",
            "mode_scale",
        ),
        _BIAS,
    ),
    **dict.fromkeys(
        ("enable_xformers_memory_efficient_attention", "enable_npu_flash_attention", "xformers"), _ATTENTION
    ),
    **dict.fromkeys(("validation_prompt", "validation_prompts", "validation_image", "validation_images"), _IMAGES),
    **dict.fromkeys(
        (
            "tokenizer_max_length",
            "max_sequence_length",
            "text_encoder_use_attention_mask",
            "pre_compute_text_embeddings",
            "skip_save_text_encoder",
        ),
        _TEXT,
    ),
    **dict.fromkeys(("save_as_full_pipeline", "upcast_before_saving", "no_safe_serialization"), _SAVED),
    **dict.fromkeys(
        ("optimizer", "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        _ADAM,
    ),
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
        ),
        _LOADER,
    ),
    **dict.fromkeys(("fp16", "bf16", "do_fp16"), _PRECISION),
    # train_t2i_adapter_sdxl.py, train_controlnet.py
    "tokenizer_name": "the base's own tokenizer is used; give a base that has the one you want.",
    "controlnet_model_name_or_path": "T2I-Adapters are trained; continue from one by --adapter_model_name_or_path.",
    "detection_resolution": "conditions are taken from the training picture, at --resolution.",
    "crops_coords_top_left_h": "the crop of each picture is known and given to SDXL; leave it out.",
    "crops_coords_top_left_w": "the crop of each picture is known and given to SDXL; leave it out.",
    "scale_lr": _RATE,
    "logging_dir": "logs go into the folder logs of --output_dir.",
    "set_grads_to_none": "gradients are always set to none; leave it out.",
    "validation_epochs": "validations are counted in steps, --validation_steps.",
    "validation_scheduler": "it is called --validation.scheduler.",
    "image_interpolation_mode": "pictures are scaled by one method; that of conditions is "
    "data.conditioning_interpolation.",
    # train_text_to_image.py and its SDXL and LoRA forms
    "input_perturbation": "the noise is not perturbed; leave it out.",
    "noise_offset": "the noise has no offset; leave it out.",
    "dream_training": "DREAM is not here; leave it out.",
    "dream_detail_preservation": "DREAM is not here; leave it out.",
    "snr_gamma": "the denoising loss is unweighted as published; the local term is weighted by "
    "loss.schedule=snr and loss.snr_cap.",
    "prediction_type": "what the base predicts is read from its scheduler; leave it out.",
    "non_ema_revision": "say --revision.",
    "offload_ema": "the average stays on the device; leave it out.",
    "foreach_ema": "how the average is computed cannot be chosen; leave it out.",
    # train_dreambooth.py and textual inversion
    "instance_data_dir": "say --train_data_dir.",
    "repeats": "say --num_train_epochs.",
    "sample_batch_size": "it is called --validation.batch_size.",
    "save_steps": "it is called --checkpointing_steps.",
    "local_rank": "`accelerate launch` tells each process its number; leave it out.",
    "vae_path": "it is called --pretrained_vae_model_name_or_path.",
    "vae_encode_batch_size": "latents are encoded batch by batch, or kept by data.keep_latents; leave it out.",
    "seed_everything": "it is called --seed.",
    # kohya's sd-scripts
    **dict.fromkeys(("network_dim", "network_alpha", "network_module", "network_args", "network_dropout"), _LORA),
    **dict.fromkeys(("network_weights", "network_train_unet_only", "network_train_text_encoder_only"), _LORA),
    **dict.fromkeys(("unet_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2"), _FULL),
    **dict.fromkeys(("enable_bucket", "bucket_reso_steps", "bucket_no_upscale"), _BUCKETS),
    **dict.fromkeys(("min_bucket_reso", "max_bucket_reso", "skip_image_resolution"), _BUCKETS),
    **dict.fromkeys(("shuffle_caption", "keep_tokens", "keep_tokens_separator", "caption_separator"), _CAPTIONS),
    **dict.fromkeys(("caption_extension", "caption_extention", "caption_prefix", "caption_suffix"), _CAPTIONS),
    **dict.fromkeys(("weighted_captions", "token_warmup_step", "caption_tag_dropout_rate"), _CAPTIONS),
    **dict.fromkeys(("cond_emb_dim", "control_net_lllite_path", "controlnet_model_path"), _ADAPTER),
    **dict.fromkeys(("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred"), _LOSS),
    **dict.fromkeys(("loss_type", "huber_c", "huber_schedule", "huber_scale", "v_pred_like_loss"), _LOSS),
    **dict.fromkeys(("noise_offset_type", "multires_noise_iterations", "multires_noise_discount"), "leave it out."),
    **dict.fromkeys(("ip_noise_gamma", "adaptive_noise_scale"), "the noise is not perturbed; leave it out."),
    **dict.fromkeys(("min_timestep", "max_timestep"), _BIAS),
    **dict.fromkeys(("v2", "v_parameterization", "zero_terminal_snr"), "it is read from the base; leave it out."),
    **dict.fromkeys(("optimizer_type", "optimizer_args"), _ADAM),
    **dict.fromkeys(("max_data_loader_n_workers", "persistent_data_loader_workers"), _LOADER),
    **dict.fromkeys(("sdpa", "mem_eff_attn"), _ATTENTION),
    **dict.fromkeys(("sample_prompts", "sample_at_first", "sample_sampler"), _IMAGES),
    **dict.fromkeys(("sample_every_n_steps", "sample_every_n_epochs"), "say --validation_steps."),
    **dict.fromkeys(("save_every_n_steps", "save_every_n_epochs", "save_state"), "say --checkpointing_steps."),
    **dict.fromkeys(("save_last_n_steps", "save_last_n_epochs"), "say --checkpoints_total_limit."),
    **dict.fromkeys(("save_precision", "save_model_as"), _SAVED),
    **dict.fromkeys(("lowram", "highvram", "fp8_base", "cache_text_encoder_outputs"), _MEMORY),
    **dict.fromkeys(("cache_latents", "cache_latents_to_disk"), "say data.keep_latents."),
    **dict.fromkeys(("full_fp16", "full_bf16"), _PRECISION),
    **dict.fromkeys(("clip_skip", "max_token_length"), _TEXT),
    **dict.fromkeys(("flip_aug", "color_aug"), "images are mirrored by --random_flip, and not changed otherwise."),
    "random_crop": "say --center_crop false.",
    "caption_dropout_rate": "it is called --proportion_empty_prompts.",
    "dataset_config": "data sets are named by data and data.path.",
    "config_file": "settings are key=value, or a file of config/experiment.",
    "in_json": "say data=imagefolder data.path=FOLDER.",
    "conditioning_data_dir": "say data.conditioning_image_column.",
    "resume": "say --resume_from_checkpoint.",
    "log_with": "say --report_to.",
    "log_prefix": "runs are named by wandb.name.",
    "wandb_run_name": "it is called --wandb.name.",
    "output_name": "say --output_dir.",
    "max_train_epochs": "it is called --num_train_epochs.",
    "lr_scheduler_num_cycles": "it is called --lr_num_cycles.",
    "lr_scheduler_power": "it is called --lr_power.",
    "vae": "it is called --pretrained_vae_model_name_or_path.",
    "vae_batch_size": "latents are encoded batch by batch; leave it out.",
    "no_half_vae": "the VAE runs in float32 where it needs it; leave it out.",
    # other trainers
    "bs": "it is called --train_batch_size.",
    "batchsize": "it is called --train_batch_size; of validation, --validation.batch_size.",
    "steps": "it is called --max_train_steps.",
    "model": "say --pretrained_model_name_or_path.",
    "output": "it is called --output_dir.",
    "lr": "it is called --learning_rate.",
    "batch_size": "it is called --train_batch_size; of validation, --validation.batch_size.",
    "per_device_train_batch_size": "it is called --train_batch_size.",
    "weight_decay": "it is called --adam_weight_decay.",
    "warmup_steps": "it is called --lr_warmup_steps.",
    "lr_warmup_ratio": "the warm-up is counted in steps, --lr_warmup_steps.",
    "warmup_ratio": "the warm-up is counted in steps, --lr_warmup_steps.",
    "max_steps": "it is called --max_train_steps.",
    "epochs": "it is called --num_train_epochs.",
    "eval_steps": "it is called --validation_steps.",
    "save_total_limit": "it is called --checkpoints_total_limit.",
    "logging_first_step": "rows are written every --logging_steps; leave it out.",
    "num_workers": "it is called --dataloader_num_workers.",
    "num_inference_steps": "say --validation.num_inference_steps, or --early_stopping.num_inference_steps.",
    "guidance_scale": "say --validation.guidance_scale, or --early_stopping.guidance_scale.",
    "caption_dropout": "it is called --proportion_empty_prompts.",
}
