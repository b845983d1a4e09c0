"""The public face of furiosa-llm for ONNX: what users import."""

import os

import lazy_loader

# onnxruntime reads this once, at its import. Without it, it keeps an identifier of the device in the user's cache and
# reports the models that it runs.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
