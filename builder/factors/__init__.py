"""Which dimensions run over the same indices: probes, the rules applied, states, repeated layers."""
