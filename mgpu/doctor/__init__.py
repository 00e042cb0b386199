"""The diagnosis: checks as generators of findings over an inspection; fixes; probes, which alone touch the cards."""
