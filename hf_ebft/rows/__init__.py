"""Where every token of a packed row is, and which tokens it sees. No model here."""
