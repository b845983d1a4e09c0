"""The artifact format: manifest, layouts, and the reader that checks every field."""
