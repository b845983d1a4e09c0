"""Inspect, compare, take apart and vouch for artifacts."""
