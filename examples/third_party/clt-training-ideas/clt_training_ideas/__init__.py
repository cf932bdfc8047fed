"""Five ideas for training: an optimizer, a schedule, a callback, a metric and a loss, each in a file of its own."""

from clt_training_ideas.bias_nudge import clt_callbacks
from clt_training_ideas.coverage import clt_metrics
from clt_training_ideas.inverse_sqrt import clt_schedules
from clt_training_ideas.lion import clt_optimizers
from clt_training_ideas.uncertainty import clt_losses

__all__ = ["clt_callbacks", "clt_losses", "clt_metrics", "clt_optimizers", "clt_schedules"]
