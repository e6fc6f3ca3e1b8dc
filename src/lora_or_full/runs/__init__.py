"""What a run leaves behind: files, checksums, locks, provenance, records. No torch."""
