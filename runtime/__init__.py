"""Run time: an artifact in, tensors or tokens out. Owns the artifact format.

`LLM`, `LLMEngine` and `AsyncLLMEngine` generate, `Executor` runs any artifact on tensors, `verify_against` compares one
with the model it came from.
"""

import lazy_loader

# By its own name, also where the folder's was imported.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub("furiosa_llm.runtime", __file__)
