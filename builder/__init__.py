"""Compile time: build an artifact from an ONNX model. This package knows op rules and costs, but no requests."""

import lazy_loader

# By its own name, also where the folder's was imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("furiosa_llm.builder", __file__)
