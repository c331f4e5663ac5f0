"""Output for people who watch a run: console lines, TensorBoard pictures, model cards, charts."""
