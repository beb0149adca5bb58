"""Training of networks, data-parallel by pmap: the parts that `jobs.train` joins."""

from topk_jax.training.batches import Batches as Batches
from topk_jax.training.batches import iterate as iterate
from topk_jax.training.checkpoints import Checkpoints as Checkpoints
from topk_jax.training.loop import fit as fit
from topk_jax.training.losses import class_balanced_weights as class_balanced_weights
from topk_jax.training.losses import make_loss as make_loss
from topk_jax.training.optimizers import make_optimizer as make_optimizer
from topk_jax.training.optimizers import make_schedule as make_schedule
from topk_jax.training.settings import Settings as Settings
from topk_jax.training.settings import from_config as from_config
from topk_jax.training.state import TrainState as TrainState
from topk_jax.training.state import create_state as create_state
from topk_jax.training.state import init_variables as init_variables
from topk_jax.training.state import make_train_step as make_train_step
from topk_jax.training.validation import Validation as Validation
