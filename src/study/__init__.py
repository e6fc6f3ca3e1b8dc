"""From runs to conclusions: what a run leaves behind. No torch."""
