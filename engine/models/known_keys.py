"""Keys of a configuration that change nothing this engine computes; any other is read, or refused by name.

A family's `describe` reads the keys that it knows (`RawConfig` notes which); others have to stand here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nudging.errors import CheckpointError
from nudging.models.json_config import MISSING, RawConfig, printable, shown

# Where the model comes from and what saved it, how it was trained, and other heads than the one for text.
_LISTED = """
_name_or_path name_or_path _commit_hash architectures auto_map model_type transformers_version
torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss trust_remote_code tokenizer_class
unsloth_fixed unsloth_version is_llama_config transformers.js_config ffn_dim_multiplier multiple_of

initializer_range initializer_factor pretraining_tp gradient_checkpointing neftune_noise_alpha
attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob
attention_probs_dropout_prob classifier_dropout summary_first_dropout dropout activation_dropout layerdrop
loss_type base_model_name_or_path base_model_tp_plan base_model_pp_plan

id2label label2id num_labels problem_type finetuning_task task_specific_params prefix

use_cache return_dict output_hidden_states output_attentions chunk_size_feed_forward cache_implementation
attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
_flash_attn_2_enabled _experts_implementation experts_implementation use_flash_attn
use_flash_attention use_flash_attention_2 keys_to_ignore_at_inference is_decoder tie_encoder_decoder

max_sequence_length max_seq_length max_seq_len seq_length model_max_length
original_max_position_embeddings

bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id
decoder_start_token_id

max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids
num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
target_lookbehind output_logits max_time stop_strings penalty_alpha dola_layers guidance_scale token_healing
renormalize_logits sequence_bias force_words_ids constraints low_memory prompt_lookup_num_tokens
max_matching_ngram_size watermarking_config cache_config disable_compile prefill_chunk_size
return_legacy_cache
"""
HARMLESS = frozenset(_LISTED.split())

# Words of other models and of older code, each harmless at the value under which it does nothing.
NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "use_bias", "bias"), False),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "use_mrope", "use_dual_chunk_attn"), False),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "rope_interleaved", "alibi"), False),
    **dict.fromkeys(("use_bidirectional_attention", "use_parallel_residual"), False),
    **dict.fromkeys(("is_causal", "use_rope", "rotary"), True),
    **dict.fromkeys(("logits_scaling", "logit_scale", "embedding_multiplier", "residual_multiplier"), 1),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor", "partial_rotary_factor"), 1),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_nextn_predict_layers"), 0),
    "pruned_heads": {},
}

ROPE_HARMLESS = frozenset({"finetuned", "original_max_position_embeddings"})
ROPE_NEUTRAL: Mapping[str, Any] = {"extrapolation_factor": 1, "attn_factor": 1}


def refuse_unread(
    raw: RawConfig,
    owner: str,
    harmless: Iterable[str] = HARMLESS,
    neutral: Mapping[str, Any] = NEUTRAL,
) -> None:
    """Raise CheckpointError for the keys that nobody has read and that may matter; a null says nothing."""
    left = sorted(raw.values.keys() - raw.seen - set(harmless))
    unread = [
        key for key in left if raw.values[key] is not None and raw.values[key] != neutral.get(key, MISSING)
    ]
    if unread:
        listed = ", ".join(f"{printable(key)} = {shown(raw.values[key])}" for key in unread)
        raise CheckpointError(
            f"{raw.where}: {listed} must be missing in {owner}: nothing says what it does there, and it may "
            "change what the model computes; remove what changes nothing, or correct the file"
        )
