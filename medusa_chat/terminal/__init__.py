"""The chat in the terminal: a prompt, a coloured stream, a live panel. Imports neither torch nor transformers."""
