"""Find which dimensions run over the same indices: probe sizes, apply the rules, find states and repeated layers."""
