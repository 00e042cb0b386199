"""What a model is: facts for planning, the readers that find them, and where its files come from."""
