"""What a step on one task does to the others: the probe that measures it, the record, the sample overlap.

Everywhere in it a row is the recipient, whose loss is measured, and a column the source, whose gradient
made the step.
"""

from flatmtl.affinity.overlap import sample_overlap
from flatmtl.affinity.probe import AffinityProbe
from flatmtl.affinity.record import AffinityRecord

__all__ = ["AffinityProbe", "AffinityRecord", "sample_overlap"]
