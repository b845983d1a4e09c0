"""Refuse an artifact that is not what the format says, each fault by name."""
