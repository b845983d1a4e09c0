"""Which PE is which rank, stage and replica."""
