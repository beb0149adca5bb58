"""Weights: what exists and where, download, torch files without torch, conversion.

Data contract: files hold arrays under torch's names and in torch's layout; a network's variables
are float32 NumPy arrays in ours (`conversion` has the rule). A file fits a network whole or not at
all, and nothing in a file is ever executed.
"""

from topk_jax.weights.catalogue import (
    CAFFE_PREPROCESSING,
    CATALOGUE,
    WeightsEntry,
    default_preprocessing,
    find_entry,
    format_catalogue,
    list_tags,
)
from topk_jax.weights.conversion import (
    count_parameters,
    state_dict_to_variables,
    variables_to_state_dict,
)
from topk_jax.weights.loading import (
    Conversion,
    WeightsFile,
    convert_file,
    load_features,
    load_variables,
    resolve_weights,
    write_state_dict,
)
from topk_jax.weights.torch_files import StateDict, read_state_dict

__all__ = [
    "CAFFE_PREPROCESSING",
    "CATALOGUE",
    "Conversion",
    "StateDict",
    "WeightsEntry",
    "WeightsFile",
    "convert_file",
    "count_parameters",
    "default_preprocessing",
    "find_entry",
    "format_catalogue",
    "list_tags",
    "load_features",
    "load_variables",
    "read_state_dict",
    "resolve_weights",
    "state_dict_to_variables",
    "variables_to_state_dict",
    "write_state_dict",
]
