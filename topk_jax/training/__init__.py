"""Training of networks, data-parallel by pmap."""

from topk_jax.training.builtin import measure as measure
from topk_jax.training.builtin import train_builtin as train_builtin
from topk_jax.training.loop import fit as fit
from topk_jax.training.loop import shuffled_batches as shuffled_batches
from topk_jax.training.state import TrainState as TrainState
from topk_jax.training.state import create_state as create_state
from topk_jax.training.state import init_variables as init_variables
from topk_jax.training.state import make_train_step as make_train_step
