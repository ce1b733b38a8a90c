"""Modules of the table's folders that nothing has to be tested of."""

from __future__ import annotations

from mutation.table import FOLDERS

# Modules of the folders that compute nothing: they read, write, match names or hold what others compute.
_FILES = (
    "_background_file _checkpoint_output _checkpoint_source _claim _compressed_file _delta _delta_file "
    "_inputs _known_files _merge_file _merge_result _merge_run _merge_tokenizer _mergekit _overwrite _patch "
    "_safetensors_writer _side_files _work_files cli merge"
)
_HANDLES = (
    "_adapter_card _attach _export _families _folder _folder_output _handle _injection _install "
    "_lora_options _parameters _peft_match _peft_parameters _peft_prefix _peft_read "
    "_peft_start _peft_write _report _served _sharding "
    "_stored _targets"
)
PLUMBING = [
    *(f"{folder}/__init__.py" for folder in FOLDERS),
    "optx/step/plan.py",
    *(f"optx/delta/{name}.py" for name in _FILES.split(" ")),
    *(f"optx/inject/{name}.py" for name in _HANDLES.split(" ")),
]
