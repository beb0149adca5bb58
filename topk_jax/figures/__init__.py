"""Figures drawn from tables and images.

Every function returns a matplotlib `Figure` of its own, on the Agg canvas: pyplot and its global
state are not used, so figures can be drawn in threads and beside a user's own. `save` writes one as
PNG and PDF.
"""

from topk_jax.figures.contact_sheet import contact_sheet as contact_sheet
from topk_jax.figures.pictures import picture_rows as picture_rows
from topk_jax.figures.shape_bias import shape_bias_boxplot as shape_bias_boxplot
from topk_jax.figures.shape_bias import shape_bias_matrix as shape_bias_matrix
from topk_jax.figures.style import HUMANS as HUMANS
from topk_jax.figures.style import Style as Style
from topk_jax.figures.style import new_figure as new_figure
from topk_jax.figures.style import save as save
from topk_jax.figures.style import styles_for as styles_for
from topk_jax.figures.training import training_curves as training_curves
