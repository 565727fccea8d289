"""Model folders: config, weights and card, as the hub stores them."""
