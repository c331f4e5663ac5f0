"""What people read about a run: curves, console lines, TensorBoard pictures, model cards."""
