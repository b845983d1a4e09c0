"""A model file and what lies next to it: read, checked, and its weights left where they are."""
