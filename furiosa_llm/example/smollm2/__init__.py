"""SmolLM2-135M-Instruct as ONNX with a KV cache, made from the GGUF file in a package: docs/example-model.md."""

SHAPES = ("genai-fp32", "optimum-fp32", "int4")
"""The graph shapes that `furiosa_llm.example.smollm2.recipe.ensure` makes."""
