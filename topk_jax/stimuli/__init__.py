"""What networks are shown: sets of images with their true categories."""

from topk_jax.stimuli.base import Stimuli as Stimuli
from topk_jax.stimuli.builtin import builtin_cue_conflict as builtin_cue_conflict
from topk_jax.stimuli.cue_conflict import download_cue_conflict as download_cue_conflict
from topk_jax.stimuli.cue_conflict import read_cue_conflict as read_cue_conflict
