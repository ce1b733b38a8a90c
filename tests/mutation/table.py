"""Which tests concern which module; tests/front/test_mutation_table.py makes sure that none is missing."""

from __future__ import annotations

from pathlib import Path

# Folders whose every module is here. The other modules of optx and kernels are here if they are sampled.
FOLDERS = ("optx/step", "optx/delta", "optx/inject", "optx/signal", "optx/transforms", "optx/analysis")

_STEP = "moments user_rules perpgrad adamr skip_nonfinite fused_cpu wrap_bases resume"

# Module -> its test files, without their folder, test_ and .py, the likeliest to notice a fault first.
TABLE = {
    "optx/analysis/gradients.py": "analysis iaa",
    "optx/analysis/softmax.py": "analysis",
    "optx/delta/_apply.py": "arithmetic_delta whole_contents odd_numbers delta",
    "optx/delta/_between.py": "tied_and_untied new_heads delta",
    "optx/delta/_bitmask.py": "arithmetic_delta compeft compeft_files golomb",
    "optx/delta/_combine.py": "arithmetic_delta merge merge_peers pcb",
    "optx/delta/_compressed.py": "arithmetic_delta compeft compeft_files",
    "optx/delta/_content.py": "whole_contents",
    "optx/delta/_coordinate_search.py": "search",
    "optx/delta/_difference.py": "arithmetic_delta delta merge prune",
    "optx/delta/_first_layers.py": "arithmetic_options rws",
    "optx/delta/_float32_sums.py": "arithmetic_delta delta merge prune",
    "optx/delta/_golomb.py": "golomb compeft",
    "optx/delta/_input_stats.py": "arithmetic_delta search_q prune learn_q",
    "optx/delta/_learn_q.py": "arithmetic_delta learn_q",
    "optx/delta/_lora.py": "arithmetic_inject delta_lora",
    "optx/delta/_adapted_source.py": "merge_yaml_models",
    "optx/delta/_merge_config_json.py": "merge_yaml_models merge_yaml",
    "optx/delta/_merge_group.py": "merge_yaml merge_yaml_forms merge_yaml_pieces",
    "optx/delta/_merge_kernels.py": "merge_yaml merge_yaml_pieces",
    "optx/delta/_merge_method.py": "merge pcb",
    "optx/delta/_merge_methods.py": "merge_cli merge_yaml merge_yaml_forms",
    "optx/delta/_merge_plan.py": "merge_yaml merge_yaml_models merge_yaml_forms",
    "optx/delta/_merge_settings.py": "merge_yaml merge_yaml_forms merge_cli",
    "optx/delta/_merge_spheres.py": "merge_yaml merge_examples",
    "optx/delta/_merge_task_vectors.py": "merge_yaml merge_examples",
    "optx/delta/_merge_vocabulary.py": "merge_vocabulary",
    "optx/delta/_merge_whole.py": "merge_yaml merge_examples",
    "optx/delta/_model_layers.py": "merge_yaml merge_yaml_models",
    "optx/delta/_mixed_sum.py": "whole_contents",
    "optx/delta/_mixed_sum_loops.py": "whole_contents",
    "optx/delta/_name_filter.py": "delta merge rws",
    "optx/delta/_one_pass.py": "arithmetic_delta prune delta",
    "optx/delta/_options.py": "arithmetic_options merge merge_peers pcb",
    "optx/delta/_order_statistics.py": "arithmetic_delta merge compeft",
    "optx/delta/_order_statistics_loops.py": "merge compeft",
    "optx/delta/_delta_pruning.py": "arithmetic_delta prune learn_q delta",
    "optx/delta/_quantize.py": "arithmetic_delta rws",
    "optx/delta/_random_mask.py": "arithmetic_delta prune delta merge",
    "optx/delta/_random_mask_loops.py": "arithmetic_delta prune delta merge",
    "optx/delta/_refusals.py": "odd_numbers",
    "optx/delta/_signs.py": "arithmetic_delta compeft",
    "optx/delta/_ties.py": "tied_and_untied",
    "optx/delta/_yaml.py": "yaml_bounds merge_cli",
    "optx/delta/arithmetic.py": "arithmetic_delta arithmetic_options merge merge_peers",
    "optx/delta/compeft.py": "arithmetic_delta arithmetic_options compeft compeft_files golomb",
    "optx/delta/dare.py": "arithmetic_delta arithmetic_options merge merge_peers",
    "optx/delta/pcb.py": "arithmetic_delta arithmetic_options pcb merge",
    "optx/delta/prune.py": "arithmetic_delta prune delta",
    "optx/delta/rws.py": "arithmetic_delta rws",
    "optx/delta/search_q.py": "arithmetic_delta search_q prune",
    "optx/delta/ties.py": "arithmetic_delta arithmetic_options merge merge_peers pcb",
    "optx/inject/_alternatives.py": "all_linear attach_targets",
    "optx/inject/_anatomy.py": "anatomy targets families",
    "optx/inject/_aside.py": "aside_stream aside_others iaa",
    "optx/inject/_attention.py": "prefix prefix_models prefix_torch adapters",
    "optx/inject/_bottleneck.py": "arithmetic_inject adapters adapter_places adapter_training prefix",
    "optx/inject/_computes.py": "computes quantised guards_weights lora",
    "optx/inject/_embeddings.py": "arithmetic_inject lora_modules lora lora_peft",
    "optx/inject/_experts.py": "expert_models experts_peft",
    "optx/inject/_file_bounds.py": "file_bounds",
    "optx/inject/_file_patterns.py": "file_patterns",
    "optx/inject/_encoder.py": "uncalled guards_watch",
    "optx/inject/_fold_prefix.py": "prefix",
    "optx/inject/_forward.py": "forward_swaps prefix aside_others",
    "optx/inject/_freeze.py": "attach_training attach",
    "optx/inject/_heads.py": "prefix prefix_models prefix_torch adapters",
    "optx/inject/_hidden_delta_options.py": "arithmetic_inject adapter_places adapters prefix",
    "optx/inject/_low_rank.py": "arithmetic_inject lora lora_start lora_peft lora_modules",
    "optx/inject/_low_rank_sum.py": "experts expert_models",
    "optx/inject/_low_rank_start.py": "lora_start",
    "optx/inject/_merge.py": "arithmetic_inject guards_weights attach lora lora_peft svfit ia3 flora",
    "optx/inject/_offload.py": "computes",
    "optx/inject/_own_call.py": "own_call",
    "optx/inject/_part.py": "arithmetic_inject guards_weights attach attach_targets lora adapters",
    "optx/inject/_quantised.py": "quantised guards_weights",
    "optx/inject/_passed_by.py": "passed_by",
    "optx/inject/_watch.py": "lost_modules",
    "optx/inject/_narrow.py": "narrow",
    "optx/inject/_param_groups.py": "lora_plus",
    "optx/inject/_switch.py": "switch",
    "optx/inject/_task_heads.py": "task_heads",
    "optx/inject/_trained_whole.py": "switch task_heads attach_training",
    "optx/inject/_uncalled.py": "uncalled guards_watch",
    "optx/inject/_unfilled.py": "unfilled",
    "optx/inject/_weights.py": "arithmetic_inject lora lora_peft lora_modules flora svfit ia3",
    "optx/inject/adapters.py": "arithmetic_inject arithmetic_options adapters adapter_places",
    "optx/inject/bitfit.py": "arithmetic_inject adapters lora_modules attach",
    "optx/inject/flora.py": "arithmetic_inject arithmetic_options flora flora_models",
    "optx/inject/ia3.py": "arithmetic_inject arithmetic_options ia3",
    "optx/inject/iaa.py": "arithmetic_inject arithmetic_options iaa aside_stream aside_others",
    "optx/inject/lora.py": "arithmetic_inject arithmetic_options lora lora_start lora_peft lora_modules",
    "optx/inject/mam.py": "arithmetic_inject arithmetic_options adapter_places prefix",
    "optx/inject/multihead.py": "arithmetic_inject arithmetic_options adapters prefix prefix_models",
    "optx/inject/prefix.py": "arithmetic_inject arithmetic_options prefix prefix_models",
    "optx/inject/svfit.py": "arithmetic_inject arithmetic_options svfit",
    "optx/inject/hidden_delta.py": "arithmetic_inject arithmetic_options adapter_places adapters prefix",
    "kernels/loss/stablemax_rows.py": "arithmetic_signal stablemax",
    "optx/signal/stablemax.py": "arithmetic_signal arithmetic_options stablemax stablemax_torch",
    "optx/transforms/_anchor_files.py": "adamr_sources adamr_anchors",
    "optx/transforms/_anchors.py": "adamr_anchors adamr_sources adamr_mistakes adamr",
    "optx/transforms/_blocks.py": "hft_selection",
    "optx/transforms/_domain_gradients.py": "dsp_reg dsp_reg_loops dsp_reg_mistakes",
    "optx/transforms/_flags.py": "hft_rounds hft_kept hft",
    "optx/transforms/_frozen_half.py": "hft_rounds hft_kept hft",
    "optx/transforms/_half_selection.py": "hft_selection hft",
    "optx/transforms/_rounds.py": "hft_rounds hft_kept hft hft_selection",
    "optx/transforms/adamr.py": "arithmetic_step arithmetic_options adamr adamr_anchors adamr_mistakes",
    "optx/transforms/dsp_reg.py": "dsp_reg dsp_reg_loops dsp_reg_mistakes arithmetic_options",
    "optx/transforms/hft.py": "arithmetic_step hft hft_rounds hft_kept hft_resume hft_selection",
    "optx/transforms/perpgrad.py": "arithmetic_step perpgrad fused_cpu resume",
    "optx/step/bases.py": f"arithmetic_step {_STEP}",
    "optx/step/base_step.py": f"arithmetic_step errors {_STEP}",
    "optx/step/elementwise.py": "user_rules",
    "optx/step/binding.py": f"moments errors {_STEP}",
    "optx/step/checkpoint.py": "arithmetic_step resume adamr_anchors wrap_bases hft_resume",
    "optx/step/checks.py": "errors perpgrad wrap_bases",
    "optx/step/foreach.py": f"arithmetic_step {_STEP}",
    "optx/step/fused.py": f"arithmetic_step {_STEP} fused_rounding",
    "optx/step/fusable.py": "wrap_kernels_see wrap_breaks fused_memory fused_cpu errors",
    "optx/step/group_tensors.py": f"arithmetic_step {_STEP} wrap_kernels_see wrap_breaks errors",
    "optx/step/known_groups.py": "wrap_life integrations_base resume errors",
    "optx/step/memory.py": "wrap_kernels_see wrap_breaks lost_memory fused_memory fused_cpu errors resume",
    "optx/step/numbers.py": f"arithmetic_step {_STEP}",
    "optx/step/paths.py": f"arithmetic_step {_STEP} fused_rounding errors",
    "optx/step/pipeline.py": f"arithmetic_step errors {_STEP}",
    "optx/step/rounding.py": "arithmetic_step fused_rounding",
    "optx/_rules.py": "user_rules errors fused_cpu",
    "optx/step/interrupts.py": "wrap_signals",
    "optx/step/slots.py": f"arithmetic_step {_STEP}",
    "optx/step/state.py": "arithmetic_step resume wrap_bases adamr_anchors freed hft_kept hft_resume",
    "optx/step/stepper.py": f"arithmetic_step {_STEP} fused_rounding errors",
    "optx/step/transform.py": "errors user_rules perpgrad adamr hft",
    "optx/step/undo.py": f"wrap_whole wrap_breaks arithmetic_step skip_nonfinite {_STEP}",
    "optx/step/wrap.py": f"arithmetic_step errors {_STEP}",
    "optx/step/wrapped.py": f"arithmetic_step errors {_STEP}",
    "kernels/step/emit_cpu.py": "fused_cpu user_rules fused_rounding adamr",
    "kernels/step/cpu.py": "fused_cpu fused_memory fused_rounding",
}

# Modules of the folders that compute nothing: they read, write, match names or hold what others compute.
_FILES = (
    "_background_file _checkpoint_output _checkpoint_source _claim _compressed_file _delta _delta_file "
    "_inputs _known_files _merge_file _merge_result _merge_run _merge_tokenizer _mergekit _overwrite _patch "
    "_safetensors_writer _side_files _work_files cli merge"
)
_HANDLES = (
    "_adapter_card _attach _export _families _folder _folder_output _handle _injection _install "
    "_lora_options _module_paths _parameters _peft_match _peft_parameters _peft_prefix _peft_read "
    "_peft_start _peft_write _report _served _sharding "
    "_stored _targets"
)
PLUMBING = [
    *(f"{folder}/__init__.py" for folder in FOLDERS),
    "optx/step/plan.py",
    *(f"optx/delta/{name}.py" for name in _FILES.split(" ")),
    *(f"optx/inject/{name}.py" for name in _HANDLES.split(" ")),
]


def path_of(name: str, root: Path) -> str | None:
    """A test file by its name in the table, relative to ``root``: names stand once over all folders."""
    found = [path for path in root.glob(f"tests/*/test_{name}.py") if path.parent.name != "interpreted"]
    return found[0].relative_to(root).as_posix() if found else None
