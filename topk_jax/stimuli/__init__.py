"""What networks are shown: sets of images with their true categories."""

from topk_jax.stimuli.base import Stimuli as Stimuli
from topk_jax.stimuli.base import check_same_classes as check_same_classes
from topk_jax.stimuli.builtin import builtin_cue_conflict as builtin_cue_conflict
from topk_jax.stimuli.cue_conflict import download_cue_conflict as download_cue_conflict
from topk_jax.stimuli.cue_conflict import read_cue_conflict as read_cue_conflict
from topk_jax.stimuli.folders import read_image_folder as read_image_folder
from topk_jax.stimuli.folders import read_image_zip as read_image_zip
from topk_jax.stimuli.long_tail import long_tailed as long_tailed
from topk_jax.stimuli.long_tail import long_tailed_counts as long_tailed_counts
from topk_jax.stimuli.memory import from_arrays as from_arrays
from topk_jax.stimuli.memory import in_memory as in_memory
from topk_jax.stimuli.suppression import parse_suppression as parse_suppression
from topk_jax.stimuli.suppression import suppress as suppress
from topk_jax.stimuli.tfds import read_tfds as read_tfds
