"""ONNX IR-11 multi-device annotations: a plan written into a model, read from one, and checked."""
