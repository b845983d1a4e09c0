"""LoRA adapters as files: what they hold, which inputs of a graph they are for, and the inputs themselves."""
