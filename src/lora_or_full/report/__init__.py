"""From finished runs to a report. No torch."""
