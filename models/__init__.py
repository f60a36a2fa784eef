"""Real models: the catalogue, its fetcher, and builders of what no package ships."""
