"""In which order to train tasks and samples: similar tasks one after the other, easy samples first."""

from flatmtl.curriculum.instances import difficulty_margin, order_instances
from flatmtl.curriculum.order import TaskOrder, order_tasks
from flatmtl.curriculum.samplers import InstanceOrderSampler, TaskOrderSampler
from flatmtl.curriculum.similarity import from_affinity, from_embeddings, from_gram

__all__ = [
    "InstanceOrderSampler",
    "TaskOrder",
    "TaskOrderSampler",
    "difficulty_margin",
    "from_affinity",
    "from_embeddings",
    "from_gram",
    "order_instances",
    "order_tasks",
]
