"""A replica's batches, on threads or on worker processes."""
