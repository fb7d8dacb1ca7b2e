"""Parts of the scripts that tune and evaluate."""
