"""From machine, model and wishes to a plan: memory card by card, the split, the ranking. All pure."""
