"""The layout of packed rows: where each token is and which tokens it sees. No model code."""
