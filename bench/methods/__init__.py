"""Methods of weighting compared by what they train, on real data: ``python -m bench.methods``."""
