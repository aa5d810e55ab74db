"""Which kernel arguments Triton must not compile variants for."""

# Every address, length and stride is a plain argument: the JIT would otherwise compile one kernel per value 1, per
# multiple of 16 and per anything else, for each. What alignment is worth is told by the one constexpr ALIGN instead.
ARGUMENTS = (
    "Q K V Out Lse cu_seqlens_q cu_seqlens_k seqused_q seqused_k page_table sq_capacity sk_capacity batch "
    "tiles_per_sequence fold group q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h "
    "v_stride_b v_stride_s v_stride_h out_stride_split out_stride_b out_stride_s out_stride_h "
    "lse_stride_split lse_stride_b lse_stride_s lse_stride_h table_stride page_size page_magic page_shift "
    "window_left window_right bottom_right chunk tokens_per_split sink sink_kind slopes slopes_stride_b mask "
    "mask_kind mask_wide mask_stride_b mask_stride_h mask_stride_q mask_stride_k tree tree_stride_b "
    "tree_stride_q cache_batch_idx cache_leftpad rotary_cos rotary_sin rotary_kind rotary_dim "
    "rotary_interleaved rotary_positions cos_stride sin_stride max_positions rotary_advances"
).split()
_OWN = (
    "grown room late units units_magic units_shift lanes lanes_magic lanes_shift splits splits_magic splits_shift "
    "ranges even_ranges gap ahead extent extent_blocks states state_lses state_width state_rows fold_magic fold_shift "
    "group_magic group_shift new_k new_v new_k_stride_b new_k_stride_s new_k_stride_h new_v_stride_b new_v_stride_s "
    "new_v_stride_h new_tokens pages"
).split()
_NOT_OWN = {"group", "out_stride_split", "lse_stride_split", "tokens_per_split"}
DECODE_ARGUMENTS = [name for name in ARGUMENTS if name not in _NOT_OWN] + _OWN
MERGE_ARGUMENTS = (
    "Out Lse cu_seqlens_q cu_seqlens_k seqused_q seqused_k cache_leftpad sq_capacity sk_capacity grown room batch "
    "tiles_per_sequence units units_magic units_shift lanes lanes_magic lanes_shift splits ranges even_ranges gap extent "
    "extent_blocks states state_lses state_width state_rows fold fold_magic fold_shift out_stride_b out_stride_s out_stride_h "
    "lse_stride_b lse_stride_s lse_stride_h window_left window_right bottom_right chunk"
).split()
PREFILL_ARGUMENTS = [*ARGUMENTS, "lists", "list_stride_b", "list_stride_h", "list_stride_t"]
MASK_BLOCKS_ARGUMENTS = (
    "lists list_size units tiles seqused_q seqused_k cache_leftpad sq_capacity sk_capacity fold window_left window_right "
    "bottom_right chunk mask mask_kind mask_stride_b mask_stride_h mask_stride_q mask_stride_k"
).split()
FIXUP_INTEGERS = (
    "num_splits rows heads batch po_stride_split po_stride_b po_stride_s po_stride_h "
    "pl_stride_split pl_stride_b pl_stride_s pl_stride_h out_stride_b out_stride_s out_stride_h "
    "lse_stride_b lse_stride_s lse_stride_h"
).split()
