"""Status bits of a solve, the same in every body; csrc/solvers/team.h has the same."""

NO_ACTIVE_TASK = 1  # every gradient is zero or not finite: all weights are 0
INACTIVE_TASK = 2  # at least one task was left out
NOT_CONVERGED = 4  # the solver stopped short of its tolerance
RIDGE_RAISED = 8  # the Gram matrix was too noisy for the ridge asked for
FALLBACK = 16  # the method has no usable answer here: the weights are those of its fallback
INVALID_GRAM = 32  # not a Gram matrix: all weights are 0 (on the CPU the solve raises instead)
INVALID_LOSS = 64  # not finite, or not above 0 where that is needed: that weight is 0 (as above)
