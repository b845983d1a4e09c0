"""The version that is installed, alone and with onnxruntime's."""

from importlib.metadata import version

__version__ = version("furiosa-llm-onnx")
__full_version__ = f"{__version__}+onnxruntime.{version('onnxruntime')}"
