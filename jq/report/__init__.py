"""Figures about models: perplexity, error of each layer, the table of formats."""
