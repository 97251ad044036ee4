"""flatmtl in other frameworks; each module needs its own and is imported by name."""
