"""The statistical tests of the report."""
