"""The abstract interpreter: types, shapes and small tensors at concrete sizes."""
