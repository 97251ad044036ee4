"""What a step on one task does to the others: the record of a measurement, and its sample overlap.

Everywhere in it a row is the recipient, whose loss is measured, and a column the source, whose gradient
made the step.
"""

from flatmtl.affinity.overlap import sample_overlap
from flatmtl.affinity.record import AffinityRecord

__all__ = ["AffinityRecord", "sample_overlap"]
