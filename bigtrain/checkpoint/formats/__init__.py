"""One small reader per format: each makes a `TensorIndex` without loading tensors."""
