"""Training in several processes: rows averaged between ranks, the same step on each of them."""
