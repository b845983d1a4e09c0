"""Read and check a model file and the files next to it; the weights stay where they are."""
